"""Make videos for tests with PyAV. Each frame contains its own number, which tests read after
decoding."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "make_clip", "make_video", "number_in", "numbered"]

BITS, LEVELS = 10, 1 << 10  # the number of different frames
SIZE = (96, 64)  # width, height


def numbered(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Return a frame (height, width, 3) whose upper half has the bits of a number as grey bars."""
    width, height = size
    frame = np.full((height, width, 3), 128, np.uint8)
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    for bit in range(BITS):
        frame[: height // 2, edges[bit] : edges[bit + 1]] = 230 if number >> bit & 1 else 25
    # the left side is red, so that a test finds a rotation
    frame[height // 2 :, : width // 4] = (
        200,
        40,
        40,
    )
    return frame


def number_in(frame: NDArray[np.uint8]) -> int:
    """Return the number of a decoded frame."""
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    total = 0
    for bit in range(BITS):
        left, right = edges[bit], edges[bit + 1]
        quarter = max(1, (right - left) // 4)
        part = frame[height // 8 : height // 2 - height // 8, left + quarter : right - quarter, :3]
        total |= int(part.mean() > 128) << bit
    return total


ATTEMPTS = 5  # for one video
Arguments = ParamSpec("Arguments")


def retried(write: Callable[Arguments, str]) -> Callable[Arguments, str]:
    """Write a video again if FFmpeg's muxer fails, which happens at random with libx265."""

    @wraps(write)
    def write_with_retries(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        import av

        for _ in range(ATTEMPTS - 1):
            with suppress(av.error.PatchWelcomeError):
                return write(*args, **kwargs)
        return write(*args, **kwargs)

    return write_with_retries


@retried
def make_video(
    path: Path | str,
    n_frames: int = 60,
    *,
    rate: int | Fraction = 30,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    colour: dict[str, int] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
) -> str:
    """Write a video of numbered frames. `ticks` are their times in `time_base`."""
    import av

    unit = time_base or Fraction(1) / Fraction(rate)
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.options = {"preset": "ultrafast"} if codec == "libx264" else {}
        if codec == "libx265":
            stream.options = {"preset": "ultrafast", "x265-params": "log-level=error"}
        if codec == "libvpx-vp9":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        stream.options = {**stream.options, **(options or {})}
        stream.codec_context.time_base = unit
        for name, value in (colour or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(n_frames):
            frame = av.VideoFrame.from_ndarray(numbered(number % LEVELS, size), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def make_clip(path: Path | str, images: Path) -> None:
    """Write a clip of 6 s for the documentation, with 3 s of the rocket and 3 s of the cat."""
    import av
    from PIL import Image

    pictures = [
        np.asarray(Image.open(images / name).convert("RGB").resize((320, 240)))
        for name in ("rocket.jpg", "chelsea.png")
    ]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 224, 168, "yuv420p"
        stream.options = {"preset": "slow", "crf": "32"}
        for number in range(90):
            left, top = number % 45 * 2, number % 45
            view = pictures[number // 45][top : top + 168, left : left + 224]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(view), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 15)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":  # python -m tests.support.videos writes the clip of the documentation
    make_clip("tests/videos/clip.mp4", Path("tests/photographs"))


def patched(path: str | Path, box: bytes, offset: int, value: bytes) -> Path:
    """Return the file with some bytes after the last box of a kind replaced."""
    path = Path(path)
    data = bytearray(path.read_bytes())
    at = data.rindex(box) + len(box) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path
