"""Check a video file's container, end and number of frames before a decoder opens the file.

FFmpeg fills in missing data, and one box of a header can make FFmpeg index 10^9 frames. Therefore
this module checks the end of MP4, MOV, Matroska, WebM and AVI files, and the number of frames of
MP4 and MOV files.
"""

import io
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from qwen_vit.errors import ImageError
from qwen_vit.images.lookalikes import find_lookalike
from qwen_vit.inputs.suffixes import VIDEO_SUFFIXES, suffix_of
from qwen_vit.video.options import VideoLimits

__all__ = ["HEAD_BYTES", "check_structure", "container_of"]

HEAD_BYTES = 1_024
EXPECTED = "MP4, MOV, Matroska, WebM, AVI or MPEG-TS"
# A file's first bytes -> FFmpeg's container name. qwen_vit passes the name to FFmpeg, so that no
# file can choose a playlist demuxer, which opens other files and addresses.
CONTAINERS = (
    (rb"....ftyp(?!avi[fs]|hei|hev|mif|msf)", "mov"),
    (rb"....(?:moov|mdat|free|skip|wide|pnot)", "mov"),
    (rb"\x1a\x45\xdf\xa3", "matroska"),
    (rb"RIFF....AVI ", "avi"),
    (rb"\x47.{187}\x47.{187}\x47", "mpegts"),
)
PICTURES = (
    (rb"\xff\xd8\xff", "JPEG"), (rb"\x89PNG", "PNG"), (rb"GIF8", "GIF"), (rb"RIFF....WEBP", "WebP"),
    (rb"BM", "BMP"), (rb"II\*\x00|MM\x00\*", "TIFF"), (rb"....ftypavi[fs]", "AVIF"),
    (rb"....ftyp(?:hei|hev|mif|msf)", "HEIC"),
)  # fmt: skip
MAX_BOXES = 1_000_000
PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


def container_of(head: bytes | bytearray | memoryview) -> str | None:
    """Return FFmpeg's container name for a file's first bytes, or None for an unsupported file.

    >>> container_of(b"\\x1a\\x45\\xdf\\xa3"), container_of(b"GIF89a")
    ('matroska', None)
    """
    for pattern, name in CONTAINERS:
        if re.match(pattern, head, re.DOTALL):
            return name
    return None


def check_structure(file: BinaryIO, size: int, name: str, limits: VideoLimits) -> str:
    """Check the start, end and frame count of a file of `size` bytes, and return its container."""
    head = file.read(HEAD_BYTES)
    if not head:
        raise ImageError(
            "it is empty", name=name, remedy="download the file again", code="empty-file"
        )
    container = container_of(head)
    if container is None:
        raise _no_video(head, name)
    ends = {"mov": _mov_end, "matroska": _matroska_end, "avi": _avi_end}
    end = ends[container](file, size, name, limits) if container in ends else 0
    if end > size:
        raise ImageError(
            f"truncated: it has {size} bytes, and its header declares {end} or more",
            name=name,
            remedy="download the file again",
            code="truncated",
        )
    return container


def _no_video(head: bytes, name: str) -> ImageError:
    for pattern, what in PICTURES:
        if re.match(pattern, head, re.DOTALL):
            is_misnamed = suffix_of(name) in VIDEO_SUFFIXES
            return ImageError(
                f"an image ({what}), not a video",
                name=name,
                expected=EXPECTED,
                remedy="give the file an image's extension, such as .jpg"
                if is_misnamed
                else "pass the file to `encode`",
                code="format",
            )
    known = find_lookalike(head)
    if known is not None:
        return ImageError(
            known.fact("a video"),
            name=name,
            expected=EXPECTED,
            remedy=known.remedy or "pass a video, or fetch the file again",
            code=known.code,
        )
    return ImageError(
        f"not a supported video: it starts with {head[:16]!r}",
        name=name,
        expected=EXPECTED,
        remedy="convert the file, for example with ffmpeg -i IN -c:v libx264 OUT.mp4",
        code="not-an-image",
    )


class _Box(NamedTuple):
    kind: bytes
    begin: int  # bytes of the content
    end: int


def _boxes(file: BinaryIO, begin: int, end: int, size: int) -> Iterator[_Box]:
    """Yield an MP4's boxes between two offsets. The last box may end after the file's `size`."""
    for _ in range(MAX_BOXES):
        if begin + 8 > min(end, size):
            return
        file.seek(begin)
        head = file.read(16)
        length, content = int.from_bytes(head[:4]), begin + 8
        if length == 1:
            length, content = int.from_bytes(head[8:16]), begin + 16
        stop = end if length == 0 else begin + length
        if stop < content:
            return  # the demuxer reports it
        yield _Box(head[4:8], content, stop)
        begin = stop


def _mov_end(file: BinaryIO, size: int, name: str, limits: VideoLimits) -> int:
    """Return the last box's end offset. Raises ImageError if a box of a video track or a fragment
    declares more samples than `limits.max_frames`."""
    last = 0
    stack = [_boxes(file, 0, size, size)]
    is_video = True
    while stack:
        box = next(stack[-1], None)
        if box is None:
            stack.pop()
            continue
        if len(stack) == 1:
            last = max(last, box.end)
        if box.kind in PARENTS:
            is_video = is_video or box.kind == b"trak"
            stack.append(_boxes(file, box.begin, box.end, size))
            continue
        file.seek(box.begin)
        if box.kind == b"hdlr":
            is_video = file.read(12)[8:12] == b"vide"
        elif box.kind in (b"stsz", b"stz2", b"trun"):
            at = 4 if box.kind == b"trun" else 8
            count = int.from_bytes(file.read(at + 4)[at:])
            # uncompressed audio has one sample per value, and no index of samples
            if count > limits.max_frames and (is_video or box.kind == b"trun"):
                raise too_many_frames(count, name, limits)
    return last


def too_many_frames(count: int, name: str, limits: VideoLimits) -> ImageError:
    return ImageError(
        f"{count} frames",
        name=name,
        expected=f"at most {limits.max_frames}",
        remedy="cut the video into shorter videos, or raise VideoLimits.max_frames in Python",
        code="too-many-frames",
    )


def _matroska_end(file: BinaryIO, size: int, name: str, limits: VideoLimits) -> int:
    """Return the segment's end from its header, or 0 if the header gives none, as in a live
    recording."""
    file.seek(4)
    header = _ebml_number(file)
    if header is None:
        return 0
    file.seek(header, io.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _ebml_number(file)
    return 0 if length is None else file.tell() + length


def _ebml_number(file: BinaryIO) -> int | None:
    """Read a variable-length size. Return None if the size is unknown, missing or invalid."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = file.read(length - 1)
    unknown = (1 << 7 * length) - 1  # all bits are ones
    value = int.from_bytes(first + rest) & unknown
    return None if value == unknown or len(rest) < length - 1 else value


def _avi_end(file: BinaryIO, size: int, name: str, limits: VideoLimits) -> int:
    """Return the first RIFF chunk's end offset, or 0 if the recorder never wrote the size."""
    file.seek(4)
    length = int.from_bytes(file.read(4), "little")
    return 8 + length if 0 < length < 2**32 - 1 else 0
