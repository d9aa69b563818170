"""Open a video from a path, a file's bytes, or a byte range of an open file."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, BinaryIO

from qwen_vit.common.installation import install_remedy
from qwen_vit.errors import ImageError, Wording
from qwen_vit.images.refusals import too_much_memory
from qwen_vit.images.regular_file import open_regular
from qwen_vit.video.container import check_structure
from qwen_vit.video.options import VideoLimits

__all__ = [
    "CONVERT", "TAKE_A_PART", "Opener", "Window", "check_bytes", "check_size", "decoder_name",
    "open_file", "plain_errors", "require_av", "video_stream",
]  # fmt: skip

TAKE_A_PART = Wording(
    "pass start and end, or raise VideoLimits.max_decode_s",
    shell="pass --start and --end, or raise VideoLimits.max_decode_s in Python",
)
CONVERT = "convert it, for example with ffmpeg -i IN -c:v libx264 OUT.mp4"
READ_BYTES = 2**18  # bytes per read from a file without a path
MAX_STREAMS = 100  # FFmpeg opens a decoder for each one, which may take megabytes

open_file = partial(open_regular, expected="a video file")


def require_av(name: str) -> Any:
    try:
        import av  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImageError(
            "a video, which needs PyAV",
            name=name,
            remedy=install_remedy("video"),
            code="no-pyav",
        ) from None
    return av


def decoder_name() -> str | None:
    """Return PyAV's name and version, or None if PyAV is not installed."""
    try:
        return f"PyAV {version('av')}"
    except PackageNotFoundError:
        return None


class Window(io.RawIOBase):
    """Present a byte range of an open file, such as a tar member, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        wanted = min(len(buffer), max(0, self._size - self._at))
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Opener:
    """Check a video once, and open a new PyAV container for each call of `open`."""

    def __init__(self, source: str | bytes | BinaryIO, name: str, limits: VideoLimits) -> None:
        require_av(name)
        self.name, self.limits = name, limits
        self._source: Any = source
        if isinstance(source, str):
            with open_file(source, name) as file:
                self._container = self._check(file, os.fstat(file.fileno()).st_size)
            self._source = "file:" + os.path.abspath(source)  # prevents playlists and addresses
        else:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            self._source, self._container = file, self._check(file, size)

    def open(self) -> Any:
        """Open a new PyAV container, which the caller must close."""
        if not isinstance(self._source, str):
            self._source.seek(0)
        most = {"max_streams": str(MAX_STREAMS + 1)}
        with plain_errors(self.name):
            try:
                container = require_av(self.name).open(
                    self._source, format=self._container, options=most, buffer_size=READ_BYTES
                )
            except MemoryError:  # FFmpeg's error for too many streams in MP4 and AVI
                raise self._too_many_streams("or FFmpeg runs out of memory") from None
            if len(container.streams) > MAX_STREAMS:
                container.close()
                raise self._too_many_streams()
            return container

    def _too_many_streams(self, otherwise: str = "") -> ImageError:
        fact = f"it has more than {MAX_STREAMS} streams"
        return ImageError(
            f"{fact}, {otherwise}" if otherwise else fact,
            name=self.name,
            remedy="copy its video to another file, for example with ffmpeg -i IN -map 0:v:0 "
            "-c copy OUT.mkv",
            code="too-many-streams",
        )

    def _check(self, file: BinaryIO, size: int) -> str:
        check_bytes(size, self.name, self.limits)
        return check_structure(file, size, self.name, self.limits)


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Convert errors of FFmpeg and of the system, and MemoryError, to ImageError."""
    av = require_av(name)
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise too_much_memory(name) from None
    except av.error.DecoderNotFoundError:
        raise _no_decoder(name) from None
    except (av.error.FFmpegError, OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ImageError(
            f"a damaged video ({reason})",
            name=name,
            remedy=f"download the file again, or {CONVERT}",
            code="damaged",
        ) from None


def _no_decoder(name: str, codec: str = "its codec") -> ImageError:
    return ImageError(
        f"this FFmpeg has no decoder for {codec}",
        name=name,
        expected="H.264, HEVC, VP9, AV1 or another codec of PyAV's FFmpeg",
        remedy=CONVERT,
        code="no-decoder",
    )


def video_stream(container: Any, name: str) -> Any:
    """Return the first video stream that is not a cover image."""
    streams = [s for s in container.streams if s.type == "video"]
    av = require_av(name)
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in streams if not s.disposition & cover]
    if not streams:
        raise ImageError(
            "it has no video, only sound or data",
            name=name,
            remedy="omit the file",
            code="no-video",
        )
    stream = streams[0]
    if stream.codec_context is None:
        raise _no_decoder(name)
    return stream


def check_bytes(size: int, name: str, limits: VideoLimits) -> None:
    if size > limits.max_file_bytes:
        raise ImageError(
            f"{size} bytes",
            name=name,
            expected=f"at most {limits.max_file_bytes}",
            remedy="cut the video, or raise VideoLimits.max_file_bytes in Python",
            code="file-too-large",
        )


def check_size(width: int, height: int, name: str, limits: VideoLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(
            f"its frames are {width}x{height} (width x height)",
            name=name,
            expected="sides above 0",
            remedy=f"download the file again, or {CONVERT}",
            code="zero-side",
        )
    if width * height > limits.max_pixels:
        raise ImageError(
            f"its frames are {width}x{height} = {width * height} pixels",
            name=name,
            expected=f"at most {limits.max_pixels}",
            remedy="make the frames smaller, or raise VideoLimits.max_pixels in Python",
            code="too-many-pixels",
        )
