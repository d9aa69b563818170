"""Test that a resumed export never stores another image's features under an id, although a tar or
a Parquet file was written again in another order."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vit.errors import ExportError
from qwen_vit.export.options import ExportOptions
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.growing_exports import content, export
from tests.support.inputs import write_tar
from tests.support.parquet_files import structs, write_rows

SHARDS = ExportOptions(shard_size=4)
ROWS = replace(SHARDS, column="image", id_column="key")
NUMBERS = range(6)
SOURCES = {"tar": ("a.tar", SHARDS), "parquet": ("a.parquet", ROWS)}


def write_source(name: str, numbers: Sequence[int]) -> None:
    if name.endswith(".tar"):
        write_tar(name, {f"{number}.png": tiny_png(number) for number in numbers})
    else:
        write_rows(name, structs(numbers), key=[f"k{number}" for number in numbers])


@pytest.fixture(params=SOURCES)
def started(request: pytest.FixtureRequest, folder: Path) -> tuple[str, ExportOptions]:
    """An export of one tar or Parquet file, whose last shard is missing."""
    name, options = SOURCES[request.param]
    write_source(name, NUMBERS)
    export(options, inputs=[name])
    Path("out/shard-00000001.safetensors").unlink()
    return name, options


def resume(options: ExportOptions, out: str = "out") -> Any:
    return export(options, out, inputs=None)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_reordered_file_is_an_error(
    started: tuple[str, ExportOptions], is_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = started
    path, out = os.path.abspath(name), os.path.abspath("out")
    before = content()
    write_source(name, [5, 4, 3, 2, 1, 0])
    if is_elsewhere:  # the export cannot list its inputs
        Path("elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
    with pytest.raises(ExportError, match=r"\d had the image .*; 6 images moved") as caught:
        resume(options, out)
    assert caught.value.name == path
    assert ("row 0 had the image k0" if options.column else "a.tar/0.png") in caught.value.fact
    assert ("has k5 now" if options.column else "has 5.png now") in caught.value.fact
    assert content(out) == before
    monkeypatch.chdir(Path(path).parent)
    write_source(name, NUMBERS)
    assert resume(options).exported == 6


def test_a_file_with_more_images_at_its_end_is_no_error(
    started: tuple[str, ExportOptions], caplog: pytest.LogCaptureFixture
) -> None:
    name, options = started
    write_source(name, [*NUMBERS, 6, 7])
    assert resume(options).exported == 6
    assert "to add the new images, pass extend=True" in caplog.text
    features = content()
    export(options, "fresh", inputs=[name])
    fresh = content("fresh")
    assert features == {key: fresh[key] for key in features}


def test_a_complete_export_of_a_reordered_file_is_no_error(
    started: tuple[str, ExportOptions], caplog: pytest.LogCaptureFixture
) -> None:
    name, options = started
    resume(options)
    before = content()
    write_source(name, [6, *reversed(NUMBERS)])
    with caplog.at_level(logging.WARNING):
        assert resume(options).exported == 6
    assert content() == before
    assert "pass extend" not in caplog.text  # moved images cannot be extended
    first = "k5 (it was in row 5 of" if options.column else "a.tar/5.png (it was at byte 5632 of"
    now = "row 1" if options.column else "at byte 1536"
    assert f"1 new, first {'k6' if options.column else 'a.tar/6.png'}; 5 in another" in caplog.text
    assert first in caplog.text
    assert f"{name}, and is in {now} now)" in caplog.text.replace("is at", "is in at")


def test_a_missing_or_damaged_file_fails_its_images(started: tuple[str, ExportOptions]) -> None:
    name, options = started
    os.rename(name, "away")
    assert sum(resume(options).failed.values()) == 2
    Path("out/shard-00000001.safetensors").unlink()
    Path(name).write_bytes(b"PAR1" + bytes(100))
    assert sum(resume(options).failed.values()) == 2


def test_a_lost_column_fails_only_its_images(folder: Path) -> None:
    write_source("a.parquet", [0, 1])
    write_source("b.parquet", [2, 3])
    rows = replace(ROWS, shard_size=2)
    export(rows, inputs=["a.parquet", "b.parquet"])
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"key": ["k0", "k1"]}), "a.parquet")
    done = resume(rows)
    assert (done.exported, done.failed) == (2, {"unreadable": 2})


def test_a_shard_that_is_written_again_is_checked_as_well(folder: Path) -> None:
    """A shard is written again if its missing image exists now."""
    write_source("a.tar", [0, 1])
    Path("gone.png").write_bytes(tiny_png(9))
    export(SHARDS, inputs=["a.tar", "gone.png"])
    Path("out/shard-00000000.safetensors").unlink()
    os.rename("gone.png", "away.png")
    assert resume(SHARDS).failed == {"missing": 1}
    os.rename("away.png", "gone.png")
    write_source("a.tar", [1, 0])
    before = content()
    with pytest.raises(ExportError, match=r"had the image a\.tar/0\.png when"):
        resume(SHARDS)
    assert content() == before


def test_pages_in_a_tar_keep_their_places(folder: Path) -> None:
    file = BytesIO()
    pages = [Image.new("RGB", (56, 56), (value, 0, 0)) for value in (0, 90, 180)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    options = ExportOptions(shard_size=2, pages="all")
    members = {"a.tif": file.getvalue(), "b.png": tiny_png(1)}
    write_tar("a.tar", members)
    assert export(options, inputs=["a.tar"]).exported == 4
    Path("out/shard-00000001.safetensors").unlink()
    write_tar("a.tar", {**members, "c.png": tiny_png(2)})
    assert resume(options).exported == 4
    Path("out/shard-00000001.safetensors").unlink()
    write_tar("a.tar", dict(reversed(members.items())))
    with pytest.raises(ExportError, match=r"had the image a\.tar/a\.tif#page=1 when.*4 images mo"):
        resume(options)


def test_an_extension_that_omits_recorded_inputs_gives_a_warning(
    growing_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("q").mkdir()
    Path("q/x.png").write_bytes(tiny_png(50))
    extend = replace(SHARDS, extend=True)
    export(SHARDS)
    export(extend, inputs=["p", "q"])
    assert "records these inputs" not in caplog.text
    export(extend, inputs=["q"], encoder=FakeEncoder())
    assert "the export now records these inputs instead of its earlier ones, such as p:" in (
        caplog.text
    )
    assert "10 images not in these inputs, first 0.png: the export keeps" in caplog.text
