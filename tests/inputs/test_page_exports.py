"""Test exports of every page: ids, resuming, and pages inside tars and Parquet files."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.images import pages as pages_module
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.pages import page_items
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.parquet_files import write_rows

OPTIONS = ExportOptions(shard_size=2, pages="all")


def scan(*numbers: int) -> bytes:
    first, *rest = (Image.open(io.BytesIO(tiny_png(number))) for number in numbers)
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with five images of ten pages in `p`, and a broken image."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    Path("p/a.png").write_bytes(tiny_png(1))
    Path("p/b.tif").write_bytes(scan(2, 3, 4))
    Path("p/c.tif").write_bytes(scan(5))
    Path("p/d.tif").write_bytes(scan(6, 7)[:50])
    with tarfile.open("p/e.tar", "w") as tar:
        for name, data in (("x.tif", scan(8, 9)), ("y.png", tiny_png(10))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return tmp_path


def export(out: str, options: ExportOptions = OPTIONS, *inputs: str) -> Any:
    encoder: Any = FakeEncoder()
    return export_features(encoder, inputs or ("p",), out, options)


def test_listing_opens_only_regular_files(pictures: Path) -> None:
    os.mkfifo("p/f.tif")
    items = page_items(find_items(["p/f.tif"]), ImageLimits())
    assert [item.id for item in items] == ["p/f.tif"]


def test_every_page_has_its_own_id_and_features(pictures: Path) -> None:
    done = export("out")
    stored = load_features("out")
    pages = ["b.tif#page=1", "b.tif#page=2", "b.tif#page=3"]
    tar = ["e.tar/x.tif#page=1", "e.tar/x.tif#page=2", "e.tar/y.png"]
    assert list(stored.ids) == ["a.png", *pages, "c.tif", *tar]
    assert (done.exported, done.failed) == (8, {"truncated": 1})
    for number in (1, 2, 3, 4, 5, 8, 9, 10):
        Path(f"{number:02}.png").write_bytes(tiny_png(number))
    export("files", ExportOptions(), "*.png")
    for page, file in zip(stored, load_features("files"), strict=True):
        assert page.embeds.equal(file.embeds)
    assert stored["b.tif#page=2"].notes[-1] == "page 2"


def test_too_many_pages_are_an_error_of_the_image(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing once counted such a file as one image, so the export had only its first page."""
    monkeypatch.setattr(pages_module, "MAX_PAGES", 2)
    done = export("out")
    assert done.failed == {"slow": 1, "truncated": 1}
    [failed] = [each for each in load_features("out").errors if each.code == "slow"]
    assert (failed.id, failed.stage) == ("b.tif", "list")
    assert "more than 2 pages" in failed.message


def test_resuming_needs_the_same_pages(pictures: Path) -> None:
    export("out")
    before = Path("out/shard-00000001.safetensors").read_bytes()
    Path("out/shard-00000001.safetensors").unlink()
    with pytest.raises(ExportError, match="its images"):
        export("out", ExportOptions(shard_size=2))
    # the frozen listing contains the page numbers
    export("out", ExportOptions(shard_size=2), "out/listing.jsonl")
    assert Path("out/shard-00000001.safetensors").read_bytes() == before


def test_pages_in_parquet(pictures: Path) -> None:
    rows = [{"bytes": data, "path": None} for data in (tiny_png(1), scan(2, 3))]
    write_rows("x.parquet", rows)
    export("out", ExportOptions(column="image", pages="all"), "x.parquet")
    names = ["x.parquet:0", "x.parquet:1#page=1", "x.parquet:1#page=2"]
    assert list(load_features("out").ids) == names


def test_an_estimate_counts_pages(pictures: Path) -> None:
    encoder: Any = FakeEncoder()
    found = estimate_export(encoder, ["p"], OPTIONS)
    assert (found.images, found.unreadable) == (9, 1)


def test_formats_are_part_of_an_export(pictures: Path) -> None:
    Image.new("RGB", (28, 28)).save("p/f.ppm")
    Path("list.txt").write_text("p/f.ppm\n")
    assert export("none", ExportOptions(), "list.txt").failed == {"format": 1}
    ppm = ExportOptions(limits=ImageLimits(formats=("PPM",)))
    assert export("some", ppm, "list.txt").failed == {}
    encoder: Any = FakeEncoder()
    assert estimate_export(encoder, ["list.txt"], ppm).unreadable == 0
    Path("some/shard-00000000.safetensors").unlink()
    Path("other.txt").write_text("p/f.ppm\np/a.png\n")
    export("some", ppm, "other.txt")
    with pytest.raises(ExportError, match=r"limits\.formats was \['PPM'\], is \[\] now"):
        export("some", ExportOptions(), "other.txt")


def test_options_refuse_unknown_values() -> None:
    with pytest.raises(ArgumentError, match="pages"):
        ExportOptions(pages="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [0, -1, 1.5, "2"])
def test_a_list_with_an_invalid_page_is_refused(pictures: Path, page: Any) -> None:
    Path("own.jsonl").write_text(json.dumps({"id": "a", "path": "p/b.tif", "page": page}))
    with pytest.raises(ExportError, match="counted from 1"):
        list(find_items(["own.jsonl"]))


def test_commands_take_pages_and_formats(pictures: Path, qwen_vit: Callable[..., Any]) -> None:
    Image.new("RGB", (56, 56)).save("f.ppm")
    arguments = ("f.ppm", "p/b.tif", "--model", "tiny", "--device", "cpu", "--pages", "all")
    for command, out in (("encode", "x.safetensors"), ("export", "out")):
        done = qwen_vit(command, *arguments, "--formats", "tga,ppm", "--out", out)
        assert done.code == 0, done.err
        pages = [f"p/b.tif#page={page}" for page in (1, 2, 3)]
        assert list(load_features(out).ids) == ["f.ppm", *pages]
    done = qwen_vit("encode", *arguments, "--formats", "psd", "--out", "y")
    assert done.code == 2
    assert "some of ICO, JPEG2000, PPM, TGA" in done.err
