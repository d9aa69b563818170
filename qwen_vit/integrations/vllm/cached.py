"""Requests that name entries of vLLM's encoder cache: a grid and a uuid each, and no embeddings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vit.errors import ArgumentError
from qwen_vit.integrations.vllm.features import to_base64

__all__ = ["CachedFeatures", "to_vllm_cached", "to_vllm_cached_chat_part"]


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """An entry of an encoder cache: what a request names instead of embeddings.

    Attributes:
        id: the picture's or video's id, as `ImageFeatures.id`.
        uuid: the entry's name, for `multi_modal_uuids`.
        grid_thw: (frames, height, width) in patches.
        second_per_grid_t: of a video, seconds from one step of its grid to the next; None of a
            picture.
    """

    id: str
    uuid: str
    grid_thw: tuple[int, int, int]
    second_per_grid_t: float | None = None


def to_vllm_cached(entries: Iterable[CachedFeatures]) -> dict[str, Any]:
    """Return `multi_modal_data` and `multi_modal_uuids` of a request, for entries of a cache.

    >>> request = to_vllm_cached([CachedFeatures("a.jpg", "5f-c0", (1, 4, 6))])
    >>> request["multi_modal_uuids"], request["multi_modal_data"]["image"]["image_grid_thw"]
    ({'image': ['5f-c0']}, tensor([[1, 4, 6]]))

    The prompt has a `<|image_pad|>` or `<|video_pad|>` for each, in order. Raises ArgumentError for
    other objects than entries, and for none.
    """
    data: dict[str, Any] = {}
    uuids: dict[str, list[str]] = {}
    for kind, some in _by_kind(entries).items():
        grids = torch.tensor([entry.grid_thw for entry in some], device="cpu")
        data[kind] = {f"{kind}_grid_thw": grids}
        uuids[kind] = [entry.uuid for entry in some]
        if kind == "video":
            times = [entry.second_per_grid_t for entry in some]
            data[kind]["second_per_grid_ts"] = torch.tensor(times, device="cpu")
    return {"multi_modal_data": data, "multi_modal_uuids": uuids}


def to_vllm_cached_chat_part(entries: Iterable[CachedFeatures]) -> list[dict[str, Any]]:
    """Return a part of a chat message for each entry of a cache: its grid and its uuid.

    >>> to_vllm_cached_chat_part([CachedFeatures("a.jpg", "5f-c0", (1, 4, 6))])
    [{'type': 'image_embeds', 'image_embeds': {'image_grid_thw': [1, 4, 6]}, 'uuid': '5f-c0'}]

    Parts of videos follow those of the pictures. Raises as `to_vllm_cached` does.
    """
    parts = []
    for kind, some in _by_kind(entries).items():
        for entry in some:
            content: dict[str, Any] = {f"{kind}_grid_thw": list(entry.grid_thw)}
            if entry.second_per_grid_t is not None:  # no JSON number: vLLM takes a tensor
                time = torch.tensor(entry.second_per_grid_t, device="cpu")
                content["second_per_grid_ts"] = to_base64(time)
            parts.append({"type": f"{kind}_embeds", f"{kind}_embeds": content, "uuid": entry.uuid})
    return parts


def _by_kind(entries: Iterable[CachedFeatures]) -> dict[str, list[CachedFeatures]]:
    wanted = "CachedFeatures, as write_ec_cache returns them"
    if not isinstance(entries, Iterable) or isinstance(entries, str | Mapping):
        raise ArgumentError(
            f"entries is one {type(entries).__name__}", expected=f"a list of {wanted}"
        )
    found: dict[str, list[CachedFeatures]] = {}
    for entry in entries:
        if not isinstance(entry, CachedFeatures):
            raise ArgumentError(f"entries holds a {type(entry).__name__}", expected=wanted)
        kind = "image" if entry.second_per_grid_t is None else "video"
        found.setdefault(kind, []).append(entry)
    if not found:
        raise ArgumentError("entries is empty", remedy="pass at least one entry of a cache")
    return {kind: found[kind] for kind in ("image", "video") if kind in found}
