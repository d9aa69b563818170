"""Make the clips of the video benchmark: files that repeat a few seconds, and links to them."""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from tools.common import ROOT

__all__ = ["make_clips"]

RATE = 30  # frames a second
LOOP_S = 10  # seconds that each file repeats, because encoding a minute takes six times as long
PHOTOGRAPH = ROOT / "tests" / "photographs" / "astronaut.png"


def make_clips(
    folder: Path, clips: int, distinct: int, seconds: int, size: str, codec: str
) -> list[Path]:
    """Make the distinct clips in processes, and link the other clips to them."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise click.BadParameter(f"--size is {size!r}, expected WIDTHxHEIGHT")
    width, height = int(match[1]), int(match[2])
    folder.mkdir()
    make = partial(_make_clip, folder, seconds, width, height, codec)
    with ProcessPoolExecutor(min(distinct, len(os.sched_getaffinity(0)))) as pool:
        made = list(pool.map(make, range(distinct)))
    for index in range(distinct, clips):
        os.link(made[index % distinct], folder / f"{index:04}.mp4")
    return sorted(folder.iterdir())


def _make_clip(folder: Path, seconds: int, width: int, height: int, codec: str, seed: int) -> Path:
    path = folder / f"{seed:04}.mp4"
    once = folder / f"{seed:04}-once.mp4"
    _encode(once, min(seconds, LOOP_S), width, height, codec, seed)
    _repeat(once, path, seconds * RATE)
    once.unlink()
    return path


def _encode(path: Path, seconds: int, width: int, height: int, codec: str, seed: int) -> None:
    """Encode a moving view of a photograph with some noise, so that every frame has motion."""
    import av

    scale = 2 * max(width, height)
    picture = np.asarray(Image.open(PHOTOGRAPH).convert("RGB").resize((scale, scale)))
    random = np.random.default_rng(seed)
    noise = random.integers(0, 12, (height, width + 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": "250"} if codec == "libx264" else {}
        stream.codec_context.thread_count = 1
        for index in range(seconds * RATE):
            phase = index / RATE / 7 + seed
            top = int((scale - height) * (0.5 + 0.5 * np.sin(phase)))
            left = int((scale - width) * (0.5 + 0.5 * np.cos(1.3 * phase)))
            shift = index % 64
            view = picture[top : top + height, left : left + width] // 2
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(view + noise[:, shift : shift + width]), format="rgb24"
            )
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _repeat(once: Path, path: Path, n_frames: int) -> None:
    """Copy a file's packets until there are `n_frames`. Every repetition begins at a key frame."""
    import av

    with av.open(str(path), "w") as target:
        stream: Any = None
        left, begin = n_frames, 0
        while left:
            length = 0
            with av.open(str(once)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = target.add_stream_from_template(video)
                packets: Any = source.demux(video)
                for packet in packets:
                    if packet.dts is None or not left:
                        continue
                    length += packet.duration
                    packet.pts, packet.dts = packet.pts + begin, packet.dts + begin
                    packet.stream = stream
                    target.mux(packet)
                    left -= 1
            begin += length
