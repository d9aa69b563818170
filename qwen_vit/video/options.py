"""Define the values that a caller may pass as a video, the sampling options and the limits on
videos."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeAlias, TypedDict, get_args

from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.arguments import check_choice, short_repr
from qwen_vit.common.strict_json import is_integer, is_number
from qwen_vit.errors import ArgumentError, Wording, with_options
from qwen_vit.images.image import ImageSource

__all__ = [
    "Sampling", "Video", "VideoLimits", "VideoOptions", "VideoSettings", "VideoSource",
]  # fmt: skip

DEFAULT_FPS = 2.0
Sampling = Literal["qwen", "transformers"]
VideoSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[Any] | Tensor
    | Sequence[ImageSource]
)  # fmt: skip


class VideoSettings(TypedDict, total=False):
    """Define the fields of `VideoOptions` as keyword arguments."""

    fps: float
    n_frames: int | None
    start: float | None
    end: float | None
    max_frames: int | None
    min_pixels: int | None
    max_pixels: int | None
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoOptions:
    """Choose which frames of a video to encode, and their size.

    >>> VideoOptions(fps=1.0, start=10.0, end=70.0).sampling
    'qwen'

    Attributes:
        fps: the number of frames to sample per second. For frames that a caller passes, the
            number of frames per second.
        n_frames: the number of frames to sample, rounded to an even number. `n_frames` cannot be
            combined with `max_frames` or a non-default `fps`.
        start: the start of sampling, in seconds from the first frame.
        end: the end of sampling, in seconds from the first frame.
        max_frames: the maximum number of frames with `fps`. None means 768.
        min_pixels: the minimum height x width of a frame after resizing. None means 100,352.
        max_pixels: the maximum height x width of a frame after resizing. None means 602,112. With
            "qwen", the maximum for a long video is smaller.
        sampling: "qwen" samples and resizes like qwen-vl-utils 0.0.14. "transformers" samples and
            resizes like transformers' Qwen2VLVideoProcessor.

    Raises:
        ArgumentError: `fps` is not a number above 0, a number of frames is below 2, a pixel limit
            is below 1, or a time is below 0. `end` is not after `start`, a value has the wrong
            type, or `sampling` is unknown. `n_frames` is set together with `max_frames` or a
            non-default `fps`.
    """

    fps: float = DEFAULT_FPS
    n_frames: int | None = None
    start: float | None = None
    end: float | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    sampling: Sampling = "qwen"

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, get_args(Sampling))
        if not (is_number(self.fps) and math.isfinite(self.fps) and self.fps > 0):
            raise _wrong("fps", self.fps, "a number above 0")
        for name in ("n_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= 2):
                raise _wrong(name, value, "a whole number of at least 2")
        for name, default in (("fps", DEFAULT_FPS), ("max_frames", None)):
            if self.n_frames is not None and getattr(self, name) != default:
                words = with_options("{} works only without {}", "n_frames", name)
                raise ArgumentError(words, remedy="omit one of the two")
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= 1):
                flag = f"--{name[:3]}-frame-pixels"
                raise _wrong(name, value, "a whole number above 0", flag)
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and math.isfinite(value) and value >= 0):
                raise _wrong(name, value, "a number of seconds of at least 0")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ArgumentError(
                with_options(
                    "{} is {begin} s and {} {stop} s",
                    "start",
                    "end",
                    begin=self.start,
                    stop=self.end,
                ),
                expected="an end after the start",
            )

    @property
    def changed(self) -> Wording:
        """Return the names of the options whose values differ from the defaults, or an empty
        string.

        >>> print(VideoOptions(fps=1.0, max_pixels=9).changed.shell)
        --fps, --max-frame-pixels
        """
        default = VideoOptions()
        names = [
            each.name
            for each in fields(default)
            if getattr(self, each.name) != getattr(default, each.name)
        ]
        flags = [
            f"--{name.replace('_pixels', '_frame_pixels').replace('_', '-')}" for name in names
        ]
        return Wording(f"video ({', '.join(names)})" if names else "", shell=", ".join(flags))

    @property
    def is_part(self) -> bool:
        """Return whether `start` or `end` selects a part of the video."""
        return self.start is not None or self.end is not None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Video(VideoOptions):
    """Pair a video with options for `encode` and `encode_video`.

    >>> Video("clip.mp4", fps=1.0).name
    'clip.mp4'

    The other attributes are those of `VideoOptions`.

    Attributes:
        source: a path, the bytes of a file, an array or tensor of frames (t, h, w, c), or a list of
            images: PIL images, arrays, or image paths. The loader uses all frames that a caller
            passes. For these frames, `fps`, the pixel limits and `sampling` apply, and `sampling`
            determines only the resizing. `n_frames`, `start`, `end` and `max_frames` raise
            ArgumentError. The frames of an animated GIF, WebP or PNG become the video's frames.
        name: the video's name in messages, which becomes `VideoFeatures.id`.
    """

    source: VideoSource = field(kw_only=False)
    name: str | None = None

    def __post_init__(self) -> None:
        VideoOptions.__post_init__(self)
        if self.name is None and isinstance(self.source, (str, os.PathLike)):
            object.__setattr__(self, "name", os.fsdecode(self.source))

    @classmethod
    def of(cls, source: VideoSource, options: VideoOptions, name: str | None = None) -> Self:
        """Create a video with the options of a `VideoOptions` object.

        >>> Video.of("clip.mp4", VideoOptions(fps=1.0)).fps
        1.0

        Args:
            source: as `Video.source`.
            options: the options of the video.
            name: as `Video.name`.

        Returns:
            A video with these options.
        """
        return cls(source, name=name, **{f.name: getattr(options, f.name) for f in fields(options)})

    def named(self, name: str) -> Self:
        """Return this video with `name`, unless it already has a name.

        Args:
            name: the name for a video without one.

        Returns:
            This video if it has a name, or else a copy with `name`.
        """
        return self if self.name is not None else replace(self, name=name)


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Set limits on one video's file, frames and decoding time.

    >>> VideoLimits(max_decode_s=60).max_frames
    10000000

    Attributes:
        max_pixels: the maximum height x width of a frame before resizing.
        max_file_bytes: the maximum size of the file in bytes.
        max_frames: the maximum number of frames in the file, before sampling.
        max_decode_s: the maximum time for reading and decoding, in seconds.

    Raises:
        ArgumentError: A limit is not a whole number above 0. `max_decode_s` may be a fraction.
    """

    max_pixels: int = 8_192 * 8_192
    max_file_bytes: int = 2**38
    max_frames: int = 10_000_000
    max_decode_s: float = 1_800.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            may_be_fraction = each.name == "max_decode_s"
            is_right = is_integer(value) or (may_be_fraction and is_number(value))
            if not is_right or value <= 0:
                kind = "number" if may_be_fraction else "whole number"
                raise ArgumentError(
                    f"{each.name} is {short_repr(value)}", expected=f"a {kind} above 0"
                )


def _wrong(name: str, value: object, expected: str, flag: str = "") -> ArgumentError:
    flag = flag or f"--{name.replace('_', '-')}"
    fact = Wording(f"{name} is {short_repr(value)}", shell=f"{flag} is {short_repr(value)}")
    return ArgumentError(fact, expected=expected)
