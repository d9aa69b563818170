"""Read an animated GIF, WebP or PNG as a video with Pillow, and compute the frames' times."""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.formats import DECODERS, decoder
from qwen_vit.images.frames import FrameMemory
from qwen_vit.images.gif import GifFile
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.picture import memory_of
from qwen_vit.images.to_rgb import ORIENTATION_TAG, ORIENTATIONS, check_exif, on_white
from qwen_vit.video.container import too_many_frames
from qwen_vit.video.options import VideoLimits
from qwen_vit.video.sampling import Timeline
from qwen_vit.video.source import check_size

__all__ = ["AnimationFrames", "is_animated", "is_animation_format"]

FORMATS = {b"GIF8": "GIF", b"\x89PNG": "PNG", b"RIFF": "WEBP"}
MIN_MS, USUAL_MS = 11, 100  # browsers show a frame of 10 ms or less for 100 ms


def is_animation_format(head: bytes) -> bool:
    """Return whether a file with these first bytes may be an animated image.

    >>> is_animation_format(b"GIF89a"), is_animation_format(b"\\xff\\xd8\\xff")
    (True, False)
    """
    return _format_of(head) is not None


def is_animated(data: bytes, limits: ImageLimits) -> bool:
    """Return whether Pillow opens the bytes as a GIF, WebP or PNG of several frames."""
    kind = _format_of(data[:12])
    if kind is None:
        return False
    try:
        return bool(getattr(decoder(kind, "", limits)(io.BytesIO(data), ""), "is_animated", False))
    except Exception:  # noqa: BLE001 - plug-ins raise anything; decoding it reports the error
        return False


def _format_of(head: bytes) -> str | None:
    if head.startswith(b"RIFF") and head[8:12] != b"WEBP":
        return None
    return FORMATS.get(head[:4])


def _is_transparent(frame: Image.Image) -> bool:
    # an opaque animation may have an alpha channel: WebP uses it for the difference of two frames
    if not frame.has_transparency_data:
        return False
    return frame.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def _is_turned(image: Image.Image) -> bool:
    try:
        check_exif(image)
        return image.getexif().get(ORIENTATION_TAG) in ORIENTATIONS
    except Exception:  # noqa: BLE001 - damaged metadata raises anything; the pixels are fine
        return False


class AnimationFrames:
    """Read the frames of an animated image, with the interface of `reader.FileFrames`
    except `close`."""

    def __init__(self, data: bytes, name: str, limits: VideoLimits) -> None:
        self._name, self._limits = name, limits
        self._deadline = time.monotonic() + limits.max_decode_s
        self.notes: tuple[str, ...] = ()
        with self._errors():
            kind = _format_of(data[:12]) or ""
            self._image: Any = self._opened(kind, data)
            self._check_size(*self._image.size)
            milliseconds = list(self._durations())
        if _is_turned(self._image):
            self.notes += ("its EXIF orientation is not applied",)
        if len(milliseconds) < 2:
            raise ImageError(
                f"a still image ({kind}), not a video",
                name=name,
                expected="an animation or a video",
                remedy="pass the file to `encode`",
                code="format",
            )
        ends = list(accumulate(milliseconds))
        self.seconds: NDArray[np.float64] = np.array([0.0, *ends[:-1]]) / 1000
        self.timeline = Timeline(len(ends), len(ends) * 1000 / ends[-1])
        width, height = self._image.size  # of the whole canvas, which a later frame may enlarge
        self.size_px: tuple[int, int] = (height, width)

    def _opened(self, kind: str, data: bytes) -> Any:
        if kind == "GIF":
            return GifFile(io.BytesIO(data), "", self._check_size)
        return DECODERS[kind](io.BytesIO(data), "")

    def _check_size(self, width: int, height: int) -> None:
        check_size(width, height, self._name, self._limits)

    def frames(self, places: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames at ascending indices. A repeated index yields its frame again."""
        for place in places:
            with self._errors():
                self._check_clock()
                self._image.seek(place)
                rgba = self._image.convert("RGBA")
            yield on_white(rgba)

    def upright(self, frame: Image.Image) -> Image.Image:
        """Return the frame unchanged: `qwen_vit` ignores an animation's EXIF orientation."""
        return frame

    def memory(self, frame: Image.Image) -> FrameMemory:
        """Return the bytes of a frame: 4 per pixel, row by row."""
        return memory_of(frame)

    def _durations(self) -> Iterator[float]:
        place = 0
        while True:
            try:
                self._image.seek(place)
            except EOFError:
                return
            if place >= self._limits.max_frames:
                raise too_many_frames(place, self._name, self._limits)
            self._image.load()  # Pillow sets a WebP frame's duration here
            if not self.notes and _is_transparent(self._image):
                self.notes = ("alpha composited on white",)
            self._check_clock()
            duration = float(self._image.info.get("duration") or 0)
            yield duration if duration >= MIN_MS else USUAL_MS
            place += 1

    def _check_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise ImageError(
                f"decoding took more than {self._limits.max_decode_s:g} s",
                name=self._name,
                remedy="shorten the animation, or raise VideoLimits.max_decode_s in Python",
                code="slow",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ImageError:
            raise
        except Exception as error:  # noqa: BLE001 - plug-ins raise SyntaxError, struct.error, ...
            raise ImageError(
                f"a damaged animation ({type(error).__name__})",
                name=self._name,
                remedy="download the file again",
                code="damaged",
            ) from None
