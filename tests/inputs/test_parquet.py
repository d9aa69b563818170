"""Test that readers list Parquet files by row, read them as a stream, and report every fault."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs import parquet_rows as parquet_module
from qwen_vit.inputs import read as read_module
from qwen_vit.inputs.find import check_inputs
from qwen_vit.inputs.listing import Item, Listing
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.parquet_file import open_parquet_file
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.inputs import failure
from tests.support.parquet_files import (
    IMAGE,
    LIMITS,
    STRUCT,
    claim_rows,
    items,
    structs,
    tear_rows,
    watch_row_groups,
    write_encrypted,
    write_rows,
)


def refused(*inputs: str, columns: ParquetColumns | None = IMAGE) -> ExportError:
    with pytest.raises(ExportError) as caught:
        items(*inputs, columns=columns)
    return caught.value


# Listing


def test_the_id_of_a_row_is_its_file_and_number(parquet_dir: Path) -> None:
    (parquet_dir / "data").mkdir()
    write_rows("data/b.parquet", structs(range(3)), group=2)
    write_rows("data/a.parquet", structs([3]))
    expected = ["a.parquet:0", "b.parquet:0", "b.parquet:1", "b.parquet:2"]
    for given in ("data", "data/*.parquet"):
        assert [item.id for item in items(given)] == expected
    found = items("data/b.parquet")
    assert found[1] == Item(
        "b.parquet:1", str(parquet_dir / "data/b.parquet"), row=1, column="image"
    )
    assert [read_item(item, LIMITS) for item in found] == [tiny_png(n) for n in range(3)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
def test_bytes_and_structs_are_read(parquet_dir: Path, kind: Any) -> None:
    images = structs(range(25))
    write_rows("x.parquet", images if kind == STRUCT else [i["bytes"] for i in images], kind)
    assert [read_item(item, LIMITS) for item in items("x.parquet")] == [i["bytes"] for i in images]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a", "ü", "c"], ["a", "ü", "c"]),
        ([7, -1, 2**40], ["7", "-1", str(2**40)]),
        (pa.array(["a", "b", "a2"]).dictionary_encode(), ["a", "b", "a2"]),
    ],
)
def test_a_column_gives_the_ids(parquet_dir: Path, ids: Any, expected: list[str]) -> None:
    write_rows("x.parquet", structs(range(3)), key=ids)
    found = items("x.parquet", columns=ParquetColumns("image", "key"))
    assert [item.id for item in found] == expected
    assert [item.row for item in found] == [0, 1, 2]


def test_listing_reads_no_image(parquet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("x.parquet", structs(range(3)), key=["a", "b", "c"])
    data = bytearray(Path("x.parquet").read_bytes())
    first = data.index(b"\x89PNG")
    data[first : first + 100] = bytes(100)
    Path("x.parquet").write_bytes(data)
    assert [i.id for i in items("x.parquet", columns=ParquetColumns("image", "key"))] == [*"abc"]


def test_a_frozen_listing_of_rows_is_an_input(parquet_dir: Path) -> None:
    write_rows("x.parquet", structs(range(3)))
    found = items("x.parquet")
    listing = Listing.save(parquet_dir / "listing.jsonl", found, 2)
    assert listing.shard(1) == found[2:]
    assert items("listing.jsonl", columns=None) == found
    line = {"id": "a", "path": "x.parquet", "row": 2, "column": "image"}
    Path("own.jsonl").write_text(json.dumps(line))
    [item] = items("own.jsonl", columns=None)
    assert read_item(item, LIMITS) == tiny_png(2)


@pytest.mark.parametrize(
    "wrong", [{"row": -1}, {"row": 1.5}, {"row": 0, "column": None}, {"row": 0, "offset": 3}]
)
def test_a_list_with_an_invalid_row_is_refused(parquet_dir: Path, wrong: dict[str, Any]) -> None:
    line = {"id": "a", "path": "x.parquet", "column": "image", "size": 5, **wrong}
    Path("own.jsonl").write_text(json.dumps(line))
    assert "Parquet" in refused("own.jsonl").expected


# Columns


def test_without_a_column_the_error_names_the_image_columns(parquet_dir: Path) -> None:
    (parquet_dir / "data").mkdir()
    write_rows("data/x.parquet", structs([1]), label=[3], mask=pa.array([b"m"]))
    for given in ("data/x.parquet", "data/*.parquet"):
        error = refused(given, columns=None)
        assert "columns of images: image, mask" in error.expected
        assert error.remedy == 'Pass column="image".'
        with pytest.raises(ExportError, match="Pass column"):
            check_inputs([given])
    Path("a.png").write_bytes(tiny_png(1))
    image, other = items("a.png", "data/x.parquet", columns=None)  # as from a shell's *
    assert image.error is None
    assert other.error is not None
    assert other.error[0] == "format"
    assert "column" in other.error[1]


def test_invalid_columns_are_refused() -> None:
    assert ParquetColumns.of(None, None) is None
    for image, key in ((None, "id"), ("", None), ("image", ""), (3, None)):
        with pytest.raises(ArgumentError):
            ParquetColumns.of(image, key)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "fact", "remedy"),
    [
        (pa.array(["a.png"]), "contains string", ".txt"),
        (
            pa.array(["https://x/a.png"], pa.large_string()),
            "contains large_string",
            "Download any images",
        ),
        (pa.nulls(1), "contains null", "has none"),
        (pa.array([[b"x"]]), "contains list<", "one image per row"),
        (pa.array([[{"bytes": b"x"}]]), "contains list<", "one image per row"),
        (pa.array([1]), "contains int64", "column of bytes"),
        (pa.array([{"url": "a", "w": 1}]), "contains struct<", "{bytes, path}"),
        (pa.array([{"bytes": "text"}]), "contains struct<", "{bytes, path}"),
        (pa.array([{"image": {"bytes": b"x"}}]), "contains struct<", "{bytes, path}"),
    ],
)
def test_a_column_without_images_is_refused(
    parquet_dir: Path, values: Any, fact: str, remedy: str
) -> None:
    pq.write_table(pa.table({"image": values}), "x.parquet")
    error = refused("x.parquet")
    assert fact in error.fact
    assert remedy in error.remedy
    assert error.name == "x.parquet"


@pytest.mark.parametrize("values", [pa.array([1.5]), pa.array([["a"]]), pa.array([b"a"])])
def test_ids_of_another_type_are_refused(parquet_dir: Path, values: Any) -> None:
    write_rows("x.parquet", structs([0]), key=values)
    assert "id_column" in refused("x.parquet", columns=ParquetColumns("image", "key")).remedy


def test_the_error_of_a_missing_column_names_the_existing_columns(parquet_dir: Path) -> None:
    write_rows("x.parquet", structs([0]), label=[1])
    error = refused("x.parquet", columns=ParquetColumns("picture"))
    assert (error.fact, error.expected) == ("no column picture", "one of its columns: image, label")
    error = refused("x.parquet", columns=ParquetColumns("image", "key"))
    assert error.fact == "no column key"


def test_files_of_different_schemas_are_one_error(parquet_dir: Path) -> None:
    (parquet_dir / "data").mkdir()
    write_rows("data/a.parquet", structs([0]))
    pq.write_table(pa.table({"picture": [b"x"]}), "data/b.parquet")
    error = refused("data")
    assert error.name == "b.parquet"
    assert "only files that contain it" in error.remedy
    # one file has bytes, and the other has structs
    write_rows("data/b.parquet", [tiny_png(1)], pa.binary(), other=[1])
    assert [read_item(item, LIMITS) for item in items("data")] == [tiny_png(0), tiny_png(1)]


def test_null_and_repeated_ids_are_errors(parquet_dir: Path) -> None:
    write_rows("x.parquet", structs(range(4)), key=["a", None, "", "d"])
    found = items("x.parquet", columns=ParquetColumns("image", "key"))
    assert [item.id for item in found] == ["a", "x.parquet:1", "x.parquet:2", "d"]
    assert [failure(item).code for item in found[1:3]] == ["null", "null"]
    write_rows("y.parquet", structs(range(3)), key=["a", "b", "a"])
    found = items("y.parquet", columns=ParquetColumns("image", "key"))
    with pytest.raises(
        ExportError, match=r"^a: two images have this id, .*y\.parquet, row 2\."
    ) as e:
        Listing.save(parquet_dir / "listing", found, 10)
    assert "id_column" in e.value.remedy


# Rows


def test_null_rows_and_paths_are_single_failures(parquet_dir: Path) -> None:
    images = [structs([0])[0], None, {"bytes": None, "path": "cat.png"}, structs([3])[0]]
    write_rows("x.parquet", images)
    first, null, path, last = items("x.parquet")
    assert failure(null).code == failure(path).code == "null"
    assert str(null.id) in str(failure(null))
    assert "cat.png" in failure(path).fact
    assert ".txt" in failure(path).remedy
    assert read_item(first, LIMITS) == tiny_png(0)
    assert read_item(last, LIMITS) == tiny_png(3)


def test_a_file_that_is_not_parquet_is_one_failure(parquet_dir: Path) -> None:
    write_rows("whole.parquet", structs(range(5)))
    good_bytes = Path("whole.parquet").read_bytes()
    for content in (
        b"",
        b"PAR1",
        good_bytes[: len(good_bytes) // 2],
        good_bytes[:-20] + bytes(20),
        b"<html>",
    ):
        Path("x.parquet").write_bytes(content)
        [item] = items("x.parquet")
        error = failure(item)
        assert (item.id, error.code) == ("x.parquet", "damaged"), content
        assert error.remedy == "" or "download the file again" in str(error).lower()


@pytest.mark.parametrize("plain_footer", [False, True])
def test_encryption_is_named(parquet_dir: Path, plain_footer: bool) -> None:
    """A request for an encrypted column's size makes pyarrow end the process without an
    exception."""
    write_encrypted("x.parquet", structs(range(3)), plain_footer=plain_footer)
    found = items("x.parquet")
    assert len(found) == (3 if plain_footer else 1)
    for item in found:
        error = failure(item)
        assert error.code == "unreadable"
        assert "encrypted" in str(error)


def test_a_torn_row_group_affects_no_other_group(parquet_dir: Path) -> None:
    write_rows("x.parquet", structs(range(30)), group=10)
    tear_rows(parquet_dir / "x.parquet", tiny_png(14))
    found = items("x.parquet")
    codes = {}
    for item in found:
        try:
            assert read_item(item, LIMITS) == tiny_png(item.row or 0)
        except ImageError as error:
            codes[item.row] = error.code
    assert codes == dict.fromkeys(range(10, 20), "damaged")


def test_a_torn_row_group_is_read_once(parquet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of such a group once read the whole group again."""
    write_rows("x.parquet", structs(range(200)), group=200)
    tear_rows(parquet_dir / "x.parquet", tiny_png(150))
    read_groups = watch_row_groups(monkeypatch)
    for item in items("x.parquet"):
        failure(item)
    assert read_groups == [0]


