"""Check the header of each Parquet page before pyarrow allocates the page.

pyarrow allocates as many bytes as a header claims, so a file of 2 kB could take 2 GB. pyarrow reads
a column in order, so the header's bytes pass through this module first. In the delta encodings, the
content also claims a number of values.
"""

from typing import Any, BinaryIO, NamedTuple

from qwen_vit.errors import ImageError
from qwen_vit.images.memory import decoding_memory
from qwen_vit.inputs.parquet_delta import (
    DELTA_ENCODINGS,
    check_lengths,
    decompressed,
    without_levels,
)
from qwen_vit.inputs.parquet_file import cannot_read

__all__ = ["CheckedPages", "PageHeader", "page_header"]

MAX_HEADER_BYTES = 2**24  # as in pyarrow
MAX_FIELDS, MAX_DEPTH = 1_000, 16  # of a header; a usual header has about 20 fields, 3 deep
MAX_RATIO = 2**16  # of sizes; zstd, the best codec except Brotli, stores 128 KiB in 4 bytes
# bytes that pyarrow allocates for each value of a dictionary, or of a page in a delta encoding
DICTIONARY_VALUE_BYTES, DELTA_VALUE_BYTES = 128, 8
DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # types of pages
TRUE, FALSE, I32, STRUCT = 1, 2, 5, 12  # types in Thrift's compact protocol


