"""Test that encoded values of a Parquet file cannot claim more memory than they need."""

import random
from itertools import count
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from qwen_vit.errors import ImageError
from qwen_vit.inputs import parquet as listing_module
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.parquet_delta import decompressed, without_levels
from qwen_vit.inputs.read import read_item
from tests.support.inputs import failure
from tests.support.parquet_files import (
    LIMITS,
    change_values,
    equal_lengths,
    items,
    unsigned,
    varint,
)
from tests.support.process_memory import peak_mb

LENGTHS, PREFIXES, NUMBERS = "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "DELTA_BINARY_PACKED"
SPLIT = "BYTE_STREAM_SPLIT"
WITH_KEYS = ParquetColumns("image", "key")
CLAIMED = 2**25  # lengths, for which pyarrow allocates 128 MB


def some_bytes(rows: int) -> list[bytes | None]:
    """Return values of many lengths with common prefixes, nulls and empty values."""
    rng = random.Random(0)
    start = rng.randbytes(5_000)
    values: list[bytes | None] = [None, b"", start, b""]
    for _ in range(rows - len(values)):
        values.append(start[: rng.randrange(300)] + rng.randbytes(rng.randrange(100)))
    return values


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", [LENGTHS, PREFIXES])
def test_undamaged_files_keep_their_bytes(
    parquet_dir: Path, encoding: str, version: str, compression: str
) -> None:
    values = some_bytes(300)
    table = pa.table(
        {
            "image": values,
            "key": [f"train/images/of/one/folder/{row:05}" for row in range(300)],
            "boxed": [{"bytes": value, "boxes": [[1, 2], [], [row]]} for row, value in
                      enumerate(values)],
            "number": pa.array(range(300), pa.int64()),
            "split": pa.array(range(300), pa.int32()),
        }
    )  # fmt: skip
    encodings = {"image": encoding, "key": encoding, "number": NUMBERS, "split": SPLIT}
    boxes = "boxed.boxes.list.element.list.element"
    pq.write_table(
        table, "x.parquet", version="2.6", data_page_version=version, compression=compression,
        row_group_size=200, data_page_size=3_000, write_batch_size=16, use_dictionary=False,
        column_encoding={**encodings, "boxed.bytes": encoding, boxes: NUMBERS},
    )  # fmt: skip
    for image, key in (("image", "key"), ("boxed", "number"), ("image", "split")):
        found = items("x.parquet", columns=ParquetColumns(image, key))
        assert [item.id for item in found] == [str(each) for each in table[key].to_pylist()]
        for item, value in zip(found, values, strict=True):
            if value is None:
                assert failure(item).code == "null"
            else:
                assert read_item(item, LIMITS) == value


@pytest.mark.parametrize(
    "values", [[b"a" * 5_000_000, b"a" * 4_000_000 + b"b" * 3_000_000], [None, None]]
)
def test_pages_larger_than_a_read_and_pages_of_nulls_are_read(
    parquet_dir: Path, values: list[bytes | None]
) -> None:
    pq.write_table(
        pa.table({"image": pa.array(values, pa.binary())}), "x.parquet", compression="snappy",
        use_dictionary=False, column_encoding=PREFIXES,
    )  # fmt: skip
    for item, value in zip(items("x.parquet"), values, strict=True):
        if value is None:
            assert failure(item).code == "null"
        else:
            assert read_item(item, LIMITS) == value


@pytest.mark.parametrize(
    ("encoding", "values", "reason"),
    [
        (LENGTHS, equal_lengths(CLAIMED), f"claims {CLAIMED:,} lengths, but it has at most 4"),
        (PREFIXES, equal_lengths(CLAIMED), f"claims {CLAIMED:,} lengths, but it has at most 4"),
        (
            PREFIXES,
            equal_lengths(4, per_block=128) + equal_lengths(CLAIMED),
            f"claims {CLAIMED:,} lengths, but it has at most 4",
        ),
        (LENGTHS, equal_lengths(CLAIMED, per_block=2**25), "blocks of 33,554,432 values"),
        (LENGTHS, unsigned(128) + unsigned(2**26) + b"\1\0", "in 67,108,864 miniblocks"),
        (LENGTHS, unsigned(128) + b"\x08\x04\0", "miniblocks of 16 values"),
        (PREFIXES, equal_lengths(4, 2**30, per_block=128), "a prefix is longer than its page"),
        (PREFIXES, unsigned(128) + b"\1\4\0\0\x21", "lengths of 33 bits"),
        (PREFIXES, bytes([128, 128, 128, 128, 128, 1]), "a number that is too long"),
        (PREFIXES, unsigned(2**20) + b"\1\4\0\0\x20", "the lengths of a page end early"),
    ],
    ids=count(),
)
@pytest.mark.parametrize("column", [0, 1])
def test_claimed_lengths_are_refused(
    parquet_dir: Path, encoding: str, values: bytes, reason: str, column: int
) -> None:
    """pyarrow would allocate 4 bytes for each length."""
    rows = [f"{row:5000}" for row in range(4)]
    pq.write_table(
        pa.table({"image": [row.encode() for row in rows], "key": rows}), "x.parquet",
        compression="none", use_dictionary=False, column_encoding=encoding,
    )  # fmt: skip
    change_values("x.parquet", column, values)
    pa.default_memory_pool().release_unused()
    before = peak_mb(forget=True)
    refused = failure(items("x.parquet", columns=WITH_KEYS)[0])
    assert peak_mb() - before < 32
    assert reason in str(refused)
    assert refused.code == "damaged"


