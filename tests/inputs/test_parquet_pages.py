"""Test that page headers of a Parquet file cannot claim more memory than the file needs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from qwen_vit.images.memory import set_decoding_memory
from qwen_vit.inputs import parquet as listing_module
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.parquet_pages import page_header
from qwen_vit.inputs.read import read_item
from tests.support.inputs import failure
from tests.support.parquet_files import (
    LIMITS,
    STRUCT,
    claim_page,
    items,
    structs,
    varint,
    write_rows,
)

ZEROS = [bytes(300_000)] * 4
WITH_IDS = ParquetColumns("image", "key")
WRITTEN: list[dict[str, Any]] = [
    {},
    {"use_dictionary": False, "data_page_size": 1},
    {"data_page_version": "2.0", "write_page_checksum": True},
    {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    *({"compression": each} for each in ("none", "snappy", "gzip", "brotli", "lz4", "zstd")),
]


@pytest.fixture
def little_memory() -> Iterator[None]:
    set_decoding_memory(1_000_000)
    yield
    set_decoding_memory(None)


@pytest.mark.parametrize("options", WRITTEN, ids=str)
@pytest.mark.parametrize("values", [structs(range(30)), [None, *structs([1])] * 300])
def test_undamaged_files_of_every_kind_are_read(
    parquet_dir: Path, options: dict[str, Any], values: list[Any]
) -> None:
    keys = [f"key {row}" for row in range(len(values))]
    table = pa.table({"image": pa.array(values, STRUCT), "key": keys})
    pq.write_table(table, "x.parquet", row_group_size=13, write_batch_size=2, **options)
    found = items("x.parquet", columns=WITH_IDS)
    assert [item.id for item in found] == keys
    for item, value in zip(found, values, strict=True):
        if value is None:
            assert failure(item).code == "null"
        else:
            assert read_item(item, LIMITS) == value["bytes"]


def test_images_beyond_one_read_of_their_column_are_read(parquet_dir: Path) -> None:
    """pyarrow reads the columns of bytes and paths alternately, in reads of limited size."""
    values = [{"bytes": os.urandom(700_000), "path": f"{n}.png"} for n in range(4)]
    pq.write_table(
        pa.table({"image": pa.array(values, STRUCT)}), "x.parquet", data_page_size=1,
        write_batch_size=1, use_dictionary=False,
    )  # fmt: skip
    assert [read_item(item, LIMITS) for item in items("x.parquet")] == [
        value["bytes"] for value in values
    ]


@pytest.mark.parametrize("column", [0, 1])
def test_a_page_larger_than_its_column_is_refused(parquet_dir: Path, column: int) -> None:
    """pyarrow would allocate 67 MB and fill them with zeros."""
    pq.write_table(
        pa.table({"image": ZEROS, "key": [f"{n:300000}" for n in range(4)]}), "x.parquet",
        compression="none", use_dictionary=False,
    )  # fmt: skip
    claim_page("x.parquet", column, compressed=2**26 - 1)
    first, *_ = items("x.parquet", columns=WITH_IDS)
    assert failure(first).code == "damaged"
    assert "a page claims 67,108,863 bytes" in str(failure(first))


def test_a_page_that_cannot_decompress_to_its_size_is_refused(parquet_dir: Path) -> None:
    pq.write_table(
        pa.table({"image": ZEROS}), "x.parquet", compression="zstd", use_dictionary=False
    )
    claim_page("x.parquet", 0, uncompressed=2**26 - 1)
    first, *_ = items("x.parquet")
    assert "claims 67,108,863 after decompression" in str(failure(first))


def test_a_page_above_the_memory_is_refused(parquet_dir: Path, little_memory: None) -> None:
    for compression in ("none", "zstd"):
        pq.write_table(
            pa.table({"image": ZEROS}), "x.parquet", compression=compression, use_dictionary=False
        )
        for item in items("x.parquet"):
            assert failure(item).code == "memory"
            assert "page needs 1,200" in str(failure(item))


def test_a_page_of_ids_has_a_separate_limit(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "MAX_ID_PAGE_BYTES", 10)
    write_rows("x.parquet", structs(range(4)), key=["a", "b", "c", "d"])
    [item] = items("x.parquet", columns=WITH_IDS)
    assert item.error is not None
    assert item.error[0] == "memory"
    assert item.error[1].startswith("x.parquet: its Parquet page needs ")


def test_rows_that_repeat_one_image_need_the_memory_of_one(parquet_dir: Path) -> None:
    """50 rows have one dictionary value of 1 MB, and pyarrow copies it for each row of a batch."""
    rows = 50
    image, key = bytes(1_000_000), "k" * 1_000_000
    table = pa.table({"image": pa.array([image] * rows), "key": pa.array([key] * rows)})
    pq.write_table(table, "x.parquet", compression="snappy", dictionary_pagesize_limit=2**22)
    del table
    before, most = pa.total_allocated_bytes(), 0
    found = listing_module.parquet_items("x.parquet", "x", WITH_IDS)
    listed = []
    for item in found:
        listed.append(len(item.id))
        most = max(most, pa.total_allocated_bytes() - before)
    assert listed == [len(key)] * rows
    for item in items("x.parquet"):
        assert len(read_item(item, LIMITS)) == len(image)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 16 * 2**20


def test_only_complete_page_headers_are_parsed() -> None:
    header = bytes([0x15, 0, 0x15, *varint(70_000), 0x15, *varint(500), 0x15, 8])  # and a checksum
    header += bytes([0x1C, 0x15, 6, 0x11, 0x12, 0x18, 3, *b"abc", 0x17, *bytes(8), 0, 0])
    found = page_header(header + b"next")
    assert found is not None
    assert found[:3] == (len(header), 70_000, 500)
    assert {page_header(header[:at]) for at in range(len(header))} == {None}


@pytest.mark.parametrize(
    "header",
    [
        bytes([0x15, 0, 0]),  # without sizes
        bytes([0x19, 0xF5]),  # a list
        bytes([0x1C]) * 100,  # structs in structs
        bytes([0x11]) * 2_000,
        bytes([0x15, *b"\xff" * 20]),
    ],
)
def test_other_structures_are_refused(header: bytes) -> None:
    with pytest.raises(ValueError, match="header of a page"):
        page_header(header + bytes(10))


def test_the_last_size_counts() -> None:
    """If a field occurs twice, Thrift uses the second value."""
    first, second = b"\x15" + varint(5), b"\x05\x06" + varint(2**30)
    header = b"\x15\x00" + first + first + second + b"\0"
    found = page_header(header)
    assert found is not None
    assert found[:3] == (len(header), 5, 2**30)
    assert page_header(header[:-1] + b"\x05\x06" + varint(7) + b"\0") is not None
