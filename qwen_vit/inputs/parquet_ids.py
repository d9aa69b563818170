"""Check that a row of a Parquet file still has the id that it had at the listing."""

import os
from array import array
from bisect import bisect_right
from functools import lru_cache
from threading import Lock
from typing import TypeAlias

from qwen_vit.errors import ExportError, ImageError, display_name
from qwen_vit.images.pages import page_id
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import check_ids, ids_of_groups
from qwen_vit.inputs.parquet_file import cannot_read, open_parquet_file, parquet_file
from qwen_vit.inputs.parquet_pages import CheckedPages

__all__ = ["check_id"]

_File: TypeAlias = tuple[str, int, int, int]  # the path, and values that change with the content
_LOCK = Lock()  # loader threads need one row group at about the same time


def check_id(item: Item) -> None:
    """Raise ImageError if an item's row has another id now.

    The function reads the id column once per row group. It does nothing without `item.id_column`,
    because the id then contains the row's number, or a list gives the id.
    """
    if item.id_column is None or item.row is None:
        return
    status = os.stat(item.source)
    file = item.source, status.st_ino, status.st_size, status.st_mtime_ns
    try:
        with _LOCK:
            starts = _starts(file)
            group = bisect_right(starts, item.row) - 1
            if group + 1 == len(starts):  # a read reports the missing row
                return
            found = _hashes(file, item.id_column, group)[item.row - starts[group]]
    except (ExportError, ImageError, MemoryError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - pyarrow raises many kinds for a damaged file
        raise cannot_read(item.id, error) from None
    suffix = "" if item.page is None else page_id("", item.page)
    if found != hash(item.id.removesuffix(suffix)):
        raise ImageError(
            f"its file {display_name(item.source)} has changed: row {item.row} has another id now",
            name=item.id,
            remedy="restore the listed file",
            code="missing",
        )


def _make_lock() -> None:
    """Replace the lock after a fork, because another thread may have held it."""
    global _LOCK
    _LOCK = Lock()


os.register_at_fork(after_in_child=_make_lock)


@lru_cache(maxsize=16)
def _starts(file: _File) -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    with open_parquet_file(file[0], file[0]) as opened:
        metadata = parquet_file(CheckedPages(opened)).metadata
        starts = [0]
        for group in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(group).num_rows)
        return starts


@lru_cache(maxsize=4)  # shards are read in the order of the rows
def _hashes(file: _File, column: str, group: int) -> "array[int]":
    """Return a hash of each id in a row group, which takes less memory than the ids."""
    with open_parquet_file(file[0], file[0]) as opened:
        pages = CheckedPages(opened)
        parquet = parquet_file(pages)
        check_ids(parquet.schema_arrow, column, file[0])
        ids = ids_of_groups(parquet, pages, column, [group])
        return array("q", (0 if value is None else hash(str(value)) for value in ids))
