"""Test that files of every kind give the right frames at the right times."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.video.options import VideoLimits, VideoOptions
from qwen_vit.video.reader import FileFrames, open_video, read_header
from qwen_vit.video.sampling import sample_frames, shown_frames
from tests.support.videos import make_video, number_in, numbered

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264-mp4": ("a.mp4", {"options": {"bf": "0", "g": "12"}}),
    "h264-b-frames": ("a.mp4", {"options": {"preset": "veryfast", "bf": "3", "g": "20"}}),
    "h264-open-gop": (
        "a.mp4",
        {"options": {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:keyint=15"}},
    ),
    "h264-mov": ("a.mov", {}),
    "h264-avi-without-times": ("a.avi", {"options": {"preset": "veryfast", "bf": "2"}}),
    "h264-ts": ("a.ts", {"options": {"g": "12"}}),
    "fragmented-mp4": (
        "a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "hevc-mkv": ("a.mkv", {"codec": "libx265"}),
    "hevc-10-bits": ("a.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le"}),
    "vp9-webm": ("a.webm", {"codec": "libvpx-vp9"}),
    "av1-mkv": ("a.mkv", {"codec": "libsvtav1"}),
    "mpeg4-avi": ("a.avi", {"codec": "mpeg4"}),
}  # fmt: skip


def frames_of(video: FileFrames, places: list[int]) -> list[NDArray[np.uint8]]:
    return [np.asarray(video.upright(frame))[..., :3] for frame in video.frames(places)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_found_alone_and_in_order(kind: str, tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    path = make_video(tmp_path / name, 60, **settings)
    with open_video(path, path, VideoLimits()) as video:
        assert (video.timeline.n_frames, video.timeline.rate) == (60, 30.0)
        assert [number_in(frame) for frame in frames_of(video, list(range(60)))] == [*range(60)]
        some = [3, 17, 18, 41, 59]
        assert [number_in(frame) for frame in frames_of(video, some)] == some
        np.testing.assert_allclose(video.seconds, np.arange(60) / 30, atol=1e-3)
    header = read_header(path, path, VideoLimits())
    assert abs(header.timeline.n_frames - 60) <= 1
    assert (header.height, header.width) == (64, 96)


@pytest.mark.parametrize("target", [0, 1, 14, 15, 16, 29, 30, 44, 59])
def test_a_frame_behind_a_seek_has_the_pixels_of_a_whole_decode(
    target: int, tmp_path: Path
) -> None:
    """The decoder skips frames that no other frame needs, and this must not change the target
    frame."""
    import av

    _, settings = KINDS["h264-open-gop"]
    path = make_video(tmp_path / "a.mp4", 60, **settings)
    with av.open(path) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(path, path, VideoLimits(), threads=2) as video:
        [found] = frames_of(video, [target])
    assert np.array_equal(found, decoded[target])


def test_a_varying_rate_gives_the_frames_shown_at_even_moments(tmp_path: Path) -> None:
    """The clip has 30 frames in 0.5 s, and then 10 frames of one second each. By time, most samples
    are in the slow part."""
    ticks = [*(round(i * 1000 / 60) for i in range(30)), *(500 + 1000 * i for i in range(10))]
    path = make_video(tmp_path / "a.mkv", 40, ticks=ticks, time_base=Fraction(1, 1000))
    with open_video(path, path, VideoLimits()) as video:
        indices, _ = sample_frames(video.timeline, VideoOptions(n_frames=10), path)
        places = shown_frames(indices, video.seconds, video.timeline)
        found = [number_in(frame) for frame in frames_of(video, places)]
    assert found == places
    duration = video.timeline.n_frames / video.timeline.rate
    for index, place in zip(indices, places, strict=True):
        moment = index / video.timeline.rate
        assert ticks[place] / 1000 <= moment + 0.02
        later = ticks[place + 1] / 1000 if place < 39 else duration
        assert moment < later
    assert sum(place >= 30 for place in places) >= 8


def test_moments_count_from_the_first_frame_that_an_edit_list_shows(tmp_path: Path) -> None:
    """After a cut without encoding, the file contains hidden frames before the start."""
    import subprocess

    ffmpeg = pytest.importorskip("shutil").which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("ffmpeg is not installed")
    whole = make_video(tmp_path / "whole.mp4", 90, options={"g": "30", "bf": "0"})
    cut = str(tmp_path / "cut.mp4")
    command = [ffmpeg, "-v", "error", "-ss", "0.5", "-i", whole, "-c", "copy", cut]
    subprocess.run(command, check=True)
    with open_video(cut, cut, VideoLimits()) as video:
        assert video.timeline.n_frames == 75
        assert [number_in(frame) for frame in frames_of(video, [0, 1, 74])] == [15, 16, 89]
        assert video.seconds[0] == 0


@pytest.mark.parametrize(
    ("rotation", "operation"),
    [(90, Image.Transpose.ROTATE_90), (-90, Image.Transpose.ROTATE_270),
     (180, Image.Transpose.ROTATE_180)],
)  # fmt: skip
def test_rotation_is_applied(rotation: int, operation: Image.Transpose, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 2, rotation=rotation)
    with open_video(path, path, VideoLimits()) as video:
        [frame] = frames_of(video, [1])
        assert video.notes == (f"rotate {rotation % 360} applied",)
        assert video.size_px == frame.shape[:2]
    expected = np.asarray(Image.fromarray(numbered(1)).transpose(operation))
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 6


def test_the_matrix_and_the_range_that_the_file_names_are_used(tmp_path: Path) -> None:
    """BT.709 decoded as BT.601 would change red by 10 or more levels."""
    path = make_video(tmp_path / "a.mp4", 2, colour={"colorspace": 1, "color_range": 1})
    import av

    with av.open(path) as container:
        raw = next(container.decode(video=0))
        y, u, v = (float(np.asarray(plane).reshape(-1, plane.line_size)[-8 if i == 0 else -4, 8])
                   for i, plane in enumerate(raw.planes))  # fmt: skip
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    expected = 255 * np.array([y + 1.5748 * v, y - 0.18732 * u - 0.46812 * v, y + 1.8556 * u])
    with open_video(path, path, VideoLimits()) as video:
        [frame] = frames_of(video, [0])
    assert np.abs(frame[-8, 8] - expected.clip(0, 255)).max() <= 2


def test_a_frame_has_the_same_pixels_every_time(tmp_path: Path) -> None:
    """The threads of swscale overwrote 4 pixels of rows whose length is no multiple of 16 bytes."""
    path = make_video(tmp_path / "a.mkv", 1, size=(364, 280))
    seen = set()
    for _ in range(60):
        with open_video(path, path, VideoLimits()) as video:
            seen |= {
                np.asarray(video.upright(each))[..., :3].tobytes() for each in video.frames([0])
            }
    assert len(seen) == 1


@pytest.mark.parametrize("width", [98, 100, 852])
def test_the_last_columns_have_the_values_of_the_frame(width: int, tmp_path: Path) -> None:
    """swscale wrote random bytes into the last 2 or 4 columns of such widths, such as 852x480."""
    path = make_video(tmp_path / "a.mp4", 3, size=(width, 66))
    with open_video(path, path, VideoLimits()) as video:
        for frame in video.frames([0, 1, 2]):
            expected = frame.reformat(format="rgb24", threads=1).to_ndarray()
            for _ in range(3):
                assert np.array_equal(np.asarray(video.upright(frame)), expected)


def test_hdr_is_named_and_not_tone_mapped(tmp_path: Path) -> None:
    path = make_video(
        tmp_path / "a.mp4", 2, codec="libx265", pix_fmt="yuv420p10le",
        colour={"colorspace": 9, "color_primaries": 9, "color_trc": 16},
    )  # fmt: skip
    with open_video(path, path, VideoLimits()) as video:
        frames_of(video, [0])
        assert video.notes == ("10 bits to 8", "HDR (PQ) without tone mapping")
