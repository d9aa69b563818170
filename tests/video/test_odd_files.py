"""Test that unusual but readable files give the right frames, and a note."""

import os
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.video import source
from qwen_vit.video.load import LoadedVideo, load_video
from qwen_vit.video.options import Video
from tests.support.videos import make_video, number_in, numbered, patched

CONFIG = ImageConfig.from_json({})
SIZE = (96, 64)


def read(path: Path | str, n_frames: int = 4) -> tuple[list[int], LoadedVideo]:
    """Return the numbers of the sampled frames."""
    kept: dict[int, NDArray[np.uint8]] = {}
    video = Video(str(path), n_frames=n_frames, min_pixels=784, max_pixels=56 * 84)
    loaded = load_video(video, CONFIG, keep=kept)
    return [number_in(kept[at]) for at in sorted(kept)], loaded


def write(path: Path, codec: str, pix_fmt: str, streams: int = 1) -> Path:
    """Write 20 frames, in one stream or in several streams with other numbers."""
    import av

    with av.open(str(path), "w") as container:
        made: list[Any] = [container.add_stream(codec, rate=30) for _ in range(streams)]
        for stream in made:
            stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
        for number in range(20):
            for place, stream in enumerate(made):
                frame = av.VideoFrame.from_ndarray(numbered(number + 100 * place), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 30)
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "notes"),
    [
        ("libx264", "yuv444p", "mkv", ()),
        ("libx264", "gray", "mkv", ()),
        ("libx264", "gray10le", "mkv", ("10 bits to 8",)),
        ("ffv1", "gray16le", "mkv", ("16 bits to 8",)),
        ("ffv1", "yuv410p", "mkv", ()),
        ("ffv1", "bgra", "mkv", ("transparency ignored",)),
        ("png", "rgba", "mov", ("transparency ignored",)),
        ("qtrle", "argb", "mov", ("transparency ignored",)),
        ("mjpeg", "yuvj420p", "avi", ()),
        ("rawvideo", "rgb24", "avi", ()),
    ],
)
def test_formats_of_pixels(
    codec: str, pix_fmt: str, suffix: str, notes: tuple[str, ...], tmp_path: Path
) -> None:
    numbers, loaded = read(write(tmp_path / f"a.{suffix}", codec, pix_fmt))
    assert numbers == [0, 6, 13, 19]
    assert loaded.notes == notes


def test_odd_sides(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 20, codec="libvpx-vp9", size=(97, 65))
    numbers, loaded = read(path)
    assert (numbers, loaded.size_px) == ([0, 6, 13, 19], (65, 97))


def test_the_first_of_two_videos_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.mkv", "libx264", "yuv420p", streams=2))[0] == [0, 6, 13, 19]


@pytest.mark.parametrize("first", [-7, 90_000])
def test_times_count_from_the_first_frame(first: int, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", 20, ticks=range(first, first + 20))
    numbers, loaded = read(path)
    assert numbers == [0, 6, 13, 19]
    assert loaded.timing.frame_seconds == (0.0, 0.2, 0.433, 0.633)


def test_a_gap_of_hours_shows_the_frame_before_it(tmp_path: Path) -> None:
    ticks = [*range(10), *range(300_000, 300_010)]
    assert read(make_video(tmp_path / "a.mkv", 20, ticks=ticks))[0] == [0, 9, 9, 9]


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.avi", "a.mkv"])
def test_one_frame(name: str, tmp_path: Path) -> None:
    loaded = load_video(Video(make_video(tmp_path / name, 1)), CONFIG)
    assert loaded.patches.grids[0].t == 1
    assert loaded.timing.frame_seconds == (0.0,)


@pytest.mark.parametrize(("box", "offset"), [(b"mdhd", 16), (b"stts", 12), (b"stts", 8)])
def test_a_header_of_zero_duration_gives_all_frames(
    box: bytes, offset: int, tmp_path: Path
) -> None:
    """Change the duration of the track, the duration of each frame, and the number of durations."""
    path = make_video(tmp_path / "a.mp4", 20, options={"g": "10"})
    assert read(patched(path, box, offset, bytes(4)))[0] == [0, 6, 13, 19]


def test_a_video_without_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 20)
    # This offset of the frames is after the file's end.
    with pytest.raises(ImageError, match="without frames") as caught:
        read(patched(path, b"stco", 8, b"\x7f\xff\xff\xff"))
    assert caught.value.code == "no-video"


def test_without_an_index(tmp_path: Path) -> None:
    live = make_video(tmp_path / "a.mkv", 60, options={"g": "10"}, container_options={"live": "1"})
    assert read(live)[0] == [0, 20, 39, 59]


@pytest.mark.parametrize(("name", "container"), [("a.ts", {}), ("a.mkv", {"live": "1"})])
def test_a_stream_of_no_declared_length_that_ends_in_a_group(
    name: str, container: dict[str, str], tmp_path: Path
) -> None:
    """No header declares more frames, so the video has the existing frames."""
    path = make_video(tmp_path / name, 60, options={"g": "30"}, container_options=container)
    os.truncate(path, int(os.path.getsize(path) * 0.9))
    numbers, _ = read(path)
    assert numbers[0] == 0
    assert 45 < numbers[-1] < 59


@pytest.mark.parametrize(
    ("matrix", "notes"),
    [
        (
            (46_341, 46_341, 0, -46_341, 46_341),
            ("its rotation is not a multiple of 90 degrees, and is not applied",),
        ),
        ((0, 0, 0, 0, 0), ()),
        ((131_072, 0, 0, 0, 65_536), ()),
    ],
    ids=["45-degrees", "zeros", "stretched"],
)
def test_display_matrices_that_are_no_quarter_turn(
    matrix: tuple[int, ...], notes: tuple[str, ...], tmp_path: Path
) -> None:
    path = make_video(tmp_path / "a.mp4", 10, rotation=90)
    values = struct.pack(">9i", *matrix, 0, 0, 0, 1 << 30)
    numbers, loaded = read(patched(path, b"tkhd", 40, values), n_frames=2)
    assert numbers == [0, 9]
    assert (loaded.notes, loaded.size_px) == (notes, (64, 96))


@pytest.mark.parametrize("with_video", [True, False])
def test_a_cover_picture_is_no_video(with_video: bool, tmp_path: Path) -> None:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("ffmpeg is not installed")
    cover, path = tmp_path / "cover.jpg", tmp_path / "a.mp4"
    Image.fromarray(numbered(5)).save(cover)
    other = ["-i", make_video(tmp_path / "v.mp4", 20)]
    if not with_video:
        other = ["-f", "lavfi", "-i", "anullsrc", "-t", "1"]
    more = ["-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
    command = [ffmpeg, "-v", "error", "-i", str(cover), *other, *more, str(path)]
    subprocess.run(command, check=True)
    if with_video:
        assert read(path)[0] == [0, 6, 13, 19]
        return
    with pytest.raises(ImageError, match="only sound or data") as caught:
        read(path)
    assert caught.value.code == "no-video"


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi", "mov", "ts"])
def test_a_file_of_more_streams_than_the_limit(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg opens a decoder for each stream: 1,000 streams in 0.6 MB took 2 GB of memory."""
    path = write(tmp_path / f"a.{suffix}", "mpeg4", "yuv420p", streams=6)
    monkeypatch.setattr(source, "MAX_STREAMS", 6)
    read(path)
    monkeypatch.setattr(source, "MAX_STREAMS", 5)
    with pytest.raises(ImageError, match="more than 5 streams") as caught:
        read(path)
    assert caught.value.code == "too-many-streams"
    assert "-map 0:v:0" in str(caught.value)
