"""Read rows of Parquet files as a stream.

A reader reads row groups forward, page by page, and only the pages of one column. Loader threads
request rows in about the order of the listing, so all threads of a process share a few readers.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock
from typing import Any, BinaryIO, TypeAlias

from qwen_vit.common.storage import is_remote, storage_errors
from qwen_vit.errors import ExportError, ImageError, display_name
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet_file import (
    cannot_read,
    check_images,
    open_parquet_file,
    parquet_file,
)
from qwen_vit.inputs.parquet_ids import check_id
from qwen_vit.inputs.parquet_pages import CheckedPages

__all__ = ["read_row"]

AHEAD_BYTES, AHEAD_ROWS = 2**22, 256  # read in one go
FIELDS = ("bytes", "path")  # of a struct, which may have other large fields
MAX_READERS = 4  # a Ray worker reads two shards at a time
KEPT_BYTES, KEPT_ROWS = 2**26, 256  # before the newest row, for threads that request a row late


def read_row(item: Item) -> bytes:
    if item.row is None or item.column is None:
        raise TypeError(f"{item} is not a Parquet row")
    try:
        check_id(item)
        value = _READERS.value((item.source, item.column, item.version), item.row)
    except ImageError as error:
        raise ImageError.of(error, name=item.id, code=error.code) from error.__context__
    except IndexError:
        raise ImageError(
            f"its file {display_name(item.source)} no longer has row {item.row}",
            name=item.id,
            remedy="restore the listed file",
            code="missing",
        ) from None
    except FileNotFoundError:
        raise ImageError(
            f"its file {display_name(item.source)} does not exist",
            name=item.id,
            remedy="restore the file",
            code="missing",
        ) from None
    except ExportError as error:
        raise ImageError.of(error, name=item.id, code="unreadable") from None
    except OSError as error:
        if is_remote(item.source):
            fact, remedy, code = storage_errors(error)
            fact = f"its object {display_name(item.source)} {fact}"
            raise ImageError(fact, name=item.id, remedy=remedy, code=code) from error
        raise cannot_read(item.id, error) from error
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    if isinstance(value, bytes):
        return value
    only_path = f"; its path is {display_name(path)}" if isinstance(path, str) and path else ""
    raise ImageError(
        f"the row contains no image (null){only_path}",
        name=item.id,
        remedy="store the image's bytes in the column, or list the paths in a .txt file"
        if only_path
        else "remove the row, or store its image",
        code="null",
    )


class _Reader:
    """Read one column of one file forward, and keep recently skipped rows."""

    def __init__(self, path: str, column: str, version: str | None) -> None:
        self.lock = Lock()
        self.is_closed = False
        self.next_row, self._reading = 0, -1  # the first unread row, and its group
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self._kept_bytes = 0
        self._path, self._column, self._version = path, column, version
        self._file: BinaryIO | None = None
        self._starts: list[int] = []
        self._batches: Iterator[Any] = iter(())
        self._torn: dict[int, tuple[int, ImageError]] = {}  # group -> the first lost row

    def suits(self, row: int) -> bool:
        """Return whether the reader has the row, or will reach it in the current row group."""
        return row in self.kept or (
            self.next_row <= row and self._group(row) == self._group(self.next_row)
        )

    def value(self, row: int) -> Any:
        """Return the value of a row, and drop it. The caller must hold the lock."""
        if self._file is None:
            self._open()
        if not 0 <= row < self._starts[-1]:
            raise IndexError(row)
        if row not in self.kept:
            group = self._group(row)
            self._refuse_torn(group, row)
            rest = self._starts[group] - self.next_row
            if group == self._reading + 1 and 0 < rest <= KEPT_ROWS:  # a thread may request it late
                with suppress(ImageError):  # of the rest alone
                    while self.next_row < self._starts[group]:
                        self._read_ahead(row)
            if row < self.next_row or group != self._reading:
                self._begin_at(group)
            while self.next_row <= row:
                self._read_ahead(row)
        value = self.kept.pop(row)
        self._kept_bytes -= _n_bytes(value)
        return value

    def close(self) -> None:
        """Close the file. The caller must hold the lock."""
        self.is_closed = True
        self._batches = iter(())
        self.kept.clear()
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._file = open_parquet_file(self._path, self._path, self._version)
        self._pages = CheckedPages(self._file)
        try:
            self._parquet = parquet_file(self._pages)
        except (ExportError, ImageError, MemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - pyarrow raises many kinds for a damaged file
            raise cannot_read(self._path, error) from None
        check_images(self._parquet.schema_arrow, self._column, self._path)
        metadata = self._parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + group.num_rows)
        self._starts = starts

    def _group(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    def _begin_at(self, group: int) -> None:
        """Start reading at a row group's first row.

        pyarrow cannot start inside a row group. Each batch has one row. Dictionary encoding lets
        many rows share one stored image, and a larger batch would copy it for each row.
        """
        self._pages.expect(self._parquet, group, self._column)
        self._batches = self._parquet.iter_batches(
            1, row_groups=[group], columns=[self._column], use_threads=False
        )
        self.next_row, self._reading = self._starts[group], group

    def _refuse_torn(self, group: int, row: int) -> None:
        first, error = self._torn.get(group, (row + 1, None))
        if error is not None and row >= first:
            raise error.without_frames()

    def _read_ahead(self, wanted: int) -> None:
        end = min(self.next_row + AHEAD_ROWS, self._starts[self._reading + 1])
        n_bytes = 0
        while self.next_row < end and n_bytes < AHEAD_BYTES:
            try:
                batch = self._next_batch()
            except ImageError:
                if self.next_row > wanted:  # a later request reports the error
                    break
                raise
            if self.next_row >= wanted - KEPT_ROWS:
                [value] = batch.column(self._column).to_pylist()
                if isinstance(value, dict):
                    value = {field: value.get(field) for field in FIELDS}
                # after a damaged page, the reader reads kept rows again
                self._kept_bytes += _n_bytes(value) - _n_bytes(self.kept.get(self.next_row))
                self.kept[self.next_row] = value
                n_bytes += _n_bytes(value)
            self.next_row += 1  # last, because another thread looks for a kept row below it
        while self._kept_bytes > KEPT_BYTES or len(self.kept) > KEPT_ROWS + AHEAD_ROWS:
            row = next(iter(self.kept))
            if row >= wanted:
                break
            self._kept_bytes -= _n_bytes(self.kept.pop(row))

    def _next_batch(self) -> Any:
        try:
            return next(self._batches)
        except MemoryError:
            raise
        except Exception as error:
            # the error is the file's, not Arrow's
            if isinstance(error, OSError) and error.errno is not None:
                raise
            torn = error if isinstance(error, ImageError) else cannot_read("", error)
            self._torn[self._reading] = (self.next_row, torn)
            self._reading = -1
            raise torn.without_frames() from None


_Key: TypeAlias = tuple[str, str, str | None]  # the file, the column, an object's version


class _Readers:
    """Keep the readers of this process, in the order of their last use."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._readers: OrderedDict[_Reader, _Key] = OrderedDict()

    def value(self, key: _Key, row: int) -> Any:
        """Return the value of a row, from the reader that has the row or is the closest before it
        in the same row group, or else from a new reader."""
        while True:
            reader = self._reader(key, row)
            with reader.lock:
                if reader.is_closed:  # another thread needed its place
                    continue
                try:
                    return reader.value(row)
                except ImageError:
                    raise
                except BaseException:
                    reader.close()  # a second attempt opens the file again
                    with self._lock:
                        self._readers.pop(reader, None)
                    raise

    def _reader(self, key: _Key, row: int) -> _Reader:
        dropped = None
        with self._lock:
            ours = [each for each, its_key in self._readers.items() if its_key == key]
            fitting = [each for each in ours if each.suits(row)]
            if fitting:
                reader = max(fitting, key=lambda each: (row in each.kept, each.next_row))
            else:
                reader = _Reader(*key)
                self._readers[reader] = key
                if len(self._readers) > MAX_READERS:
                    dropped, _ = self._readers.popitem(last=False)
            self._readers.move_to_end(reader)
        if dropped is not None:
            with dropped.lock:
                dropped.close()
        return reader


_READERS = _Readers()


def _forget_readers() -> None:
    """Drop all readers after a fork, because the child would share file positions."""
    global _READERS
    _READERS = _Readers()


os.register_at_fork(after_in_child=_forget_readers)


def _n_bytes(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else [value]
    return sum(len(part) for part in parts if isinstance(part, bytes | str))
