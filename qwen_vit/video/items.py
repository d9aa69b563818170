"""A video of a listing: opened as a file or inside its tar, and counted by its header."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.inputs.listing import Item
from qwen_vit.video.options import Video, VideoLimits, VideoOptions
from qwen_vit.video.reader import read_header
from qwen_vit.video.sampling import FRAMES_IN_A_STEP, frame_size, sample_frames
from qwen_vit.video.source import Window, open_file

__all__ = ["open_video_item", "patches_by_header", "video_of_item"]


@contextmanager
def open_video_item(item: Item) -> Iterator[tuple[BinaryIO | None, str]]:
    """A member of a tar as a file of its own, or None for a whole file; and its bytes' sha256.

    Raises ImageError for one that cannot be read, or with the error found while listing.
    """
    if item.error is not None:
        code, message = item.error
        raise ImageError(message, code=code)
    with open_file(item.source, item.id) as file:
        if item.offset is None or item.size is None:
            yield None, hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            return
        window = Window(file, item.offset, item.size)
        digest = hashlib.file_digest(cast(Any, window), "sha256").hexdigest()
        yield cast(BinaryIO, window), digest


def video_of_item(item: Item, options: VideoOptions) -> Video:
    """The item as a video with these options."""
    return Video.of(item.source, options, item.id)


def patches_by_header(
    item: Item, options: VideoOptions, limits: VideoLimits, config: ImageConfig
) -> int:
    """The patches of a video by its header alone. Raises ImageError as reading it would."""
    if item.error is not None:
        code, message = item.error
        raise ImageError(message, code=code)
    with open_file(item.source, item.id) as file:
        source: Any = item.source
        if item.offset is not None and item.size is not None:
            source = Window(file, item.offset, item.size)
        header = read_header(source, item.id, limits)
    indices, _ = sample_frames(header.timeline, options, item.id)
    factor = config.patch_px * config.merge_size
    size = frame_size(header.height, header.width, len(indices), options, factor, item.id)
    steps = -(-len(indices) // FRAMES_IN_A_STEP)
    return steps * size[0] * size[1] // config.patch_px**2
