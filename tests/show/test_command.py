"""Test `qwen-vit show` with images or stored features, as a page, a picture or a folder."""

import json
import os
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.loading import ImageLoader
from tests.support import ROOT

TINY = ("--model", "tiny", "--device", "cpu")


@pytest.fixture
def run(qwen_vit: Any) -> Any:
    """Run `qwen-vit show ARGUMENTS`."""
    return partial(qwen_vit, "show")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with photographs of 56 and 84 pixels and a broken image in p/."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for name, width in (("a.png", 56), ("b.jpg", 84)):
        values = np.random.default_rng(width).integers(0, 256, (56, width, 3), np.uint8)
        Image.fromarray(values).save(Path("p", name))
    return tmp_path


class Page(HTMLParser):
    """Collect a page's tags and its text."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(Path(path).read_text("utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_images_become_one_page_that_loads_no_other_file(folder: Path, run: Any) -> None:
    done = run("p", *TINY, "--point", "10,20")
    assert (done.code, done.out) == (0, "wrote show.html\n")
    page = Page("show.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 * 3
    assert all(str(each["src"]).startswith("data:image/") for each in images)
    assert all(each["alt"] and each["width"] and each["height"] for each in images)
    source = Path("show.html").read_text("utf-8")
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    for words in (
        "a.png", "84 x 56 pixels: 6 x 4 cells", "Similarity to the marked cell",
        "The weights of tiny are random", "Of 5 blocks, 2 attend to the whole image",
        "windows of 112 x 112 pixels", "of the variance", "patches, a cell of 14 x 14 pixels",
        "qwen-vit show p --model tiny --device cpu --point 10,20 --overwrite", "Made by qwen_vit",
    ):  # fmt: skip
        assert words in page.text, words
    again = run("p", *TINY)
    assert "show.html: already exists. Pass --overwrite" in again.err


def test_a_folder_gets_the_page_and_a_picture_of_each(folder: Path, run: Any) -> None:
    done = run("p", *TINY, "--out", "out", "--json")
    report = json.loads(done.out)
    files = ["out/index.html", "out/01-a.png", "out/02-b.png"]
    assert (done.code, report["files"], report["out"]) == (0, files, "out")
    assert sorted(os.listdir("out")) == ["01-a.png", "02-b.png", "index.html"]
    for file in files[1:]:
        with Image.open(file) as picture:
            picture.load()
            assert picture.width > 1000
    assert report["model"] == "tiny"
    assert (report["window_px"], report["full_attention_blocks"]) == (112, [1, 3])
    assert len(report["explained_variance"]) == 3
    assert 0 < sum(report["explained_variance"]) <= 1.0001
    first, second = report["images"]
    assert (first["id"], first["size_px"], first["windows"]) == ("a.png", [56, 56], 1)
    assert (second["grid_hw"], second["cells_hw"]) == ([4, 6], [4, 6])
    assert "the folder already contains files" in run("p", *TINY, "--out", "out").err
    again = run("p", *TINY, "--out", "out", "--overwrite")
    assert (again.code, "older picture" in again.err) == (0, False)


def test_pictures_of_an_older_page_are_kept_and_named(folder: Path, run: Any) -> None:
    run("p", *TINY, "--out", "out")
    Path("out", "holiday.png").touch()
    done = run("p/b.jpg", *TINY, "--out", "out", "--overwrite")
    assert (done.code, done.err.splitlines()[-1]) == (
        0, "out still contains 2 older pictures, first 01-a.png"
    )  # fmt: skip
    assert sorted(os.listdir("out")) == [
        "01-a.png", "01-b.png", "02-b.png", "holiday.png", "index.html"
    ]  # fmt: skip


def test_a_file_without_a_suffix_is_never_replaced(folder: Path, run: Any) -> None:
    """The error once advised --overwrite, which gave the same error."""
    Path("notes").write_text("mine")
    for options in ((), ("--overwrite",)):
        done = run("p", *TINY, "--out", "notes", *options)
        assert (done.code, Path("notes").read_text()) == (2, "mine")
        assert "an existing file without a suffix" in done.err
        assert "Pass --out notes.html." in done.err


def test_a_layer_is_shown(undrawn: None, folder: Path, run: Any) -> None:
    report = json.loads(run("p", *TINY, "--layer", "1", "--json").out)
    assert report["layer"] == 1
    assert "the residual stream after block 1" in Page("show.html").text
    done = run("p", *TINY, "--layer", "9", "--out", "n.html")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --layer is 9. Expected a block from 0 to 4. Pass another --layer.\n"


def test_one_image_becomes_one_picture(folder: Path, run: Any) -> None:
    assert run("p/a.png", *TINY, "--out", "a.png").out == "wrote a.png\n"
    with Image.open("a.png") as picture:
        assert picture.format == "PNG"
    done = run("p", "--model", "no/such/folder", "--out", "both.png")  # checked before the model
    assert done.code == 2
    assert "--out both.png names one picture, but there are 2 images" in done.err
    assert run("p", *TINY, "--limit", "1", "--out", "first.png").code == 0
    assert not Path("both.png").exists()


def test_stored_features_are_shown_with_their_pictures_or_without(
    undrawn: None, folder: Path, run: Any
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    export_features(encoder, ["p"], "stored", ExportOptions(output="patch", shard_size=1))
    shutil.move("p", "moved")
    without = json.loads(run("stored", "--out", "a.html", "--json").out)
    assert [each["has_picture"] for each in without["images"]] == [False, False]
    assert [each["id"] for each in without["images"]] == ["a.png", "b.jpg"]
    assert "Features and 1 attention window" in Page("a.html").text
    given = run("stored", "--out", "b.html", "--images", "moved", "--json", "--point", "55,55")
    assert given.code == 0, given.err
    first, second = json.loads(given.out)["images"]
    assert first["has_picture"]
    assert second["has_picture"]
    assert (first["marked_patch_xy"], second["marked_patch_xy"]) == ([3.5, 3.5], None)
    text = " ".join(Page("b.html").text.split())
    assert re.search(r"Similarity to the marked cell: -?\d\.\d\d 1\.00", text)
    assert re.search(r"Similarity to the marked cell of a\.png: -?\d\.\d\d 1\.00", text)
    for words in ("1, lightness:", "2, blue to yellow:", "3, green to red:"):
        assert f"component {words}" in text


def test_a_picture_is_matched_by_the_end_of_its_path(undrawn: None, folder: Path, run: Any) -> None:
    """Two images have the same name in two folders, and neither may get the other image."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    for name in ("x", "y"):
        Path("q", name).mkdir(parents=True)
        shutil.copy("p/a.png", f"q/{name}/a.png")
        shutil.copy("p/b.jpg", f"q/{name}/b-{name}.jpg")
    export_features(encoder, ["q"], "stored")
    for images, shown in (
        (["q"], {"x/a.png", "x/b-x.jpg", "y/a.png", "y/b-y.jpg"}),
        (["q/x"], {"x/a.png", "x/b-x.jpg"}),
        (["q/y/b-y.jpg"], {"y/b-y.jpg"}),
        (["p"], set()),  # p/a.png matches two stored images
    ):
        options = [word for each in images for word in ("--images", each)]
        done = run("stored", *options, "--json", "--out", "c.html", "--overwrite")
        found = {each["id"] for each in json.loads(done.out)["images"] if each["has_picture"]}
        assert found == shown
        assert ("found no file for" in done.err) == (len(shown) < 4)


