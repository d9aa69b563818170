"""Compute which frames of a video to sample, and their size, from numbers alone.

Sources: qwen-vl-utils 0.0.14, vision_process.py (smart_nframes, calculate_video_frame_range,
fetch_video); transformers 5.23, models/qwen2_vl/video_processing_qwen2_vl.py (sample_frames,
resize). Every expression keeps the sources' order of operations, because the sampled frame may
depend on the last bit of a float. Like both libraries, this module computes the positions in
float32 with torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_vit.errors import ArgumentError, ImageError, Wording, with_options
from qwen_vit.images.frames import FRAMES_IN_A_STEP
from qwen_vit.images.patches import check_sides, smart_resize
from qwen_vit.video.options import VideoOptions

__all__ = [
    "FRAMES_IN_A_STEP", "MAX_FRAMES", "Timeline", "frame_size", "pixel_limits", "sample_frames",
    "shown_frames",
]  # fmt: skip

MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_TOKENS, MAX_TOKENS = 128, 768  # tokens of a pair of frames
TOTAL_TOKENS = 128_000 * 0.9  # tokens of a video
FRACTION_ABOVE_MIN = 1.05  # minimum of max_pixels / min_pixels
MAX_EARLY_S = 0.02  # at a varying rate, a frame due within this time counts as shown


@dataclass(frozen=True, slots=True)
class Timeline:
    """Describe a video for the samplers: `n_frames` at the average `rate` per second."""

    n_frames: int
    rate: float

    def __post_init__(self) -> None:
        if self.n_frames < 1 or not (math.isfinite(self.rate) and self.rate > 0):
            raise ArgumentError(
                f"{self.n_frames} frames at {self.rate} per second", expected="numbers above 0"
            )


def sample_frames(timeline: Timeline, options: VideoOptions, name: str) -> tuple[list[int], float]:
    """Return the indices of the frames to sample, and the resulting rate.

    >>> sample_frames(Timeline(300, 30.0), VideoOptions(n_frames=4), "a.mp4")
    ([0, 100, 199, 299], 0.4)

    A video of one frame gives one index, and the loader uses this frame twice. qwen-vl-utils and
    transformers reject such a video.
    """
    first, last = _frame_range(timeline, options, name)
    count = last - first + 1
    if timeline.n_frames == 1:
        return [0], timeline.rate
    if options.sampling == "qwen":
        n = _qwen_count(count, timeline.rate, options)
        _check_count(n, count, name)
        positions = torch.linspace(first, last, n, dtype=torch.float32, device="cpu")
        taken: list[int] = positions.round().long().tolist()
        return taken, n / max(count, 1e-6) * timeline.rate
    n = _transformers_count(count, timeline.rate, options)
    _check_count(n, count, name)
    steps = torch.arange(0, count, count / n, dtype=torch.float32, device="cpu").int()
    taken = [first + index for index in steps.tolist()]
    return taken, len(taken) / count * timeline.rate


def shown_frames(
    indices: Sequence[int], seconds: NDArray[np.float64], timeline: Timeline
) -> list[int]:
    """Convert a sampler's indices to frame indices. `seconds` are the frames' times.

    >>> slides = np.array([0.0, 20.0, 21.0])  # three slides in 24 s
    >>> shown_frames([0, 1, 2], slides, Timeline(3, 3 / 24))
    [0, 0, 0]

    At a constant rate, even with jitter, the frame index equals the sampler's index. If the rate
    varies, the function converts a sampler's index to a time, and takes the frame that is visible
    at that time.
    """
    moments = np.arange(timeline.n_frames) / timeline.rate
    if np.all(np.abs(seconds - moments) < 0.5 / timeline.rate):
        return list(indices)
    due = np.asarray(indices) / timeline.rate + min(0.5 / timeline.rate, MAX_EARLY_S)
    found = np.searchsorted(seconds, due, side="right") - 1
    return [int(place) for place in found.clip(0, timeline.n_frames - 1)]


def _frame_range(timeline: Timeline, options: VideoOptions, name: str) -> tuple[int, int]:
    first, last = 0, timeline.n_frames - 1
    if not options.is_part:
        return first, last
    duration = timeline.n_frames / timeline.rate
    if options.start is not None:
        first = math.ceil(max(0.0, min(options.start, duration)) * timeline.rate)
    if options.end is not None:
        last = min(math.floor(max(0.0, min(options.end, duration)) * timeline.rate), last)
    if first >= last:
        raise ImageError(
            f"fewer than two of its {timeline.n_frames} frames ({duration:.6g} s) are between "
            f"{options.start or 0} s and "
            + ("its end" if options.end is None else f"{options.end} s"),
            name=name,
            expected="a part of at least two frames",
            remedy=with_options("pass another {} or {}", "start", "end"),
            code="video-range",
        )
    return first, last


def _qwen_count(count: int, rate: float, options: VideoOptions) -> int:
    if options.n_frames is not None:
        return round(options.n_frames / FRAMES_IN_A_STEP) * FRAMES_IN_A_STEP
    most = min(MAX_FRAMES, count) if options.max_frames is None else options.max_frames
    n: float = count / rate * options.fps
    n = min(min(max(n, MIN_FRAMES), _floor_even(most)), count)
    return _floor_even(n)


def _transformers_count(count: int, rate: float, options: VideoOptions) -> int:
    if options.n_frames is not None:
        return round(options.n_frames / FRAMES_IN_A_STEP) * FRAMES_IN_A_STEP
    most = _floor_even(min(options.max_frames or MAX_FRAMES, count))
    n: float = count / rate * options.fps
    return _floor_even(min(max(n, MIN_FRAMES), most, count))


def _floor_even(number: float) -> int:
    return math.floor(number / FRAMES_IN_A_STEP) * FRAMES_IN_A_STEP


def _check_count(n: int, count: int, name: str) -> None:
    if not FRAMES_IN_A_STEP <= n <= count:
        raise ImageError(
            f"{n} of {count} frames are requested",
            name=name,
            expected=f"from {FRAMES_IN_A_STEP} to {count}",
            remedy=with_options("pass another {}, or {} instead", "n_frames", "fps"),
            code="video-frames",
        )


def pixel_limits(n_frames: int, options: VideoOptions, factor: int) -> tuple[int, float]:
    """Return the minimum and maximum height x width of a frame after resizing.

    >>> pixel_limits(16, VideoOptions(), 28), pixel_limits(768, VideoOptions(), 28)
    ((100352, 602112), (100352, 235200.0))

    `n_frames` is the number of sampled frames. `factor` is a merged token's side in pixels.
    qwen-vl-utils bounds a whole video by 115,200 tokens, unless the maximum per frame would then be
    less than 1.05 times the minimum. transformers has no such bound.
    """
    token = factor * factor
    least = MIN_TOKENS * token if options.min_pixels is None else options.min_pixels
    if options.sampling == "transformers":
        largest: float = MAX_TOKENS * token if options.max_pixels is None else options.max_pixels
    else:
        share = TOTAL_TOKENS * token / n_frames * FRAMES_IN_A_STEP
        largest = max(min(MAX_TOKENS * token, share), int(least * FRACTION_ABOVE_MIN))
        if options.max_pixels is not None:
            largest = min(options.max_pixels, largest)
    if largest < max(least, token):
        raise ArgumentError(
            Wording(
                f"min_pixels is {least} and max_pixels {largest:g} for {n_frames} frames",
                shell=f"--min-frame-pixels is {least} and --max-frame-pixels {largest:g} for "
                f"{n_frames} frames",
            ),
            expected=f"a maximum of at least the minimum, and of at least {token} (one token)",
            remedy=Wording(
                "lower min_pixels, or raise max_pixels",
                shell="lower --min-frame-pixels, or raise --max-frame-pixels",
            ),
        )
    return least, largest


def frame_size(
    height: int, width: int, n_frames: int, options: VideoOptions, factor: int, name: str
) -> tuple[int, int]:
    """Return every frame's height and width after resizing.

    >>> frame_size(720, 1280, 16, VideoOptions(), 28, "a.mp4")
    (560, 1008)
    """
    least, largest = pixel_limits(n_frames, options, factor)
    if options.sampling == "qwen":  # it rounds short sides up to one token before comparing
        check_sides(height, width, name)
        sides = [max(1, round(side / factor)) * factor for side in (height, width)]
        if least <= math.prod(sides) <= largest:
            return sides[0], sides[1]
        if math.prod(sides) > largest:
            shrink = math.sqrt(height * width / largest)
            sides = [max(1, math.floor(side / shrink / factor)) for side in (height, width)]
            return sides[0] * factor, sides[1] * factor
    return smart_resize(
        height, width, factor=factor, min_pixels=least, max_pixels=largest, name=name
    )
