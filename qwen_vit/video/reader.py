"""Read chosen frames of a video file by presentation time, with FFmpeg through PyAV.

A pass over the packets, without decoding, finds every frame's time and the key frames. The reader
decodes only the parts with requested frames, each part from the preceding key frame. If packets do
not identify the frames, the reader decodes and counts all frames from the first.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.frames import FrameMemory
from qwen_vit.images.picture import PIXEL_BYTES, memory_of
from qwen_vit.video.container import too_many_frames
from qwen_vit.video.options import VideoLimits
from qwen_vit.video.sampling import Timeline
from qwen_vit.video.source import (
    CONVERT,
    TAKE_A_PART,
    Opener,
    check_size,
    plain_errors,
    video_stream,
)

__all__ = ["FileFrames", "VideoHeader", "open_video", "read_header"]

# Signs of the display matrix's (a, b, c, d) -> the operation that makes a frame upright.
UPRIGHT = {
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
TURNED = {
    Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
}  # fmt: skip
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics
WHOLE_WIDTH = 16  # pixels that swscale converts at a time
SEEK_WORTH = 32  # with more unwanted frames than this before the next frame, a seek is cheaper
CHECK_EVERY = 1_024  # packets between checks of the clock


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Hold the header's frame rate, number of frames, and frame size before any rotation."""

    timeline: Timeline
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class _Index:
    """Hold every frame's time, and the key frames where decoding can begin.

    `ticks` are the frames' timestamps in order. `keys` are the key frames' timestamps. `by_count`
    is True if timestamps do not identify frames, so that the reader counts frames from the first.
    """

    ticks: NDArray[np.int64]
    keys: NDArray[np.int64]
    end_tick: float
    by_count: bool = False