def test_an_image_with_the_same_id_precedes_others_of_its_name(
    folder: Path, run: Any, qwen_vit: Any
) -> None:
    """A second image of the same name in a subfolder once hid both."""
    assert qwen_vit("export", "p/a.png", *TINY, "--out", "one").code == 0
    [name] = load_features("one").ids
    target = Path("q", name)
    target.parent.mkdir(parents=True)
    shutil.copy("p/a.png", target)
    Path("q/sub").mkdir()
    shutil.copy("p/a.png", "q/sub/a.png")
    done = run("one", "--images", "q", "--json")
    assert [each["has_picture"] for each in json.loads(done.out)["images"]] == [True], done.err


def test_a_page_is_drawn_with_its_picture(folder: Path, run: Any, qwen_vit: Any) -> None:
    pages = [Image.new("RGB", (56 * n, 56), (80 * n, 0, 0)) for n in (1, 2, 3)]
    Path("s").mkdir()
    pages[0].save("s/scan.tif", save_all=True, append_images=pages[1:])
    shutil.copy("p/a.png", "s/a.png")
    done = qwen_vit("encode", "s", *TINY, "--out", "f.safetensors", "--pages", "all")
    assert done.code == 0, done.err
    shutil.copy("s/scan.tif", "scan.tif")
    for options in (("--images", "s"), ("--images", "s/scan.tif"), ()):  # () reads ./scan.tif
        done = run("f.safetensors", *options, "--json", "--overwrite")
        drawn = {each["id"] for each in json.loads(done.out)["images"] if each["has_picture"]}
        assert drawn - {"a.png"} == {f"scan.tif#page={n}" for n in (1, 2, 3)}, done.err


