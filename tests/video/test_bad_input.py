"""Test that each invalid video raises one error with a code and a remedy."""

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.common.installation import install_command
from qwen_vit.config import ImageConfig
from qwen_vit.errors import IMAGE_CODES, ArgumentError, ImageError
from qwen_vit.inputs.listing import Item
from qwen_vit.video.isolated import load_in_child
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits, VideoOptions
from tests.support import ROOT
from tests.support.videos import make_video, numbered, patched

CONFIG = ImageConfig.from_json({})
FAST_START = {"movflags": "faststart"}


def refused(
    path: Path | str | bytes, limits: VideoLimits | None = None, **options: Any
) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_video(
            Video(path if isinstance(path, bytes) else str(path), **options), CONFIG, limits=limits
        )
    error = caught.value
    assert error.code in IMAGE_CODES
    assert error.remedy
    assert error.name == ("the video" if isinstance(path, bytes) else str(path))
    assert "0x7f" not in str(error)
    return error


@pytest.mark.parametrize(
    ("name", "settings"),
    [("a.mp4", {}), ("a.mp4", {"container_options": FAST_START}), ("a.mkv", {}), ("a.avi", {})],
    ids=["index-at-the-end", "index-first", "mkv", "avi"],
)
@pytest.mark.parametrize("share", [0.3, 0.98])
def test_a_truncated_file(
    name: str, settings: dict[str, Any], share: float, tmp_path: Path
) -> None:
    path = tmp_path / name
    make_video(path, 120, **settings)
    os.truncate(path, int(path.stat().st_size * share))
    assert refused(path).code == "truncated"


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)  # as if PyAV were not installed
    error = refused(tmp_path / "a.mp4")
    assert error.code == "no-pyav"
    assert install_command("video") in error.text(in_shell=True)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    assert refused(path).code == "empty-file"


def test_an_image_gets_a_remedy_that_fits_its_name(tmp_path: Path) -> None:
    """A JPEG named .jpg was once asked for "a suffix that matches its content"."""
    for name, remedy in (
        ("a.jpg", "Pass the file to `encode`."),
        ("a.mp4", "Give the file an image's extension, such as .jpg."),
    ):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "JPEG")
        error = refused(tmp_path / name)
        assert (error.fact, error.remedy) == ("an image (JPEG), not a video", remedy)


def test_a_text_with_the_name_of_a_video_gets_a_remedy_for_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("404 Not Found")
    assert refused(path).remedy == "Pass a video, or fetch the file again."


def test_a_file_with_only_sound_is_refused(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 44_100), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(path).code == "no-video"


def test_a_header_of_a_billion_frames_is_refused_before_they_are_indexed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    make_video(path, 10)
    patched(path, b"stsz", 4, (100).to_bytes(4) + (10**9).to_bytes(4))
    error = refused(path)
    assert error.code == "too-many-frames"
    assert "1000000000 frames" in str(error)


def test_a_fragment_of_a_billion_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    make_video(path, 10, container_options={"movflags": "frag_keyframe+empty_moov"})
    patched(path, b"trun", 4, (10**9).to_bytes(4))
    assert refused(path).code == "too-many-frames"


def test_a_header_of_65_535_pixels(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"codec": "ffv1", "pix_fmt": "yuv420p", "size": (320, 256)}
    path = Path(make_video(tmp_path / "a.mkv", 4, **settings))
    data = path.read_bytes()
    for element, side in ((b"\xb0", 320), (b"\xba", 256)):  # PixelWidth, PixelHeight
        declared = element + b"\x82" + side.to_bytes(2)
        assert data.count(declared) == 1
        data = data.replace(declared, element + b"\x82\xff\xff")
    path.write_bytes(data)
    assert refused(path).code == "zero-side"  # FFmpeg rejects such a size
    assert refused(make_video(tmp_path / "b.mkv", 4), VideoLimits(max_pixels=64 * 95)).code == (
        "too-many-pixels"
    )


def mux(container: Any, stream: Any, packets: list[Any]) -> None:
    for packet in packets:
        packet.stream = stream
        container.mux(packet)


def test_a_size_that_changes_in_mid_stream(tmp_path: Path) -> None:
    import av

    both = tmp_path / "both.ts"
    with av.open(str(both), "w") as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for part, size in enumerate(((96, 64), (128, 64))):
            encoder: Any = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.options = Fraction(1, 30), {"preset": "ultrafast"}
            for number in range(30):
                frame = av.VideoFrame.from_ndarray(numbered(number, size), format="rgb24")
                frame.pts, frame.time_base = 30 * part + number, Fraction(1, 30)
                mux(container, stream, encoder.encode(frame))
            mux(container, stream, encoder.encode())
    error = refused(both, n_frames=20)
    assert error.code == "size-changes"
    assert "96x64 to 128x64" in str(error)


