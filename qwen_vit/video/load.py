"""Sample a video of any kind, and cut each pair of frames into patches, or keep the frames for a
GPU.

The loader resizes each sampled frame at once, or keeps it for the GPU. It drops all other frames.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ArgumentError, ImageError, Wording, with_options
from qwen_vit.images.frames import FRAMES_IN_A_STEP, Decoded, FrameMemory, FrameRows, FramesForGpu
from qwen_vit.images.image import ArrayLayout, ImageLimits, RgbImage
from qwen_vit.images.load import load_image
from qwen_vit.images.memory import decoding_memory
from qwen_vit.images.patches import Patches
from qwen_vit.images.picture import PIXEL_BYTES
from qwen_vit.video.animation import AnimationFrames, is_animation_format
from qwen_vit.video.container import HEAD_BYTES
from qwen_vit.video.options import Video, VideoLimits, VideoSource
from qwen_vit.video.reader import FileFrames, open_video
from qwen_vit.video.sampling import frame_size, sample_frames, shown_frames
from qwen_vit.video.source import open_file

__all__ = ["LoadedVideo", "VideoTiming", "load_pieces", "load_video"]

RESIZES_AHEAD = 2  # frames for each thread
# the most bytes of a piece's decoded frames that a GPU resizes: a piece of 1080p has 182 MB
GPU_BYTES = 2**28
SHARE = 8  # at most this fraction of the memory for decoding, on a small machine
STACKED_AXES = 4


@dataclass(frozen=True, slots=True)
class VideoTiming:
    """Hold the seconds between time steps of a video's grid, and the sampled frames' times."""

    second_per_grid_t: float
    frame_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LoadedVideo:
    """Hold a video's patches or decoded frames, the frames' original size and times, and notes.

    For a piece, `decoded` and `patches` are the piece's own. The other fields describe the whole
    video.
    """

    decoded: Decoded
    size_px: tuple[int, int]
    timing: VideoTiming
    notes: tuple[str, ...] = ()
    is_last: bool = True  # among the video's pieces

    @property
    def patches(self) -> Patches:
        """Return the patches, after resizing and cutting frames that are only decoded."""
        return self.decoded if isinstance(self.decoded, Patches) else self.decoded.patchify()


class LoadOptions(TypedDict, total=False):
    """Define the options that `load_video` passes to `load_pieces`."""

    limits: VideoLimits | None
    image_limits: ImageLimits | None
    layout: ArrayLayout
    threads: int
    file: BinaryIO | None
    keep: dict[int, NDArray[np.uint8]] | None


def load_video(video: Video, config: ImageConfig, **options: Unpack[LoadOptions]) -> LoadedVideo:
    """Sample, decode, resize and cut a video.

    >>> frames = np.zeros((4, 56, 84, 3), np.uint8)
    >>> loaded = load_video(Video(frames, min_pixels=784), ImageConfig.from_json({}))
    >>> loaded.patches.pixels.shape, loaded.timing.second_per_grid_t
    (torch.Size([48, 1176]), 1.0)
    """
    [loaded] = load_pieces(video, config, **options)
    return loaded


def load_pieces(
    video: Video,
    config: ImageConfig,
    *,
    most: int | None = None,
    limits: VideoLimits | None = None,
    image_limits: ImageLimits | None = None,
    layout: ArrayLayout = "auto",
    threads: int = 1,
    file: BinaryIO | None = None,
    keep: dict[int, NDArray[np.uint8]] | None = None,
    on_gpu: bool = False,
) -> Generator[LoadedVideo, None, None]:
    """Yield a video in pieces of whole time steps, each as patches or as decoded frames.

    A piece has at most `most` patches if one time step fits. The pieces equal those of
    `Patches.split_steps`. Frames that a caller passes are one piece. Without `most`, every video is
    one piece.

    The function reads `file` in place of `video.source`. `threads` threads decode, and the same
    number of other threads resize. If the CPU resizes the frames of a file, `keep` collects the
    resized frames (height, width, 3) by index among the sampled frames. With `on_gpu`, pieces of
    moderate size are decoded frames, which a GPU resizes and cuts.
    """
    limits = VideoLimits() if limits is None else limits
    name = "the video" if video.name is None else video.name
    source = _source(video.source) if file is None else file
    with ExitStack() as stack:
        head = _head(source, name)
        try:
            if head is None:
                yield _from_frames(video, config, name, layout, image_limits or ImageLimits())
                return
            if is_animation_format(head):
                frames = AnimationFrames(_whole(source, name, limits), name, limits)
                yield from _sampled(
                    _Asked(frames, video, config, name), 1, keep, most, on_gpu=on_gpu
                )
                return
            opened = stack.enter_context(open_video(source, name, limits, threads=threads))
            yield from _sampled(
                _Asked(opened, video, config, name), threads, keep, most, on_gpu=on_gpu
            )
        except MemoryError:
            raise ImageError(
                "its sampled frames do not fit into memory",
                name=name,
                remedy=Wording(
                    "lower fps, n_frames or max_pixels",
                    shell="lower --fps, --n-frames or --max-frame-pixels",
                ),
                code="memory",
            ) from None


def _source(source: VideoSource) -> Any:
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source)
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    return source


def _head(source: Any, name: str) -> bytes | None:
    """Return a file's first bytes, or None for frames."""
    if isinstance(source, str):
        with open_file(source, name) as file:
            return file.read(HEAD_BYTES)
    if isinstance(source, bytes):
        return source[:HEAD_BYTES]
    if hasattr(source, "readinto"):
        source.seek(0)
        return bytes(source.read(HEAD_BYTES))
    return None


