"""Decide which versions a resumed export may have, and describe the versions of its shards."""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "MADE_BY",
    "POLICY",
    "adds_only_decoders",
    "flat",
    "made_by_of",
    "makers_in",
    "video_policy_of",
]

MADE_BY = ("versions", "gpu")  # `accept_versions` allows changes of these
POLICY = "image_policy"  # it names the decoder of videos
VIDEO = f"{POLICY}.video."  # an export without videos has no such settings
# optional decoders, and how an export records a missing one
MISSING = {
    "versions.pillow-heif": "not installed",
    "versions.libwebp": None,
    f"{VIDEO}decoder": None,
}


def makers_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in (*MADE_BY, POLICY)}


def made_by_of(settings: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's versions and GPU. Include the image policy if it differs from the policy at
    the export's start, for example because PyAV was missing."""
    makers = makers_in(settings)
    return {n: makers[n] for n in makers if n in MADE_BY or makers[n] != start.get(n)}


def video_policy_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an export's videos, which an extension may add, or an empty
    dictionary."""
    for each in (*reversed(description.get("accepted", [])), description):
        if video := each.get(POLICY, {}).get("video"):
            return dict(video)
    return {}


def adds_only_decoders(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the only differences are decoders that were missing before, or the settings of
    the export's first videos.

    A missing decoder decoded no image, so no stored rows depend on its version. Without videos, no
    stored rows depend on the settings of videos, unless animations become videos.

    >>> before = {"versions": {"pillow-heif": "not installed"}}
    >>> adds_only_decoders(before, {"versions": {"pillow-heif": "1.8.1"}})
    True
    """
    old, new = flat(before), flat(now)
    if new.get(f"{VIDEO}as_video") is False and not any(name.startswith(VIDEO) for name in old):
        new = {name: new[name] for name in new if not name.startswith(VIDEO)}
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
