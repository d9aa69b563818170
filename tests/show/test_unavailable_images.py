"""Test `qwen-vit show` with videos, and with images that cannot be drawn behind features."""

import json
import tarfile
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.images.image import ImagePage
from qwen_vit.show.views import view_features
from tests.support.encoders import tiny
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.interrupted_exports import Stop
from tests.support.videos import make_video

TINY = ("--model", "tiny", "--device", "cpu")
SMALL = ("--min-frame-pixels", "3136", "--max-frame-pixels", "12544")
WITHOUT_FRAMES = "first two sampled frames, without the frames themselves"


@pytest.fixture
def run(qwen_vit: Any, undrawn: None) -> Any:
    """Run `qwen-vit show ARGUMENTS`."""
    return partial(qwen_vit, "show")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with an image of 84 x 56 pixels and a video of 2 s in p/."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    values = np.random.default_rng(1).integers(0, 256, (56, 84, 3), np.uint8)
    Image.fromarray(values).save("p/a.png")
    make_video("p/clip.mp4")
    return tmp_path


def test_a_video_is_drawn_beside_images(folder: Path, run: Any) -> None:
    """The command once ended with "not an image: it starts with", without a page."""
    done = run("p", *TINY, "--json")
    assert done.code == 0, done.err
    image, video = json.loads(done.out)["images"]
    assert (image["id"], image["has_picture"], image["frame_pairs"]) == ("a.png", True, 1)
    assert (video["id"], video["has_picture"], video["frame_pairs"]) == ("clip.mp4", False, 2)
    page = " ".join(Path("show.html").read_text("utf-8").split())
    assert WITHOUT_FRAMES in page
    assert "pair 1 of 2 pairs of frames" in page
    assert page.count("pairs of frames") == 1
    alone = run("p/clip.mp4", *TINY, "--out", "clip.html")
    assert (alone.code, alone.out) == (0, "wrote clip.html\n")
    assert run("p/a.png", *TINY, "--out", "a.html").code == 0
    assert WITHOUT_FRAMES not in Path("a.html").read_text("utf-8")


def test_a_damaged_video_is_skipped(folder: Path, run: Any) -> None:
    clip = Path("p/clip.mp4")
    clip.write_bytes(clip.read_bytes()[:2000])
    done = run("p", *TINY)
    assert (done.code, done.out) == (1, "wrote show.html\n")
    assert "skipped: clip.mp4: truncated: it has 2000 bytes" in done.err


def test_a_video_in_a_tar_is_drawn(folder: Path, run: Any) -> None:
    with tarfile.open("p.tar", "w") as tar:
        tar.add("p/a.png", "a.png")
        tar.add("p/clip.mp4", "clip.mp4")
    done = run("p.tar", *TINY, "--json")
    assert done.code == 0, done.err
    assert [each["has_picture"] for each in json.loads(done.out)["images"]] == [True, False]


def test_a_stored_video_is_drawn_if_images_contains_its_file(
    folder: Path, run: Any, qwen_vit: Any
) -> None:
    """The command once failed if it found the video, and succeeded if it did not."""
    assert qwen_vit("encode", "p", *TINY, *SMALL, "--out", "f.safetensors").code == 0
    done = run("f.safetensors", "--images", "p", "--json")
    assert done.code == 0, done.err
    assert [each["has_picture"] for each in json.loads(done.out)["images"]] == [True, False]
    assert "drew 1 video without frames, first clip.mp4: --images adds only images" in done.err
    assert "found no file" not in done.err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "p/a.png: a truncated PNG"),
        ("size", "p/a.png: the image is 90 x 80, but the features come from 84 x 56 pixels."),
        ("video", "p/a.png: a video, not an image. Expected JPEG, PNG"),
    ],
)
def test_an_image_that_cannot_be_drawn_leaves_its_features(
    folder: Path, run: Any, qwen_vit: Any, fault: str, words: str
) -> None:
    """One unreadable or changed file of --images once cost the page."""
    assert qwen_vit("encode", "p/a.png", *TINY, "--out", "f.safetensors").code == 0
    path = Path("p/a.png")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif fault == "size":
        Image.new("RGB", (90, 80)).save(path)
    else:
        Path("p/clip.mp4").rename(path)
    done = run("f.safetensors", "--images", "p", "--json")
    assert done.code == 0, done.err
    assert not json.loads(done.out)["images"][0]["has_picture"]
    assert "drew the features without their image: " in done.err
    assert words in done.err