def _whole(source: Any, name: str, limits: VideoLimits) -> bytes:
    """Return an animation's bytes, at most the smaller of `limits.max_file_bytes` and the default
    of ImageLimits."""
    most = min(limits.max_file_bytes, ImageLimits().max_file_bytes)
    with ExitStack() as stack:
        if isinstance(source, bytes):
            data = source
        else:
            is_path = isinstance(source, str)
            file = stack.enter_context(open_file(source, name)) if is_path else source
            file.seek(0)
            data = file.read(most + 1)
    if len(data) > most:
        raise ImageError(
            f"an animation of more than {most} bytes",
            name=name,
            expected=f"at most {most}",
            remedy="convert the animation to a video",
            code="file-too-large",
        )
    return data


class _Asked(NamedTuple):
    opened: FileFrames | AnimationFrames
    video: Video
    config: ImageConfig
    name: str


def _sampled(
    asked: _Asked,
    threads: int,
    keep: dict[int, NDArray[np.uint8]] | None,
    most: int | None,
    *,
    on_gpu: bool = False,
) -> Iterator[LoadedVideo]:
    """Yield the pieces of a file's frames. Each piece reserves decoding memory until it is
    complete."""
    opened, video, config, name = asked
    indices, rate = sample_frames(opened.timeline, video, name)
    places = shown_frames(indices, opened.seconds, opened.timeline)
    moments = tuple(round(float(opened.seconds[place]), 6) for place in places)
    timing = VideoTiming(config.temporal_patch_size / rate, moments)
    size: tuple[int, int] | None = None
    frames: Iterator[Any] = opened.frames(places)
    with ExitStack() as stack:
        submit, wait = stack.enter_context(_workers(threads))
        left = len(places)
        while left:
            frame = next(frames)
            if size is None:  # the first frame gives the video's orientation
                factor = config.patch_px * config.merge_size
                size = frame_size(*opened.size_px, len(places), video, factor, name)
                in_step = size[0] * size[1] // config.patch_px**2
                steps = left if most is None else max(1, most // in_step)
            n_frames = min(left, steps * FRAMES_IN_A_STEP)
            collected: FrameRows | FramesForGpu
            if on_gpu and _fits_on_gpu(opened.size_px, n_frames):
                collected = FramesForGpu(n_frames, opened.size_px, size, config, name)
            else:
                collected = FrameRows(n_frames, size, config, name, keep, len(places) - left)
            with decoding_memory.hold(collected.n_bytes):
                for at in range(n_frames):
                    frame = next(frames) if at else frame
                    submit(_collect(collected, at, opened, frame))
                wait()
            left -= n_frames
            yield LoadedVideo(collected.done(), opened.size_px, timing, opened.notes, not left)


def _fits_on_gpu(size_px: tuple[int, int], n_frames: int) -> bool:
    n_bytes = PIXEL_BYTES * size_px[0] * size_px[1] * n_frames
    return n_bytes <= min(GPU_BYTES, decoding_memory.total // SHARE)


def _collect(
    collected: FrameRows | FramesForGpu, at: int, opened: FileFrames | AnimationFrames, frame: Any
) -> Callable[[], None]:
    """Return a function that processes a decoded frame, in any thread."""
    if isinstance(collected, FrameRows):
        return partial(_resize_into, collected, at, partial(opened.upright, frame))
    return partial(_keep, collected, at, partial(opened.memory, frame))


def _from_frames(
    video: Video, config: ImageConfig, name: str, layout: ArrayLayout, limits: ImageLimits
) -> LoadedVideo:
    for option in ("n_frames", "start", "end", "max_frames"):
        if getattr(video, option) is not None:
            raise ArgumentError(
                f"{option} does not apply to passed frames",
                name=name,
                expected="this option only with a video file",
                remedy=with_options("select the frames yourself, and pass their rate as {}", "fps"),
            )
    frames = _frame_list(video.source, name)
    rows: FrameRows | None = None
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    for at, frame in enumerate(frames):
        rgb = load_image(frame, name=f"{name}, frame {at}", layout=layout, limits=limits)
        if rows is None:
            size, notes = (rgb.height, rgb.width), rgb.notes
            factor = config.patch_px * config.merge_size
            resized = frame_size(*size, len(frames), video, factor, name)
            rows = FrameRows(len(frames), resized, config, name)
        if (rgb.height, rgb.width) != size:
            raise ImageError(
                f"frame {at} is {rgb.width}x{rgb.height}, and the first frame is "
                f"{size[1]}x{size[0]}",
                name=name,
                expected="frames of one size",
                remedy="resize the frames, or pass the frames as images",
                code="size-changes",
            )
        _resize_into(rows, at, partial(_picture, rgb))
    moments = tuple(round(at / video.fps, 6) for at in range(len(frames)))
    timing = VideoTiming(config.temporal_patch_size / video.fps, moments)
    if rows is None:
        raise ImageError(
            "no frames", name=name, remedy="pass at least one frame", code="video-frames"
        )
    return LoadedVideo(rows.done(), size, timing, notes)


def _picture(rgb: RgbImage) -> Image.Image:
    return rgb.picture


def _frame_list(source: Any, name: str) -> Any:
    is_stack = isinstance(source, (np.ndarray, Tensor)) and source.ndim == STACKED_AXES
    if is_stack or (isinstance(source, Sequence) and not isinstance(source, str)):
        return source
    what = f"of type {type(source).__name__}"
    if isinstance(source, (np.ndarray, Tensor)):
        what = f"an array of shape {tuple(source.shape)}"
    raise ImageError(
        f"{what}, not a video",
        name=name,
        expected="a path, a file's bytes, an array (t, h, w, c), or a list of frames",
        remedy="convert the object to one of these types",
        code="source-type",
    )


def _resize_into(rows: FrameRows, at: int, upright: Callable[[], Image.Image]) -> None:
    rows.resize(at, upright())


def _keep(frames: FramesForGpu, at: int, memory: Callable[[], FrameMemory]) -> None:
    frames.put(at, memory())


@contextmanager
def _workers(
    threads: int,
) -> Iterator[tuple[Callable[[Callable[[], None]], None], Callable[[], None]]]:
    """Yield a function that runs a call in one of the threads, and a function that waits for all.

    Decoding continues while other threads resize earlier frames. With `threads=1`, the caller's
    thread runs each call immediately. Both functions raise the first error of a call.
    """
    if threads == 1:
        yield (lambda call: call()), (lambda: None)
        return
    pending: deque[Future[None]] = deque()
    pool = ThreadPoolExecutor(threads, "qwen-vit-resize")

    def submit(call: Callable[[], None]) -> None:
        pending.append(pool.submit(call))
        if len(pending) > RESIZES_AHEAD * threads:
            pending.popleft().result()

    def wait() -> None:
        while pending:
            pending.popleft().result()

    try:
        yield submit, wait
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
