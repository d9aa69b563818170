"""Test that an export of Parquet files equals an export of the same images as files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support import store_stress
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.parquet_files import structs, tear_rows, write_rows

OPTIONS = ExportOptions(shard_size=8, column="image")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with two Parquet files of 20 rows in `data`, and one row without
    an image."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_rows("data/a.parquet", structs(range(20)), group=6, key=[f"k{n}" for n in range(20)])
    images = [*structs(range(20, 33)), None, *structs(range(34, 40))]
    write_rows("data/b.parquet", images, group=6, key=[f"k{n}" for n in range(20, 40)])
    return tmp_path


def export(out: str = "out", options: ExportOptions = OPTIONS, *inputs: str) -> Any:
    encoder: Any = FakeEncoder()
    return export_features(encoder, inputs or ("data/*.parquet",), out, options)


def shards(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("shard-*")}


def test_rows_have_the_features_of_the_same_files(data: Path) -> None:
    done = export()
    assert (done.exported, done.failed) == (39, {"null": 1})
    for number in range(40):
        Path(f"{number:02}.png").write_bytes(tiny_png(number))
    export("files", ExportOptions(shard_size=8), "*.png")
    stored, files = load_features("out"), load_features("files")
    [failed] = stored.errors
    assert (failed.id, failed.code, failed.stage) == ("b.parquet:13", "null", "read")
    names = [f"{'ab'[n // 20]}.parquet:{n % 20}" for n in range(40)]
    assert [name for name in names if name != failed.id] == list(stored.ids)
    for number, name in enumerate(names):
        if name != failed.id:
            assert stored[name].embeds.equal(files[f"{number:02}.png"].embeds)


def test_parts_and_resuming_give_the_same_bytes(data: Path) -> None:
    export("whole")
    for number in (3, 1, 2):
        export("parts", ExportOptions(shard_size=8, column="image", part=(number, 3)))
    assert shards("parts") == shards("whole")
    for name in ("shard-00000001.safetensors", "shard-00000004.safetensors"):
        Path("parts", name).unlink()
    assert export("parts").exported == 39
    assert shards("parts") == shards("whole")
    Path("parts/shard-00000002.safetensors").unlink()
    # the frozen listing contains the column
    export("parts", ExportOptions(shard_size=8), "parts/listing.jsonl")
    assert shards("parts") == shards("whole")


def test_another_column_of_ids_is_another_export(data: Path) -> None:
    export()
    keyed = ExportOptions(shard_size=8, column="image", id_column="key")
    with pytest.raises(ExportError, match=r"its images: 40 missing, first a\.parquet:0; 40 new"):
        export("out", keyed)
    export("keyed", keyed)
    keyed_ids = load_features("keyed").ids
    assert list(keyed_ids)[:3] == ["k0", "k1", "k2"]


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """Run a part of `python -m tools.checks.soak parquet`."""
    store_stress.flat_memory_of_parquet(tmp_path, images=1_500, first=500)


def test_a_torn_row_group_becomes_failures(data: Path) -> None:
    tear_rows(data / "data/a.parquet", tiny_png(8))
    done = export()
    assert done.failed == {"damaged": 6, "null": 1}
    assert [e.id for e in load_features("out").errors][:2] == ["a.parquet:6", "a.parquet:7"]


def test_an_estimate_counts_rows(data: Path) -> None:
    encoder: Any = FakeEncoder()
    found = estimate_export(encoder, ["data"], OPTIONS)
    assert (found.images, found.unreadable, found.rows) == (40, 1, 39 * 4)


def test_options_refuse_ids_without_images() -> None:
    with pytest.raises(ArgumentError, match="Pass column as well"):
        ExportOptions(id_column="key")


def test_commands_take_columns(data: Path, qwen_vit: Callable[..., Any]) -> None:
    write_rows("data/a.parquet", structs(range(2)), key=["k0", "k1"])
    arguments = ("data/a.parquet", "--model", "tiny", "--device", "cpu", "--out")
    done = qwen_vit("encode", *arguments, "x.safetensors")
    assert (done.code, done.err.count("Pass --column image")) == (2, 1)
    done = qwen_vit("export", *arguments, "out")
    assert (done.code, done.err.count("Pass --column image")) == (2, 1)
    done = qwen_vit("export", "data", *arguments[1:], "out")
    assert (done.code, done.err.count("To read Parquet files, pass --column")) == (2, 1)
    columns = ("--column", "image", "--id-column", "key")
    done = qwen_vit("encode", *arguments, "x.safetensors", *columns)
    assert done.code == 0, done.err
    assert list(load_features("x.safetensors").ids) == ["k0", "k1"]
    done = qwen_vit("export", *arguments, "out", *columns, "--json", "--yes")
    assert (done.code, json.loads(done.out)["exported"]) == (0, 2), done.err


def test_the_error_of_a_listing_has_no_option_of_python(
    data: Path, qwen_vit: Callable[..., Any]
) -> None:
    """The listing stores the text, which both interfaces show."""
    write_rows("data/c.parquet", structs(range(3)), key=["k0", None, "k" * 10_000])
    Path("a.png").write_bytes(tiny_png(0))
    common = ("--model", "tiny", "--device", "cpu", "--out")
    columns = ("--column", "image", "--id-column", "key")
    done = qwen_vit("export", "data/c.parquet", *common, "out", *columns)
    assert "c.parquet:1: its id in column key is null. Fill that column, or use" in done.err
    done = qwen_vit("export", "data/c.parquet", "a.png", *common, "other")
    assert "one of its columns of images: image. Name that column." in done.err


@pytest.mark.parametrize("table", ["features.parquet", "out/manifest.parquet"])
def test_a_table_of_features_is_not_a_table_of_images(data: Path, table: str) -> None:
    """Its only column of bytes contains ids, and the error once proposed this column."""
    export()
    load_features("out").to_parquet("features.parquet")
    with pytest.raises(ExportError, match="a table of features, without images") as caught:
        export("other", ExportOptions(), table)
    assert "id_bytes" not in str(caught.value)