def test_a_replaced_image_is_named_in_the_log_and_on_the_page(
    folder: Path, run: Any, qwen_vit: Any
) -> None:
    """An image of the same size once stood beside the features of the image that it replaced."""
    assert qwen_vit("export", "p", *TINY, *SMALL, "--out", "stored").code == 0
    assert qwen_vit("encode", "p/a.png", *TINY, "--out", "f.safetensors").code == 0
    for n_changed in (0, 1):
        if n_changed:
            Image.new("RGB", (84, 56), "red").save("p/a.png")
        for given in (("stored", "--images", "p"), ("f.safetensors",)):  # whose id is a path
            done = run(*given, "--overwrite")
            assert done.code == 0
            assert (
                done.err.count("p/a.png is not the encoded file, or has changed since, so")
                == n_changed
            )
            page = " ".join(Path("show.html").read_text("utf-8").split())
            assert page.count("a.png, may not match the features, because") == n_changed


def test_the_encoded_bytes_of_a_picture_are_compared_in_every_form(folder: Path) -> None:
    good = Path("p/a.png").read_bytes()
    Image.new("RGB", (84, 56), "red").save("other.png")
    other = Path("other.png").read_bytes()
    features = replace(tiny().encode("p/a.png", output="patch"), sha256=sha256(good).hexdigest())

    def is_changed(picture: Any, features: Any = features) -> bool:
        [view] = view_features([features], {"p/a.png": picture}).views
        assert view.picture is not None
        return view.is_changed

    assert not is_changed("p/a.png")
    assert is_changed(Path("other.png"))
    for form in (bytes, bytearray, memoryview, lambda data: {"bytes": data, "path": None}):
        assert (is_changed(form(good)), is_changed(form(other))) == (False, True)
    pages = (ImagePage(good, 1), ImagePage(other, 1))
    assert [is_changed(page) for page in pages] == [False, True]
    assert not is_changed(Image.open("other.png"))  # without encoded bytes
    assert not is_changed("other.png", replace(features, sha256=None))


def test_a_frame_of_a_video_has_no_recorded_hash(folder: Path, qwen_vit: Any) -> None:
    assert qwen_vit("encode", "p/clip.mp4", *TINY, *SMALL, "--out", "v.safetensors").code == 0
    [clip] = load_features("v.safetensors")
    assert clip.sha256 == sha256(Path("p/clip.mp4").read_bytes()).hexdigest()
    height, width = clip.size_px
    [view] = view_features([clip], {"clip.mp4": Image.new("RGB", (width, height))}).views
    Image.new("RGB", (width, height)).save("frame.png")
    [view] = view_features([clip], {clip.id: "frame.png"}).views
    assert (view.picture is not None, view.is_changed) == (True, False)


@pytest.mark.parametrize(
    "arguments",
    [("feature",), ("featurs.safetensors",), ("featurs.safetensors", *TINY), ("feature", *TINY)],
)
def test_a_mistyped_input_does_not_exist(
    folder: Path, run: Any, arguments: tuple[str, ...]
) -> None:
    """A mistyped export folder was once an error about --model."""
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert f"error: {arguments[0]}: does not exist" in done.err
    assert "Check the path." in done.err
    assert "--model" not in done.err


def test_an_unfinished_export_without_a_shard_names_the_command(export_dir: Path, run: Any) -> None:
    options = ExportOptions(shard_size=200)
    with pytest.raises(KeyboardInterrupt):
        export_features(FakeEncoder(), ["p"], "out", options, stop=cast(Any, Stop(8)))
    done = run("out")
    assert (done.code, done.out) == (2, "")
    assert (
        "error: out: its finished shards contain no features. Run the same `qwen-vit export` "
        "command again to write what is missing."
    ) in done.err


def test_an_export_of_failed_images_names_their_number(folder: Path, run: Any) -> None:
    Path("q").mkdir()
    Path("q/a.png").write_bytes(tiny_png(1)[:50])
    export_features(FakeEncoder(), ["q"], "out")
    done = run("out")
    assert (done.code, done.out) == (2, "")
    assert (
        "error: out: contains no features, because 1 image failed. Fix the causes, and export "
        "again with --retry-failed."
    ) in done.err