def test_claimed_blocks_of_numbers_are_refused(parquet_dir: Path) -> None:
    pq.write_table(
        pa.table({"image": [b"a"] * 100, "key": range(100)}), "x.parquet", compression="none",
        use_dictionary=["image"], column_encoding={"key": NUMBERS},
    )  # fmt: skip
    change_values("x.parquet", 1, unsigned(2**32 - 128) + unsigned(2**27 - 4))
    [item] = items("x.parquet", columns=WITH_KEYS)
    assert "a page has blocks of 4,294,967,168 values" in str(failure(item))


@pytest.mark.parametrize("claimed", [2**20, 2**31 - 1])
def test_a_dictionary_that_claims_values_is_refused(parquet_dir: Path, claimed: int) -> None:
    """pyarrow would allocate 16 bytes for each value: 34 GB, or a MemoryError under `ulimit -v`."""
    pq.write_table(pa.table({"image": [bytes(3_000)] * 4}), "x.parquet", compression="none")
    magic, header, rest = b"PAR1", b"\x4c\x15", Path("x.parquet").read_bytes()[4:]
    sizes, one_value, rest = rest.partition(header + varint(1))
    assert one_value
    longer = len(varint(claimed)) - len(varint(1))
    # so that the next page keeps its offset
    fewer = sizes.replace(varint(3_004), varint(3_004 - longer))
    assert fewer != sizes
    image = rest.index(bytes(3_000))
    rest = rest[:image] + rest[image + longer :]
    Path("x.parquet").write_bytes(magic + fewer + header + varint(claimed) + rest)
    first = items("x.parquet")[0]
    assert f"claims {claimed:,} values" in str(failure(first))


def test_a_dictionary_above_the_memory_is_refused(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "MAX_ID_PAGE_BYTES", 100_000)
    keys = [f"{row:04}" for row in range(1_000)]
    pq.write_table(pa.table({"image": [b"a"] * 1_000, "key": keys}), "x.parquet")
    [item] = items("x.parquet", columns=WITH_KEYS)
    assert "its Parquet page needs 136,000 bytes. Expected at most 100,000" in str(failure(item))


def test_long_ids_are_refused(parquet_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "MAX_NAME_BYTES", 10)
    pq.write_table(pa.table({"image": [b"a"] * 3, "key": ["k" * 10, "é" * 6, "z"]}), "x.parquet")
    whole, long, last = items("x.parquet", columns=WITH_KEYS)
    assert (whole.id, whole.error, last.id) == ("k" * 10, None, "z")
    assert long.id == "x.parquet:1"
    assert failure(long).code == "damaged"
    assert "its id in column key has 12 bytes. Expected at most 10. Shorten" in str(failure(long))


def test_ids_that_share_long_beginnings_have_a_limit(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 MB of such ids can be 100 GB in a listing."""
    monkeypatch.setattr(listing_module, "MANY_ID_BYTES", 50_000)
    keys = [f"{'k' * 1_000}{row:04}" for row in range(1_000)]
    pq.write_table(
        pa.table({"image": [b"a"] * 1_000, "key": keys}), "x.parquet", use_dictionary=False,
        column_encoding={"key": PREFIXES},
    )  # fmt: skip
    *whole, last = items("x.parquet", columns=WITH_KEYS)
    assert [item.id for item in whole] == keys[:49]
    assert failure(last).code == "slow"
    assert "its first 50 ids in column key have 50,200 bytes" in str(failure(last))


def test_lz4_of_hadoop_is_refused_and_raw_lz4_is_read() -> None:
    content = b"delta" * 1_000
    raw = pa.Codec("lz4_raw").compress(content, asbytes=True)
    assert bytes(decompressed(memoryview(raw), len(content), "LZ4")) == content
    framed = len(content).to_bytes(4, "big") + len(raw).to_bytes(4, "big") + raw
    with pytest.raises(ImageError, match="another compression") as caught:
        decompressed(memoryview(framed), len(content), "LZ4")
    assert caught.value.code == "unreadable"


def test_levels_of_both_encodings_end_before_the_values() -> None:
    levels = bytes([3, 0, 0, 0, 9, 9, 9])
    data = memoryview(levels + bytes(4) + b"values")
    assert bytes(without_levels(data, ((1, 3), (2, 4)), 13)) == b"values"
    assert bytes(without_levels(data, ((0, 3), (1, 3)), 13)) == bytes(4) + b"values"
