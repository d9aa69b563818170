"""Test that threads read Parquet rows in any order, with few readers and little memory."""

import io
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from qwen_vit.inputs import parquet_file as file_module
from qwen_vit.inputs import parquet_rows as parquet_module
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.parquet_files import (
    LIMITS,
    items,
    structs,
    watch_row_groups,
    write_rows,
)


def order(name: str, rows: int) -> Sequence[int]:
    if name == "forward":
        return range(rows)
    if name == "parts":
        return [row for row in range(rows) if row // 7 % 3 == 1]
    return random.Random(0).sample(range(rows), rows)


@pytest.mark.parametrize("how", ["forward", "parts", "random"])
def test_threads_get_their_rows_in_any_order(
    parquet_dir: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_module, "AHEAD_BYTES", 500)
    monkeypatch.setattr(parquet_module, "KEPT_ROWS", 5)
    for name, start in (("a", 0), ("b", 100)):
        write_rows(f"{name}.parquet", structs(range(start, start + 100)), group=13)
    found = items("a.parquet", "b.parquet")
    wanted = [found[row] for row in order(how, 200)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda item: read_item(item, LIMITS), wanted))
    assert read == [tiny_png(found.index(item)) for item in wanted]


def test_rows_in_order_read_each_group_once(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows("x.parquet", structs(range(600)), group=100)
    begun = watch_row_groups(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: read_item(item, LIMITS), items("x.parquet")))
    assert begun == [*range(6)]


def test_only_pages_of_the_column_are_held(
    parquet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row group has 40 MB, and another column has the same size."""

    class Counted(io.FileIO):
        reads: ClassVar[list[int]] = []

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size) or b""
            self.reads.append(len(data))
            return data

    monkeypatch.setattr(parquet_module, "open_parquet_file", lambda path, *_: Counted(path))
    rows = [bytes([n]) * 200_000 for n in range(200)]
    table = pa.table({"image": pa.array(rows), "other": pa.array(rows)})
    pq.write_table(
        table, "x.parquet", row_group_size=200, write_batch_size=1, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    del table
    before, most = pa.total_allocated_bytes(), 0
    for item in items("x.parquet"):
        assert read_item(item, LIMITS) == rows[item.row or 0]
        most = max(most, pa.total_allocated_bytes() - before)
    kept = [len(reader.kept) for reader in parquet_module._READERS._readers]
    largest, total = max(Counted.reads), sum(Counted.reads)
    print(
        f"{most / 2**20:.1f} MiB in Arrow, {largest:,} bytes a read, {total:,} in all, kept {kept}"
    )
    assert most < 12 * 2**20
    assert largest < 2 * file_module.BUFFER_BYTES
    assert total < 1.1 * sum(map(len, rows))
    assert kept == [0]


def test_the_number_of_readers_and_open_files_is_limited(parquet_dir: Path) -> None:
    found = []
    for number in range(10):
        write_rows(f"{number}.parquet", structs([number, number + 1]))
        found += items(f"{number}.parquet")
    threads = threading.active_count()
    for item in found:
        read_item(item, LIMITS)
    assert len(parquet_module._READERS._readers) == parquet_module.MAX_READERS
    assert threading.active_count() == threads