class FileFrames:
    """Read the frames of an open video file.

    `timeline` is the samplers' input. `seconds` gives each frame's time from the first frame.
    """

    def __init__(self, opener: Opener, deadline: float, threads: int) -> None:
        self._opener, self._name, self._limits = opener, opener.name, opener.limits
        self._deadline, self._threads = deadline, threads
        self.notes: tuple[str, ...] = ()
        self._size: tuple[int, int] | None = None
        self._turn: Image.Transpose | None = None
        self._container: Any = None
        self._restart()
        self._index = self._scan()
        unit = float(self._stream.time_base)
        ticks = self._index.ticks
        self.seconds: NDArray[np.float64] = (ticks - ticks[0]) * unit
        duration = (self._index.end_tick - int(ticks[0])) * unit
        self.timeline = Timeline(len(ticks), self._rate(len(ticks), duration))

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    @property
    def size_px(self) -> tuple[int, int]:
        """Return a frame's (height, width): upright after the first decoded frame, and before that
        as in the header."""
        if self._size is None:
            return self._codec.height, self._codec.width
        return self._size

    def frames(self, places: Sequence[int]) -> Iterator[Any]:
        """Yield FFmpeg's frames at ascending indices. A repeated index yields its frame again."""
        wanted = sorted(set(places))
        again = {place: places.count(place) for place in wanted}
        found = self._by_count(wanted) if self._index.by_count else self._by_time(wanted)
        for place, frame in zip(wanted, found, strict=True):
            self._check_frame(frame)
            for _ in range(again[place]):
                yield frame

    def upright(self, frame: Any) -> Image.Image:
        """Convert a decoded frame to an upright image of mode RGB or RGBX. Any thread may call
        the method."""
        size = (frame.width, frame.height)
        # swscale's threads write past row ends into each other's rows: 4 pixels were wrong
        if frame.width % WHOLE_WIDTH:  # as 4 bytes a pixel, the last columns could be random
            plane = frame.reformat(format="rgb24", threads=1).planes[0]
            picture = Image.frombuffer("RGB", size, plane, "raw", "RGB", plane.line_size, 1)
        else:  # 4 bytes a pixel, as in Pillow's memory: this avoids a copy under the GIL
            plane = frame.reformat(format="rgb0", threads=1).planes[0]
            picture = Image.frombuffer("RGBX", size, plane, "raw", "RGBX", plane.line_size, 1)
        return picture if self._turn is None else picture.transpose(self._turn)

    def memory(self, frame: Any) -> FrameMemory:
        """Turn a decoded frame upright, and return its bytes, 4 per pixel, row by row. Any thread
        may call the method."""
        if self._turn is not None or frame.width % WHOLE_WIDTH:
            return memory_of(self.upright(frame))
        plane = frame.reformat(format="rgb0", threads=1).planes[0]
        if plane.line_size != PIXEL_BYTES * frame.width:
            return memory_of(self.upright(frame))
        return memoryview(plane)[: plane.line_size * frame.height], plane

    # -- the pass over the packets

    def _scan(self) -> _Index:
        ticks: list[int] = []
        keys: list[int] = []
        end, complete = 0.0, True
        last: tuple[int, int] | None = None
        for count, packet in enumerate(self._packets()):
            if count % CHECK_EVERY == 0:
                self._check_clock()
            if count >= self._limits.max_frames:
                raise too_many_frames(count + 1, self._name, self._limits)
            if packet.is_corrupt:
                raise self._damaged("its data ends early", "truncated")
            if count == 0 and packet.has_sidedata("encryption_info"):
                raise ImageError(
                    "encrypted", name=self._name, remedy="decrypt the video first", code="encrypted"
                )
            tick = packet.pts if packet.pts is not None else packet.dts
            complete = complete and packet.pts is not None
            if tick is None:
                tick = (ticks[-1] if ticks else -1) + 1
            if packet.is_keyframe:
                keys.append(tick)
            if packet.is_discard:  # an edit list hides it
                continue
            ticks.append(tick)
            if last is None or tick >= last[0]:
                last = tick, packet.duration or 0
        if not ticks or last is None:
            raise ImageError(
                "it has a video stream without frames",
                name=self._name,
                remedy="record or download the video again",
                code="no-video",
            )
        is_guessed = self._container.format.name == "avi" and bool(self._codec.has_b_frames)
        distinct = len(set(ticks)) == len(ticks)
        if not complete or is_guessed or not distinct:
            return self._scan_by_count(ticks)
        ordered = np.sort(np.asarray(ticks, np.int64))
        step = last[1] or ((ordered[-1] - ordered[0]) / max(1, len(ordered) - 1) or self._tick())
        end = float(ordered[-1] + step)
        return _Index(ordered, np.sort(np.asarray(keys, np.int64)), end)

    def _scan_by_count(self, ticks: list[int]) -> _Index:
        """Count frames by decoding, because packets do not identify them, and sort the times."""
        count = sum(1 for _ in self._decoded(seek_to=None))
        if not count:
            raise self._damaged("none of its frames can be decoded")
        ordered = np.sort(np.asarray(ticks, np.int64))
        if len(ordered) != count or len(np.unique(ordered)) < count:
            step = self._tick()
            ordered = np.rint(np.arange(count) * step).astype(np.int64)
        step = (ordered[-1] - ordered[0]) / max(1, count - 1) or self._tick()
        return _Index(ordered, ordered[:1], float(ordered[-1] + step), by_count=True)

    def _tick(self) -> float:
        """Return the number of ticks between two frames, at 25 per second if no rate is known."""
        rate = self._stream.average_rate or self._stream.guessed_rate or 25
        return float(1 / (rate * self._stream.time_base))

    def _rate(self, n_frames: int, duration: float) -> float:
        """Return the header's frame rate if it fits the frames' times, else the mean rate.

        The header's rate is an exact fraction. The mean rate is a float, and an error in its last
        bit could drop two frames.
        """
        header = self._stream.average_rate
        if header and abs(n_frames / float(header) - duration) <= 1 / float(header):
            return float(header)
        if duration <= 0:
            return float(header) if header else 1.0
        return n_frames / duration

    # -- decoding

    def _by_time(self, places: Sequence[int]) -> Iterator[Any]:
        ticks, keys = self._index.ticks, self._index.keys
        wanted = {int(ticks[place]) for place in places}
        decoded: Iterator[Any] | None = None
        shown = -1  # index of the last decoded frame
        for place in places:
            target = int(ticks[place])
            key = bisect_right(keys, target) - 1
            key_tick = int(keys[max(0, key)]) if len(keys) else target
            key_place = int(np.searchsorted(ticks, key_tick))
            if decoded is None or key_place > shown + SEEK_WORTH:
                decoded = self._decoded(seek_to=key_tick, wanted=wanted)
            frame = self._find(decoded, target)
            if frame is None:  # the demuxer did not seek back far enough
                decoded = self._decoded(seek_to=None, wanted=wanted)
                frame = self._find(decoded, target)
            if frame is None:
                second = float(self.seconds[place])
                raise self._damaged(f"its frame at {second:.3f} s cannot be decoded")
            shown = place
            yield frame

    def _by_count(self, places: Sequence[int]) -> Iterator[Any]:
        left = list(reversed(places))
        for count, frame in enumerate(self._decoded(seek_to=None)):
            if left and count == left[-1]:
                left.pop()
                yield frame
            if not left:
                return
        raise self._damaged("decoding it again gives fewer frames")

    def _find(self, decoded: Iterator[Any], target: int) -> Any:
        for frame in decoded:
            if frame.pts == target:
                return frame
            if frame.pts is not None and frame.pts > target:
                return None
        return None

    def _packets(self) -> Iterator[Any]:
        with self._errors():
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet

    def _restart(self) -> None:
        """Open or reopen the file, because not every container can seek to its beginning."""
        self.close()
        self._container = self._opener.open()
        self._stream = video_stream(self._container, self._name)
        self._codec = self._stream.codec_context
        self._codec.thread_count, self._codec.thread_type = self._threads, "AUTO"
        self._codec.options = {**self._codec.options, "max_pixels": str(self._limits.max_pixels)}
        check_size(self._codec.width, self._codec.height, self._name, self._limits)

    def _decoded(self, *, seek_to: int | None, wanted: set[int] | None = None) -> Iterator[Any]:
        """Yield frames in presentation order, starting at a key frame or at the beginning."""
        with self._errors():
            if seek_to is None:
                self._restart()
            else:
                self._container.seek(seek_to, stream=self._stream)
            for packet in self._container.demux(self._stream):
                # no other frame depends on a non-reference frame
                is_needed = wanted is None or not packet.size or packet.pts in wanted
                self._codec.skip_frame = "DEFAULT" if is_needed else "NONREF"
                yield from packet.decode()
                self._check_clock()

    def _check_frame(self, frame: Any) -> None:
        if frame.is_corrupt:
            raise self._damaged("a frame is damaged")
        check_size(frame.width, frame.height, self._name, self._limits)
        if self._size is None:
            self._turn, is_odd = _turn_of(frame)
        size = (frame.width, frame.height) if self._turn in TURNED else (frame.height, frame.width)
        if self._size is None:
            self._size = size
            self.notes = _notes(frame, self._turn)
            if is_odd:
                self.notes += ("its rotation is not a multiple of 90 degrees, and is not applied",)
        elif size != self._size:
            (height, width), (new_height, new_width) = self._size, size
            raise ImageError(
                f"its frames change from {width}x{height} to {new_width}x{new_height}",
                name=self._name,
                expected="frames of one size",
                remedy=CONVERT,
                code="size-changes",
            )

    def _check_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise ImageError(
                f"reading and decoding took more than {self._limits.max_decode_s:g} s",
                name=self._name,
                remedy=TAKE_A_PART,
                code="slow",
            )

    def _damaged(self, fact: str, code: str = "damaged") -> ImageError:
        return ImageError(
            fact, name=self._name, remedy=f"download the file again, or {CONVERT}", code=code
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with plain_errors(self._name):
            yield


@contextmanager
def open_video(
    source: str | bytes | BinaryIO, name: str, limits: VideoLimits, *, threads: int = 1
) -> Iterator[FileFrames]:
    """Open a video from a path, bytes or a seekable file."""
    deadline = time.monotonic() + limits.max_decode_s
    frames = FileFrames(Opener(source, name, limits), deadline, threads)
    try:
        yield frames
    finally:
        frames.close()


def read_header(source: str | BinaryIO, name: str, limits: VideoLimits) -> VideoHeader:
    """Read the header alone. If it has no number of frames, estimate the number from the
    duration."""
    with Opener(source, name, limits).open() as container:
        stream = video_stream(container, name)
        codec = stream.codec_context
        check_size(codec.width, codec.height, name, limits)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        n_frames = stream.frames
        if not n_frames:
            ticks = stream.duration
            duration = float(ticks * stream.time_base) if ticks else (container.duration or 0) / 1e6
            n_frames = round(duration * rate)
        return VideoHeader(Timeline(max(1, n_frames), rate), codec.height, codec.width)


def _turn_of(frame: Any) -> tuple[Image.Transpose | None, bool]:
    """Return the transposition that turns a frame upright, and whether the display matrix is
    unsupported.

    The function reads the matrix from a small copy of the frame. PyAV's side data and frame refer
    to each other, so only Python's garbage collector would free the pair.
    """
    data = frame.reformat(width=16, height=16).side_data.get("DISPLAYMATRIX")
    if data is None:
        return None, False
    matrix = np.frombuffer(bytes(data), np.int32)
    a, b, c, d = (int(np.sign(np.rint(matrix[at] / 65_536))) for at in (0, 1, 3, 4))
    turn = UPRIGHT.get((a, b, c, d))
    return turn, turn is None and (a, b, c, d) not in ((1, 0, 0, 1), (0, 0, 0, 0))


def _notes(frame: Any, turn: Image.Transpose | None) -> tuple[str, ...]:
    notes = []
    if turn is not None:
        notes.append(f"{turn.name.lower().replace('_', ' ')} applied")
    depth = max(component.bits for component in frame.format.components)
    if depth > 8:
        notes.append(f"{depth} bits to 8")
    if any(component.is_alpha for component in frame.format.components):
        notes.append("transparency ignored")
    hdr = HDR.get(int(frame.color_trc or 0))
    if hdr is not None:
        notes.append(f"HDR ({hdr}) without tone mapping")
    return tuple(notes)