def test_a_table_of_features_is_not_an_input(folder: Path, run: Any, qwen_vit: Any) -> None:
    assert qwen_vit("encode", "p/a.png", *TINY, "--out", "f.safetensors").code == 0
    load_features("f.safetensors").to_parquet("m.parquet")
    assert "m.parquet: a table of features, without images. Expected" in run("m.parquet").err


def test_some_of_the_images_are_chosen(folder: Path, run: Any) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    export_features(encoder, ["p"], "stored")
    one = json.loads(run("stored", "--id", "b.jpg", "--json").out)
    assert [each["id"] for each in one["images"]] == ["b.jpg"]
    first = run("p", *TINY, "--limit", "1", "--out", "l.html")
    assert first.code == 0
    assert "showing the first 1 of 2 images; --limit shows more" in first.err
    assert len(re.findall("<h2>[ab]", Path("l.html").read_text())) == 1
    missing = run("stored", "--id", "c.jpg", "--out", "m.html")
    assert (missing.code, missing.out) == (2, "")
    assert "'c.jpg' is not in stored, which lists 2 images" in missing.err


def test_a_broken_image_is_skipped_and_the_others_are_shown(folder: Path, run: Any) -> None:
    Path("p/c.png").write_bytes(Path("p/a.png").read_bytes()[:200])
    done = run("p", *TINY, "--json")
    report = json.loads(done.out)
    assert done.code == 1
    assert [each["id"] for each in report["images"]] == ["a.png", "b.jpg"]
    assert [each["code"] for each in report["failed"]] == ["truncated"]
    alone = run("p/c.png", *TINY, "--out", "d.html", "-q")
    assert alone.err.startswith("skipped: p/c.png: ")
    assert (alone.code, alone.out) == (2, "")
    assert "no image to show, because all images failed" in alone.err