def test_a_torn_page_affects_no_earlier_row(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader meets the page while it reads ahead, or before a row of the next group."""
    images = [tiny_png(row) for row in range(12)]
    pq.write_table(
        pa.table({"image": images}), "x.parquet", row_group_size=8, write_page_checksum=True,
        compression="none", use_dictionary=False, data_page_size=1, write_batch_size=1,
        write_statistics=False,
    )  # fmt: skip
    tear_rows(parquet_dir / "x.parquet", tiny_png(6))
    for row, item in enumerate(items("x.parquet")):
        if row in (6, 7):
            assert failure(item).code == "damaged"
        else:
            assert read_item(item, LIMITS) == images[row]
    monkeypatch.setattr(parquet_module, "AHEAD_ROWS", 1)
    reader = parquet_module._Reader("x.parquet", "image", None)
    assert [reader.value(row) for row in (4, 5, 8, 9)] == [images[row] for row in (4, 5, 8, 9)]
    reader.close()


def test_a_row_that_is_read_again_counts_once(parquet_dir: Path) -> None:
    """If the second read counted again, the reader would look for a row to drop, and raise
    StopIteration."""
    write_rows("x.parquet", structs(range(8)))
    reader = parquet_module._Reader("x.parquet", "image", None)
    reader.value(4)
    reader._begin_at(0)
    reader._read_ahead(7)
    assert len(reader.kept) == 8
    assert reader._kept_bytes == sum(map(parquet_module._n_bytes, reader.kept.values()))
    reader.close()


def test_all_fields_of_a_row_count_and_unused_fields_are_dropped(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "AHEAD_BYTES", 5_000)
    rows = [{"bytes": tiny_png(0), "path": "p" * 2_000, "mask": b"m" * 9_000}] * 8
    kind = pa.struct([*STRUCT, ("mask", pa.binary())])
    write_rows("x.parquet", rows, kind)
    reader = parquet_module._Reader("x.parquet", "image", None)
    assert reader.value(0) == {"bytes": tiny_png(0), "path": "p" * 2_000}
    assert len(reader.kept) == 2
    reader.close()


def test_a_file_that_changed_after_the_listing_is_an_error(parquet_dir: Path) -> None:
    write_rows("x.parquet", structs(range(3)))
    *_, last = items("x.parquet")
    write_rows("x.parquet", structs(range(2)))
    assert failure(last).code == "missing"
    assert "no longer has row 2" in failure(last).fact
    pq.write_table(pa.table({"image": ["text"]}), "x.parquet")
    assert failure(last).code == "unreadable"
    Path("x.parquet").write_bytes(b"garbage" * 100)
    assert failure(last).code == "damaged"
    Path("x.parquet").unlink()
    assert failure(last).code == "missing"


def test_a_transient_error_is_retried(parquet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows("x.parquet", structs(range(3)))
    [first, *_] = items("x.parquet")
    opened = open_parquet_file
    calls: list[Any] = []

    class Flaky:
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int = -1) -> bytes:
            if len(calls) == 1:
                calls.append("failed")
                raise OSError(5, "Input/output error")
            return self.file.read(size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def flaky(path: str, name: str, version: str | None) -> Any:
        calls.append("opened")
        return Flaky(opened(path, name, version))

    monkeypatch.setattr(parquet_module, "open_parquet_file", flaky)
    monkeypatch.setattr(read_module, "PAUSES_S", (0, 0))
    assert read_item(first, LIMITS) == tiny_png(0)
    assert calls == ["opened", "failed", "opened"]


def test_a_row_above_the_limit_is_refused(parquet_dir: Path) -> None:
    write_rows("x.parquet", [bytes(1_000)], pa.binary())
    [item] = items("x.parquet")
    with pytest.raises(ImageError) as caught:
        read_item(item, ImageLimits(max_file_bytes=999))
    assert caught.value.code == "file-too-large"


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("columns", [IMAGE, ParquetColumns("image", "key")])
def test_a_footer_that_claims_a_trillion_rows_is_refused(
    tmp_path: Path, columns: ParquetColumns, in_groups: bool
) -> None:
    """A file of 1,600 bytes once gave an endless listing."""
    path = tmp_path / "a.parquet"
    write_rows(path, structs(range(3)), key=["a", "b", "c"])
    claim_rows(path, 3, 10**12, in_groups=in_groups)
    [item] = items(str(path), columns=columns)
    assert item.error is not None
    assert item.error[0] == ("slow" if in_groups else "damaged")
    assert "rows" in item.error[1]
