"""Check the header of each Parquet page before pyarrow allocates the page.

pyarrow allocates what a header claims, so a file of 2 kB could take 2 GB. The header's bytes pass
this module first, because pyarrow reads a column in order.
"""

from typing import Any, BinaryIO

from qwen_vit.errors import ImageError
from qwen_vit.images.memory import decoding_memory
from qwen_vit.inputs.parquet_file import cannot_read

__all__ = ["CheckedPages", "page_header"]

MAX_HEADER_BYTES = 2**24  # as in pyarrow
MAX_FIELDS, MAX_DEPTH = 1_000, 16  # of a header; a usual header has about 20 fields, 3 deep
MAX_RATIO = 2**16  # of sizes; zstd, the best of the codecs but Brotli, stores 128 KiB in 4 bytes


class CheckedPages:
    """Pass a file to pyarrow, and check the pages of one row group's column on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._waiting: tuple[Any, list[int], int | None] | None = None
        self._chunks: list[_Chunk] = []

    def expect(self, parquet: Any, group: int, column: str, most: int | None = None) -> None:
        """Check the pages of this column in the reads that follow.

        A page may have at most `most` bytes, or the bytes that decoding may use.
        """
        leaves = [
            at
            for at in range(len(parquet.schema.names))
            if f"{parquet.schema.column(at).path}.".startswith(f"{column}.")
        ]
        self._waiting = (parquet.metadata.row_group(group), leaves, most)

    def read(self, size: int = -1) -> bytes:
        """Read bytes. Raises ImageError for a page that cannot have the size in its header."""
        if self._waiting is not None:
            # not earlier: a request for an encrypted column's size ends the process, and pyarrow
            # reads no such column
            group, leaves, most = self._waiting
            self._chunks = [_Chunk(group.column(at), most) for at in leaves]
            self._waiting = None
        at = self._file.tell()
        data = self._file.read(size)
        for chunk in self._chunks:
            chunk.follow(at, data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Return whether the file is closed."""
        return self._file.closed


class _Chunk:
    """Follow the pages of one column in one row group."""

    def __init__(self, facts: Any, most: int | None) -> None:
        starts = [facts.data_page_offset]
        if facts.has_dictionary_page and facts.dictionary_page_offset > 0:
            starts.append(facts.dictionary_page_offset)
        self._start = self._page = min(starts)
        self._end = self._start + facts.total_compressed_size
        self._may_be_compressed = facts.compression != "UNCOMPRESSED"
        self._has_ratio = facts.compression != "BROTLI"
        self._most = most
        self._head = b""

    def follow(self, at: int, data: bytes) -> None:
        """Check the headers in the bytes at this position of the file."""
        if at == self._start:  # pyarrow reads the column, or reads it again
            self._page, self._head = self._start, b""
        end = at + len(data)
        if self._start <= at < self._end < end:  # by pyarrow for files that were written in 2013
            raise cannot_read("", ValueError("its column is longer than its size"))
        if at >= self._end:  # of a later column, because pyarrow reads a struct's columns by turns
            return
        while (place := self._page + len(self._head)) < min(end, self._end):
            if place < at:
                raise cannot_read("", ValueError("its columns overlap"))
            self._head += data[place - at : place - at + max(1_024, len(self._head))]
            if (header := self._header()) is not None:
                n_bytes, uncompressed, compressed = header
                self._check(uncompressed, compressed, self._end - self._page - n_bytes)
                self._page += n_bytes + compressed
                self._head = b""

    def _header(self) -> tuple[int, int, int] | None:
        try:
            header = page_header(self._head)
        except ValueError as error:
            raise cannot_read("", error) from None
        if header is None and len(self._head) > MAX_HEADER_BYTES:
            raise cannot_read("", ValueError("the header of a page has more than 16 MB"))
        return header

    def _check(self, uncompressed: int, compressed: int, left: int) -> None:
        if not 0 <= compressed <= left:
            reason = f"a page claims {compressed:,} bytes, but its column has {max(0, left):,}"
            raise cannot_read("", ValueError(reason))
        if not self._may_be_compressed:
            uncompressed = compressed
        if self._has_ratio and uncompressed > MAX_RATIO * (compressed + 1):
            reason = f"a page of {compressed:,} bytes claims {uncompressed:,} after decompression"
            raise cannot_read("", ValueError(reason))
        most = decoding_memory.total if self._most is None else self._most
        if max(uncompressed, compressed) > most:
            raise ImageError(
                f"its Parquet page has {max(uncompressed, compressed):,} bytes",
                expected=f"at most {most:,}",
                remedy="write the file again with smaller pages",
                code="memory",
            )


def page_header(data: bytes) -> tuple[int, int, int] | None:
    """Read a page's header: its own bytes, and the page's uncompressed and compressed bytes.

    >>> page_header(bytes([0x15, 0, 0x15, 200, 1, 0x15, 80, 0, 9, 9]))
    (8, 100, 40)

    Returns None if the data ends within the header. Raises ValueError for another structure. The
    header is a struct in Thrift's compact protocol, where field 2 has the uncompressed size and
    field 3 the compressed size: https://parquet.apache.org/docs/file-format/data-pages/
    """
    reader = _Compact(data)
    try:
        sizes = reader.integers(0)
    except IndexError:
        return None
    if 2 not in sizes or 3 not in sizes:
        raise ValueError("the header of a page has no size")
    return reader.at, sizes[2], sizes[3]


class _Compact:
    """Read structs in Thrift's compact protocol. IndexError means that the data ends early."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at, self._fields = data, 0, 0

    def integers(self, depth: int) -> dict[int, int]:
        """Read a struct, and return its fields of type i32. The last one of a number counts."""
        found: dict[int, int] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else _signed(self._varint())
            self._fields += 1
            if self._fields > MAX_FIELDS or depth > MAX_DEPTH:
                raise ValueError("the header of a page has too many fields")
            if kind == 5:
                found[number] = _signed(self._varint())
            else:
                self._skip(kind, depth)
        return found

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # true, false
            return
        if kind in (4, 6):  # i16, i64
            self._varint()
        elif kind == 12:
            self.integers(depth + 1)
        elif kind in (3, 7, 8):  # i8, double, bytes
            n_bytes = {3: 1, 7: 8}.get(kind) or self._varint()
            self.at += n_bytes
            if self.at > len(self._data):
                raise IndexError
        else:  # no header has a list, a set or a map
            raise ValueError("the header of a page has another structure")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("the header of a page has a number that is too long")

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte


def _signed(value: int) -> int:
    """Return the signed integer of 32 bits that Thrift stores as this one."""
    value &= 0xFFFF_FFFF
    return value >> 1 ^ -(value & 1)
