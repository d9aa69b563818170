"""Open a listed video from a file, a tar or object storage, and estimate its number of patches from
its header."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

from qwen_vit.common.storage import is_remote
from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.remote import copy_object
from qwen_vit.inputs.tars import check_member
from qwen_vit.video.options import Video, VideoLimits, VideoOptions
from qwen_vit.video.reader import read_header
from qwen_vit.video.sampling import FRAMES_IN_A_STEP, frame_size, sample_frames
from qwen_vit.video.source import Window, check_bytes, open_file

__all__ = ["open_video_item", "patches_by_header", "video_of_item"]


@contextmanager
def open_video_item(item: Item, limits: VideoLimits) -> Iterator[tuple[BinaryIO | None, str]]:
    """Yield a pair: an open file (None for a whole file on the disk), and the bytes' SHA-256.

    The open file is a tar member, or a temporary copy of a video in object storage. The function
    removes the copy when the block ends.
    """
    with _opened(item, limits) as (file, is_whole):
        digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        yield None if is_whole else file, digest


@contextmanager
def _opened(item: Item, limits: VideoLimits) -> Iterator[tuple[BinaryIO, bool]]:
    """Yield a video's bytes as an open file, and whether they are a whole file on the disk."""
    if item.error is not None:
        code, message = item.error
        raise ImageError(message, code=code)
    if is_remote(item.source):
        with TemporaryFile(prefix="qwen-vit-") as copy:
            copy_object(item, copy, lambda size: check_bytes(size, item.id, limits))
            yield copy, False
        return
    with open_file(item.source, item.id) as file:
        if item.offset is None or item.size is None:
            yield file, True
        else:
            check_member(file, item)
            yield cast(BinaryIO, Window(file, item.offset, item.size)), False


def video_of_item(item: Item, options: VideoOptions) -> Video:
    return Video.of(item.source, options, item.id)


def patches_by_header(
    item: Item, options: VideoOptions, limits: VideoLimits, config: ImageConfig
) -> int:
    """Estimate a video's number of patches from its header alone."""
    with _opened(item, limits) as (file, is_whole):
        source: Any = item.source if is_whole else file
        header = read_header(source, item.id, limits)
    indices, _ = sample_frames(header.timeline, options, item.id)
    factor = config.patch_px * config.merge_size
    size = frame_size(header.height, header.width, len(indices), options, factor, item.id)
    steps = -(-len(indices) // FRAMES_IN_A_STEP)
    return steps * size[0] * size[1] // config.patch_px**2