def test_an_encrypted_file(tmp_path: Path) -> None:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("ffmpeg is not installed")
    plain, secret = make_video(tmp_path / "plain.mp4", 10), tmp_path / "secret.mp4"
    key = "76a6c65c5ea762046bd749a2e632ccbb"
    how = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", key, "-encryption_kid", key]
    command = [ffmpeg, "-v", "error", "-i", plain, "-c", "copy", *how, str(secret)]
    subprocess.run(command, check=True)
    assert refused(secret).code == "encrypted"


@pytest.mark.parametrize("name", ["rocket.jpg", "chelsea.png"])
def test_a_picture_named_mp4(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(Path(ROOT) / "tests" / "photographs" / name, path)
    error = refused(path)
    assert error.code == "format"
    assert "picture" in str(error)


def test_a_web_page_and_a_playlist(tmp_path: Path) -> None:
    """A playlist could name other files and addresses, so the reader never chooses its demuxer."""
    page, playlist = tmp_path / "a.mp4", tmp_path / "b.mp4"
    page.write_text("<!doctype html><html>not found</html>")
    playlist.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    assert refused(page).code == "not-an-image"
    assert refused(playlist).code == "not-an-image"


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert refused(tmp_path / "a.mp4").code == "not-a-file"


def test_a_folder_a_missing_file_and_an_address(tmp_path: Path) -> None:
    assert refused(tmp_path).code == "directory"
    assert refused(tmp_path / "none.mp4").code == "missing"
    assert refused("https://example.org/a.mp4").code == "url"


def test_a_codec_that_no_decoder_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    make_video(path, 4)
    patched(path, b"avc1", -4, b"zzzz")
    assert refused(path).code in ("no-decoder", "zero-side")


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    make_video(path, 60, options={"g": "10", "preset": "veryfast"}, size=(320, 240))
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at + 2_000 : at + 4_000] = bytes(2_000)
    path.write_bytes(data)
    assert refused(path, n_frames=60).code == "damaged"


def test_limits_on_bytes_frames_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    make_video(path, 60)
    size = path.stat().st_size
    assert refused(path, VideoLimits(max_file_bytes=size - 1)).code == "file-too-large"
    gif = Path("tests/fuzz/videos/moves.gif").read_bytes()
    assert refused(gif, VideoLimits(max_file_bytes=len(gif) - 1)).code == "file-too-large"
    assert refused(path, VideoLimits(max_frames=59)).code == "too-many-frames"
    assert refused(path, VideoLimits(max_decode_s=1e-9)).code == "slow"
    with pytest.raises(
        ArgumentError, match=r"max_frames is 1\.5\. Expected a whole number above 0"
    ):
        VideoLimits(max_frames=1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"max_decode_s is 0\. Expected a number above 0"):
        VideoLimits(max_decode_s=0)


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"Install the extra video: pip install -e '\.\[video\]'"):
        load_video(Video(path), CONFIG)


def test_frames_that_do_not_fit_together() -> None:
    small, large = np.zeros((28, 28, 3), np.uint8), np.zeros((56, 28, 3), np.uint8)
    with pytest.raises(ImageError, match="frame 1 is 28x56") as caught:
        load_video(Video([small, large], name="mine"), CONFIG)
    assert caught.value.code == "size-changes"
    with pytest.raises(ImageError, match="no frames"):
        load_video(Video([], name="mine"), CONFIG)
    with pytest.raises(ArgumentError, match="n_frames does not apply to passed frames"):
        load_video(Video([small, small], n_frames=2), CONFIG)


def test_a_video_that_killed_its_process_is_read_in_another_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child answers for a good file, for a bad file, and for a file that ends the child."""
    good, torn = make_video(tmp_path / "a.mp4", 8), tmp_path / "torn.mp4"
    torn.write_bytes(Path(good).read_bytes()[:500])
    options = VideoOptions(min_pixels=784), VideoLimits(), CONFIG
    load_in_child(Item("a.mp4", good), *options)
    with pytest.raises(ImageError, match="mine: truncated") as caught:
        load_in_child(Item("mine", str(torn)), *options)
    assert caught.value.code == "truncated"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ImageError, match="ended with exit code 1") as killed:
        load_in_child(Item("a.mp4", good), *options)
    assert killed.value.code == "memory"