def test_the_error_for_a_large_video_names_a_way_without_video_options(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error only named options such as --fps, which `show` lacks."""
    shutil.copy(ROOT / "tests" / "videos" / "clip.mp4", ".")

    def no_memory(*_: object) -> None:
        raise ImageError("too large", name="clip.mp4", code="memory")

    monkeypatch.setattr(ImageLoader, "load_video", no_memory)
    done = run("clip.mp4", *TINY)
    assert "pass them to `qwen-vit encode`, and show its feature file" in done.err


def test_odd_names_are_text_on_the_page_and_no_paths(undrawn: None, folder: Path, run: Any) -> None:
    for name in ('<img src=x onerror="a()">.png', "a\udcff猫\n.png"):
        shutil.copy("p/a.png", Path("p", name))
    done = run("p", *TINY, "--out", "out")
    assert done.code == 0, done.err
    assert all(name.isascii() for name in os.listdir("out"))
    page = Page("out/index.html")
    assert [tag for tag, _ in page.tags].count("img") == 4 * 2
    assert not any("onerror" in attributes for _, attributes in page.tags)


SEARCH = "drew 2 images without their pictures; pass the originals as --images\n"


def test_an_option_without_effect_is_named(undrawn: None, folder: Path, run: Any) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    export_features(encoder, ["p"], "stored", ExportOptions(layers=(1,)))
    of_encoding = ("--device", "cpu", "--min-pixels", "5", "--revision", "main")
    for arguments, words in (
        (("stored", *of_encoding), "--device and --min-pixels and --revision: stored features are"),
        (("stored", "--output", "patch", "--layer", "1"), "--output: --layer selects"),
        (("p", *TINY, "--output", "patch", "--layer", "1"), "--output: --layer selects"),
    ):
        done = run(*arguments, "--overwrite")
        assert (done.code, done.err.count("ignored ")) == (0, 1)
        assert f"ignored {words}" in done.err
    done = run("stored", "--output", "merged", "--overwrite")
    assert (done.code, done.err) == (0, SEARCH)
    Path("other").mkdir()
    Image.new("RGB", (28, 28)).save("other/c.png")
    done = run("stored", "--output", "merged", "--overwrite", "--images", "other")
    assert done.err.startswith("found no file for 2 images, first a.png: --images contains no")
    assert done.err.count("\n") == 1
    done = run("stored", "--output", "merged", "--overwrite", "--limit", "1")
    assert "drew 1 image without its picture; pass the original as --images\n" in done.err
    done = run("stored", "--output", "merged", "--overwrite", "--images", "p")
    assert (done.code, done.err) == (0, "")
    done = run("stored", "--output", "patch", "--overwrite")
    assert (done.code, done.out) == (2, "")
    assert "stored: no patch features, only merged features. Encode again, and" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("p",), "--model for images, or one feature file or export folder. Pass --model to"),
        (("p", *TINY, "--id", "a.png"), "--images and --id work only for stored features"),
        (("s3://f", "--model", "tiny"), "s3://f: --model works only for images. Omit --model"),
        (
            ("f.safetensors", "p"),
            "2 inputs, but stored features must be the only input. Expected one",
        ),
        (("f.safetensors",), "f.safetensors: does not exist"),
        (("p", *TINY, "--out", "a.jpeg"), "Expected .html for a page, .png for a picture, or"),
        (("p", *TINY, "--out", "no/a.html"), "no: does not exist. Create the folder first."),
        (("p", *TINY, "--point", "here"), "'here' is not a pixel. Expected X,Y such as 120,80."),
        (("p/a.png", *TINY, "--point", "56,0"), "the point 56,0 is outside the image."),
    ],
)
def test_the_error_for_wrong_usage_names_the_cause(
    folder: Path, run: Any, arguments: tuple[str, ...], words: str
) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert sorted(os.listdir()) == ["p"]


def test_a_point_is_checked_before_the_second_image_is_encoded(folder: Path, run: Any) -> None:
    Path("p/b.png").write_bytes(b"not an image")
    done = run("p", *TINY, "--point", "56,0")
    assert (done.code, done.out) == (2, "")
    assert "a.png: the point 56,0 is outside the image." in done.err
    assert "b.png" not in done.err


def test_a_missing_model_is_named_before_an_existing_output(folder: Path, run: Any) -> None:
    Path("show.html").touch()
    assert "--model is missing" in run("p").err
    assert "show.html: already exists" in run("p", *TINY).err


def test_without_the_extra_the_package_to_install_is_named(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_vit.show.draw.find_spec", lambda name: None)
    done = run("p", *TINY)
    assert done.code == 2
    assert "qwen-vit show needs packages that are not installed: jinja2, matplotlib." in done.err
