"""Bound the size of a shard's header, which the export reserves before it knows the content."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vit.inputs.listing import Item
from qwen_vit.video.sampling import MAX_FRAMES

__all__ = [
    "IMAGE_HEAD_BYTES",
    "TENSOR_HEAD_BYTES",
    "most_header_bytes",
    "reserved_header_bytes",
]

# Bytes in a shard's header, for each image: grid, offset, size, notes, hashes; and for each tensor:
# a hash.
IMAGE_HEAD_BYTES, TENSOR_HEAD_BYTES = 420, 100
MOMENT_BYTES = 14  # for each frame of a video
NAMES_BYTES = 5_000  # more than an id and a path take


def reserved_header_bytes(items: Sequence[Item], settings: Mapping[str, Any]) -> int:
    """Return the bytes to reserve for a shard's header, which depend only on the plan."""
    names = [name for item in items for name in (item.id, item.source)]
    text = json.dumps({**settings, "ids": names})
    of_videos = _video_head_bytes(settings) * sum(item.is_video for item in items)
    per_image = IMAGE_HEAD_BYTES + TENSOR_HEAD_BYTES * (1 + len(settings.get("layers", ())))
    return len(json.dumps(text)) + per_image * (len(items) + 1) + of_videos  # JSON within JSON


def most_header_bytes(settings: Mapping[str, Any]) -> int:
    """Return more bytes than one image takes in a header, without its hashes of tensors."""
    return IMAGE_HEAD_BYTES + NAMES_BYTES + _video_head_bytes(settings)


def _video_head_bytes(settings: Mapping[str, Any]) -> int:
    policy = settings.get("image_policy", {}).get("video") or {}
    frames: int = policy.get("n_frames") or policy.get("max_frames") or MAX_FRAMES
    return MOMENT_BYTES * frames