class CheckedPages:
    """Pass a file's bytes to pyarrow, and check the pages of one row group's column on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._waiting: tuple[Any, dict[int, Any], int | None] | None = None
        self._chunks: list[_Chunk] = []

    def expect(self, parquet: Any, group: int, column: str, most: int | None = None) -> None:
        """Check the pages of this column in the reads that follow.

        A page may need at most `most` bytes of memory, by default as many as decoding may use.
        """
        leaves = {
            at: leaf
            for at, leaf in enumerate(map(parquet.schema.column, range(len(parquet.schema.names))))
            if f"{leaf.path}.".startswith(f"{column}.")
        }
        self._waiting = (parquet.metadata.row_group(group), leaves, most)

    def read(self, size: int = -1) -> bytes:
        if self._waiting is not None:
            # not earlier: a request for an encrypted column's size ends the process, and pyarrow
            # reads no such column
            group, leaves, most = self._waiting
            self._chunks = [
                _Chunk(group.column(at), leaf, group.num_rows, most) for at, leaf in leaves.items()
            ]
            self._waiting = None
        at = self._file.tell()
        data = self._file.read(size)
        for chunk in self._chunks:
            chunk.follow(at, data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed


class _Chunk:
    """Follow the pages of one column in one row group."""

    def __init__(self, facts: Any, leaf: Any, n_rows: int, most: int | None) -> None:
        starts = [facts.data_page_offset]
        if facts.has_dictionary_page and facts.dictionary_page_offset > 0:
            starts.append(facts.dictionary_page_offset)
        self._start = min(starts)
        self._end = self._start + facts.total_compressed_size
        self._codec = facts.compression
        self._levels = leaf.max_repetition_level, leaf.max_definition_level
        self._max_values = facts.num_values if leaf.max_repetition_level else n_rows
        self._most = most
        self._begin(self._start)

    def _begin(self, at: int) -> None:
        self._at, self._held = at, bytearray()
        self._header: PageHeader | None = None  # of the page whose content is held

    def follow(self, at: int, data: bytes) -> None:
        if at == self._start:  # pyarrow reads the column, or reads it again
            self._begin(at)
        end = at + len(data)
        # pyarrow reads beyond the end of a column in files of 2013, whose sizes are too small
        if self._start <= at < self._end < end:
            raise cannot_read("", ValueError("a column is longer than its declared size"))
        if at >= self._end:  # of a later column: pyarrow alternates between a struct's columns
            return
        while (place := self._at + len(self._held)) < min(end, self._end):
            if place < at:
                raise cannot_read("", ValueError("its columns overlap"))
            self._take(memoryview(data)[place - at :])

    def _take(self, data: memoryview) -> None:
        """Collect the bytes of a header, or of a page with a delta encoding, and check them when
        they are complete."""
        if self._header is None:
            self._held += data[: max(1_024, len(self._held))]
            if (header := self._read_header()) is not None:
                self._begin(self._at + header.n_bytes)
                self._check(header, self._end - self._at)
                if header.kind != DICTIONARY and header.encoding in DELTA_ENCODINGS:
                    self._header = header
                else:
                    self._begin(self._at + header.compressed)
            return
        header = self._header
        self._held += data[: header.compressed - len(self._held)]
        if len(self._held) == header.compressed:
            self._check_content(header, memoryview(self._held))
            self._begin(self._at + header.compressed)

    def _read_header(self) -> "PageHeader | None":
        try:
            header = page_header(self._held)
        except ValueError as error:
            raise cannot_read("", error) from None
        if header is None and len(self._held) > MAX_HEADER_BYTES:
            raise cannot_read("", ValueError("the header of a page is larger than 16 MiB"))
        return header

    def _check(self, header: "PageHeader", left: int) -> None:
        uncompressed, compressed = header.uncompressed, header.compressed
        if not 0 <= compressed <= left:
            reason = f"a page claims {compressed:,} bytes, but its column has {max(0, left):,}"
            raise cannot_read("", ValueError(reason))
        if self._codec == "UNCOMPRESSED":
            uncompressed = compressed
        if self._codec != "BROTLI" and uncompressed > MAX_RATIO * (compressed + 1):
            reason = f"a page of {compressed:,} bytes claims {uncompressed:,} after decompression"
            raise cannot_read("", ValueError(reason))
        need = max(uncompressed, compressed)
        if header.kind == DICTIONARY:
            if header.n_values > uncompressed:  # a value has one byte or more
                reason = f"a dictionary of {uncompressed:,} bytes claims {header.n_values:,} values"
                raise cannot_read("", ValueError(reason))
            need += DICTIONARY_VALUE_BYTES * header.n_values
        elif header.encoding in DELTA_ENCODINGS:
            if header.n_values > self._max_values:
                reason = (
                    f"a page claims {header.n_values:,} values, but its column has "
                    f"{self._max_values:,}"
                )
                raise cannot_read("", ValueError(reason))
            need += DELTA_VALUE_BYTES * header.n_values
        most = decoding_memory.total if self._most is None else self._most
        if need > most:
            raise ImageError(
                f"its Parquet page needs {need:,} bytes",
                expected=f"at most {most:,}",
                remedy="write the file again with smaller pages",
                code="memory",
            )

    def _check_content(self, header: "PageHeader", page: memoryview) -> None:
        codec = self._codec if header.is_compressed else "UNCOMPRESSED"
        try:
            # the levels of version 2 are not compressed
            page = page[header.level_bytes :]
            data = decompressed(page, header.uncompressed - header.level_bytes, codec)
            if header.kind == DATA:
                levels = tuple(zip(self._levels, header.level_encodings, strict=True))
                data = without_levels(data, levels, header.n_values)
            check_lengths(data, header.encoding, header.n_values)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - codecs raise many kinds for damaged content
            raise cannot_read("", error) from None


class PageHeader(NamedTuple):
    n_bytes: int  # of the header
    uncompressed: int
    compressed: int
    kind: int = DATA
    n_values: int = 0
    encoding: int = -1
    level_encodings: tuple[int, int] = (-1, -1)  # in version 1: repetition, definition
    level_bytes: int = 0  # before the compressed values, in version 2
    is_compressed: bool = True


def page_header(data: bytes | bytearray) -> PageHeader | None:
    """Read a page's header. The first values are the sizes in bytes of the header, and of the page
    before and after compression.

    >>> page_header(bytes([0x15, 0, 0x15, 200, 1, 0x15, 80, 0, 9, 9]))[:3]
    (8, 100, 40)

    Returns None if the data ends within the header. The header is a struct in Thrift's compact
    protocol: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
    """
    reader = _Compact(data)
    try:
        fields = reader.fields(0)
    except IndexError:
        return None
    if (2, I32) not in fields or (3, I32) not in fields:
        raise ValueError("the header of a page has no size")
    kind, uncompressed, compressed = (fields.get((number, I32), -1) for number in (1, 2, 3))
    sizes = PageHeader(reader.at, uncompressed, compressed, kind)
    details = fields.get(({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, 0), STRUCT), {})
    n_values = details.get((1, I32), 0)
    if kind == DATA:
        encoding, definition, repetition = (details.get((at, I32), -1) for at in (2, 3, 4))
        return sizes._replace(
            n_values=n_values, encoding=encoding, level_encodings=(repetition, definition)
        )
    if kind == DATA_V2:
        return sizes._replace(
            n_values=n_values,
            encoding=details.get((4, I32), -1),
            level_bytes=max(0, details.get((5, I32), 0)) + max(0, details.get((6, I32), 0)),
            is_compressed=details.get((7, TRUE), True),
        )
    return sizes._replace(n_values=n_values)


class _Compact:
    """Read structs in Thrift's compact protocol. IndexError means that the data ends early."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data, self.at, self._fields = data, 0, 0

    def fields(self, depth: int) -> dict[tuple[int, int], Any]:
        """Read a struct, and return its integers, flags and structs by number and type.

        If a field's number repeats, the last value counts, and the reader merges repeated structs,
        as in Thrift.
        """
        found: dict[tuple[int, int], Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else _signed(self._varint())
            self._fields += 1
            if self._fields > MAX_FIELDS or depth > MAX_DEPTH:
                raise ValueError("the header of a page has too many fields")
            if kind == I32:
                found[number, I32] = _signed(self._varint())
            elif kind in (TRUE, FALSE):
                found[number, TRUE] = kind == TRUE
            elif kind == STRUCT:
                found.setdefault((number, STRUCT), {}).update(self.fields(depth + 1))
            else:
                self._skip(kind)
        return found

    def _skip(self, kind: int) -> None:
        if kind in (4, 6):  # i16, i64
            self._varint()
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
    """Decode a zigzag-encoded signed integer of 32 bits, as Thrift stores it."""
    value &= 0xFFFF_FFFF
    return value >> 1 ^ -(value & 1)
