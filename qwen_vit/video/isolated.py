"""Try a video in a child process first, because a damaged file may crash FFmpeg's C code.

The child process is `python -m qwen_vit.video.isolated`.
"""

import json
from dataclasses import asdict
from typing import Any, BinaryIO

from qwen_vit.common.child_process import answer_request, ask_child
from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.inputs.listing import Item
from qwen_vit.video.items import open_video_item, video_of_item
from qwen_vit.video.load import load_video
from qwen_vit.video.options import VideoLimits, VideoOptions
from qwen_vit.video.source import TAKE_A_PART

__all__ = ["load_in_child"]

MARGIN_S = 60.0  # seconds for the start of the process, in addition to the limit


def load_in_child(
    item: Item, options: VideoOptions, limits: VideoLimits, config: ImageConfig
) -> None:
    """Load a video in a child process that may crash, and discard the result."""
    late = ImageError(
        f"not decoded after {limits.max_decode_s:g} s",
        name=item.id,
        expected="at most VideoLimits.max_decode_s",
        remedy=TAKE_A_PART,
        code="slow",
    )
    request = {
        "item": json.loads(item.to_json()),
        "options": asdict(options),
        "limits": asdict(limits),
        "config": config.to_json(),
    }
    ask_child(
        "qwen_vit.video.isolated", request, timeout_s=limits.max_decode_s + MARGIN_S, late=late
    )


def _load(request: dict[str, Any], _: BinaryIO) -> None:
    item = Item.from_json(request["item"])
    limits = VideoLimits(**request["limits"])
    with open_video_item(item, limits) as (file, _hash):
        load_video(
            video_of_item(item, VideoOptions(**request["options"])),
            ImageConfig.from_json(request["config"]),
            limits=limits,
            file=file,
        )


if __name__ == "__main__":
    answer_request(_load)
