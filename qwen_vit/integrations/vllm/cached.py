"""Build requests that name entries of vLLM's encoder cache by grid and uuid."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vit.common.arguments import typed_repr
from qwen_vit.errors import ArgumentError
from qwen_vit.integrations.vllm.features import to_base64

__all__ = ["CachedFeatures", "to_vllm_cached", "to_vllm_cached_chat_part"]


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Identify an entry of an encoder cache. A request names the entry instead of sending
    embeddings.

    Attributes:
        id: the id of the image or video, as in `ImageFeatures.id`.
        uuid: the entry's name, for `multi_modal_uuids`.
        grid_thw: the grid: time steps, and the height and width in patches.
        second_per_grid_t: seconds per time step of a video's grid, or None for an image.
    """

    id: str
    uuid: str
    grid_thw: tuple[int, int, int]
    second_per_grid_t: float | None = None


def to_vllm_cached(entries: Iterable[CachedFeatures]) -> dict[str, Any]:
    """Return a request's `multi_modal_data` and `multi_modal_uuids` for entries of a cache.

    >>> request = to_vllm_cached([CachedFeatures("a.jpg", "5f-c0", (1, 4, 6))])
    >>> request["multi_modal_uuids"], request["multi_modal_data"]["image"]["image_grid_thw"]
    ({'image': ['5f-c0']}, tensor([[1, 4, 6]]))

    The prompt must have one `<|image_pad|>` or `<|video_pad|>` per entry, in order.

    Args:
        entries: entries of the cache, in the prompt's order.

    Returns:
        The grids of all images and of all videos, the videos' seconds per time step, and the
        entries' uuids.

    Raises:
        ArgumentError: `entries` is empty, or an item is not an entry.
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
    """Return one part of a chat message, with grid and uuid, for each entry of a cache.

    >>> to_vllm_cached_chat_part([CachedFeatures("a.jpg", "5f-c0", (1, 4, 6))])
    [{'type': 'image_embeds', 'image_embeds': {'image_grid_thw': [1, 4, 6]}, 'uuid': '5f-c0'}]

    Args:
        entries: entries of the cache, in the prompt's order.

    Returns:
        The parts of the images, then those of the videos. Put each part at its position in the
        prompt.

    Raises:
        ArgumentError: `entries` is empty, or an item is not an entry.
    """
    parts = []
    for kind, some in _by_kind(entries).items():
        for entry in some:
            content: dict[str, Any] = {f"{kind}_grid_thw": list(entry.grid_thw)}
            if entry.second_per_grid_t is not None:  # vLLM needs a tensor; JSON has none
                time = torch.tensor(entry.second_per_grid_t, device="cpu")
                content["second_per_grid_ts"] = to_base64(time)
            parts.append({"type": f"{kind}_embeds", f"{kind}_embeds": content, "uuid": entry.uuid})
    return parts


def _by_kind(entries: Iterable[CachedFeatures]) -> dict[str, list[CachedFeatures]]:
    wanted = "CachedFeatures, as write_ec_cache returns them"
    if not isinstance(entries, Iterable) or isinstance(entries, str | Mapping):
        raise ArgumentError(f"entries is {typed_repr(entries)}", expected=f"a list of {wanted}")
    found: dict[str, list[CachedFeatures]] = {}
    for entry in entries:
        if not isinstance(entry, CachedFeatures):
            raise ArgumentError(f"entries contains {typed_repr(entry)}", expected=wanted)
        kind = "image" if entry.second_per_grid_t is None else "video"
        found.setdefault(kind, []).append(entry)
    if not found:
        raise ArgumentError("entries is empty", remedy="pass at least one entry of a cache")
    return {kind: found[kind] for kind in ("image", "video") if kind in found}
