"""Check the lengths in a delta-encoded Parquet page before pyarrow decodes the page.

pyarrow allocates 4 bytes for each length that the content claims. Repeated lengths need no bytes in
the page, so a page of 20 bytes could take 8 GB. Source:
https://parquet.apache.org/docs/file-format/data-pages/encodings/
"""

from typing import Any

import numpy as np

from qwen_vit.errors import ImageError

__all__ = ["DELTA_ENCODINGS", "check_lengths", "decompressed", "without_levels"]

DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY = 5, 6, 7
DELTA_ENCODINGS = (DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY)
RLE = 3  # an encoding of levels; the other one is BIT_PACKED
MAX_BLOCK = 2**20  # values; pyarrow writes 128, and counts a block's bits in 32 bits


def decompressed(data: memoryview, n_bytes: int, codec: str) -> memoryview:
    if codec == "UNCOMPRESSED":
        return data
    if n_bytes == 0:
        return data[:0]
    import pyarrow as pa  # type: ignore[import-untyped]

    if codec == "LZ4":
        # pyarrow uses this name for raw blocks and for Hadoop's blocks, which begin with their
        # size. Read as a size, the first bytes of a raw block would give 256 MB or more.
        if int.from_bytes(data[:4], "big") <= n_bytes:
            raise ImageError(
                "a Parquet file with delta encodings and Hadoop's LZ4",
                remedy="write the file again with another compression, for example zstd",
                code="unreadable",
            )
        codec = "LZ4_RAW"
    return memoryview(pa.Codec(codec.lower()).decompress(data, n_bytes)).cast("B")


def without_levels(
    data: memoryview, levels: tuple[tuple[int, int], ...], n_values: int
) -> memoryview:
    """Return the values of a page of version 1, which follow the levels.

    `levels` gives the highest repetition and definition levels, and the encoding of each.
    """
    at = 0
    for highest, encoding in levels:
        if highest and encoding == RLE:
            at += 4 + int.from_bytes(data[at : at + 4], "little")
        elif highest:
            at += (n_values * highest.bit_length() + 7) // 8
    return data[at:]


def check_lengths(data: bytes | memoryview, encoding: int, most: int) -> None:
    """Raise ValueError if the values of a page claim more than `most` lengths, or if the headers or
    prefixes that this function reads are malformed.

    >>> check_lengths(bytes([128, 1, 4, 2, 10, 0, 0, 0, 0, 0]) + b"cats dogs ", 6, most=2)
    >>> check_lengths(bytes([128, 1, 4, 99, 10, 0, 0, 0, 0, 0]) + b"cats dogs ", 6, most=2)
    Traceback (most recent call last):
    ValueError: a page claims 99 lengths, but it has at most 2 values

    In DELTA_BYTE_ARRAY, a value begins with a prefix of the value before it. The function also
    raises ValueError for a prefix that is longer than the page. In DELTA_BINARY_PACKED, numbers
    have no lengths, and `most` does not apply.
    """
    if not data:  # pyarrow rejects this page
        return
    reader = _Lengths(data)
    if encoding == DELTA_BYTE_ARRAY:
        prefixes = reader.lengths(most)
        if prefixes.size and prefixes.max() > len(data):  # as unsigned numbers
            raise ValueError("a prefix is longer than its page")
    reader.count(2**32 if encoding == DELTA_BINARY_PACKED else most)  # numbers need no lengths


class _Lengths:
    """Read numbers in DELTA_BINARY_PACKED as pyarrow reads them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = data, 0

    def count(self, most: int) -> tuple[int, int, int]:
        """Read the header. Return three counts: miniblocks per block, values per miniblock, and
        values in total."""
        block, miniblocks, total = self._varint(), self._varint(), self._varint()
        if not 0 < block <= MAX_BLOCK or not 0 < miniblocks <= block:
            raise ValueError(f"a page has blocks of {block:,} values in {miniblocks:,} miniblocks")
        values = block // miniblocks
        if values % 32:
            raise ValueError(f"a page has miniblocks of {values:,} values")
        if total > most:
            raise ValueError(f"a page claims {total:,} lengths, but it has at most {most:,} values")
        return miniblocks, values, total

    def lengths(self, most: int) -> Any:
        miniblocks, values, total = self.count(most)
        deltas = [np.array([_signed(self._varint())], np.uint32)]
        left = total - 1
        while left > 0:
            least = np.uint32(_signed(self._varint()))
            for width in self._bytes(miniblocks):
                if left <= 0:  # the rest has widths, but no data
                    break
                if width > 32:
                    raise ValueError(f"a page has lengths of {width} bits")
                bits = np.unpackbits(
                    np.frombuffer(self._bytes(values * width // 8), np.uint8), bitorder="little"
                ).reshape(values, width)
                packed = bits @ (np.uint32(1) << np.arange(width, dtype=np.uint32))
                deltas.append(packed[:left].astype(np.uint32) + least)
                left -= values
        return np.cumsum(np.concatenate(deltas)[:total], dtype=np.uint32)

    def _bytes(self, n: int) -> bytes | memoryview:
        found = self._data[self._at : self._at + n]
        if len(found) < n:
            raise ValueError("the lengths of a page end early")
        self._at += n
        return found

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            [byte] = self._bytes(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF
        raise ValueError("a page has a number that is too long")


def _signed(value: int) -> int:
    """Decode a zigzag-encoded number of 32 bits, and return it as an unsigned number."""
    return (value >> 1 ^ -(value & 1)) & 0xFFFF_FFFF
