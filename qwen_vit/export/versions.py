"""Decide which versions a resumed export may have, and describe the versions of its shards."""

from collections.abc import Mapping
from typing import Any

__all__ = ["MADE_BY", "POLICY", "adds_only_decoders", "flat", "made_by_of", "makers_in"]

MADE_BY = ("versions", "gpu")  # `accept_versions` allows changes of these
POLICY = "image_policy"  # it names the decoder of videos
# optional decoders, and how an export records a missing one
MISSING = {
    "versions.pillow-heif": "not installed",
    "versions.libwebp": None,
    f"{POLICY}.video.decoder": None,
}


def makers_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in (*MADE_BY, POLICY)}


def made_by_of(settings: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's versions and GPU. Include the image policy if it differs from the policy at
    the export's start, for example because PyAV was missing."""
    makers = makers_in(settings)
    return {n: makers[n] for n in makers if n in MADE_BY or makers[n] != start.get(n)}


def adds_only_decoders(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether each difference is a decoder that was missing before.

    A missing decoder decoded no image, so no stored rows depend on its version.

    >>> before = {"versions": {"pillow-heif": "not installed"}}
    >>> adds_only_decoders(before, {"versions": {"pillow-heif": "1.8.1"}})
    True
    """
    old, new = flat(before), flat(now)
    return old.keys() == new.keys() and all(
        name in MISSING and old[name] == MISSING[name] for name in old if old[name] != new[name]
    )


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names.

    >>> flat({"gpu": None, "versions": {"torch": "2"}})
    {'gpu': None, 'versions.torch': '2'}
    """
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            values |= flat(value, f"{above}{name}.")
        else:
            values[above + name] = value
    return values
