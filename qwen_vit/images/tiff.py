"""Read the first directory of a TIFF, or of Exif data, which have the same structure."""

import struct
from dataclasses import dataclass

from PIL import TiffImagePlugin

from qwen_vit.errors import ImageError

__all__ = [
    "Directory",
    "Entry",
    "check_directory",
    "check_tags",
    "grey_depth",
    "numbers",
    "read_directory",
    "unread_kind",
]

# Tags by name, and values that have a name here.
BITS, COMPRESSION, PHOTOMETRIC, PLANES, INKS = 258, 259, 262, 284, 332
SAMPLE_FORMAT, IMAGE_DEPTH = 339, 32997
WHITE_IS_ZERO, CMYK, YCBCR = 0, 5, 6
SIGNED, UNCOMPRESSED, APART, NOT_CMYK = 2, 1, 2, 2
JPEG_2000 = (33003, 33004, 33005, 34712)

# Bytes of a value, by type: BYTE, ASCII, SHORT, LONG, RATIONAL, ..., LONG8, SLONG8, IFD8.
TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
MAX_ENTRIES = 4_096  # files have about 20
HARMLESS_BYTES = 2**26  # bytes that faulty but harmless entries may claim
MAX_NUMBERS = 16  # values to read from one entry: a pixel has fewer samples


@dataclass(frozen=True, slots=True)
class Entry:
    """Hold one tag's type, number of values, and the values' offset."""

    kind: int
    count: int
    start: int

    @property
    def n_bytes(self) -> int:
        return TYPE_BYTES.get(self.kind, 0) * self.count


@dataclass(frozen=True, slots=True)
class Directory:
    """Hold a directory's entries by tag, byte order ("<" or ">"), and end offset."""

    entries: dict[int, Entry]
    order: str
    end: int


def read_directory(data: bytes) -> Directory:
    """Read the first directory's entries, without their values.

    Raises struct.error if the directory is incomplete, and ValueError for more than MAX_ENTRIES
    entries.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    pointer = "Q" if is_big else "I"
    [start] = struct.unpack_from(order + pointer, data, 8 if is_big else 4)
    count_format, entry_format = ("Q", "HHQ") if is_big else ("H", "HHI")
    start = min(start, len(data))  # struct.error instead of OverflowError
    [count] = struct.unpack_from(order + count_format, data, start)
    if count > MAX_ENTRIES:
        raise ValueError(f"a directory of {count} entries, expected at most {MAX_ENTRIES}")
    at, entries = start + struct.calcsize(order + count_format), {}
    inline = struct.calcsize("=" + pointer)
    for _ in range(count):
        tag, kind, number = struct.unpack_from(order + entry_format, data, at)
        at += struct.calcsize("=" + entry_format)
        entry = Entry(kind, number, at)
        if entry.n_bytes > inline:
            [begin] = struct.unpack_from(order + pointer, data, at)
            entry = Entry(kind, number, min(begin, len(data)))
        entries[tag] = entry
        at += inline
    return Directory(entries, order, at)


def numbers(data: bytes, directory: Directory, tag: int) -> tuple[int, ...]:
    """Return up to 16 whole numbers of a tag, or none for a missing tag or another type.

    >>> tiff = b"II*\\0\\x08\\0\\0\\0\\x01\\0" + struct.pack("<HHIHH", 262, 3, 1, 2, 0)
    >>> numbers(tiff, read_directory(tiff), 262)
    (2,)
    """
    entry = directory.entries.get(tag)
    if entry is None or entry.kind not in WHOLE_NUMBERS:
        return ()
    count = min(entry.count, MAX_NUMBERS)
    what = f"{directory.order}{count}{WHOLE_NUMBERS[entry.kind]}"
    return struct.unpack_from(what, data, entry.start)


def check_directory(data: bytes) -> None:
    """Raise ValueError for more than MAX_ENTRIES entries, or if the entries together refer to over
    HARMLESS_BYTES more bytes than the data contains. Accept an incomplete directory.

    Pillow copies the values of every entry, so entries that share bytes multiply the memory.
    """
    try:
        directory = read_directory(data)
    except struct.error:  # incomplete: the format's decoder reports that
        return
    total = sum(
        min(entry.n_bytes, max(0, len(data) - entry.start))  # Pillow reads no value past the end
        for entry in directory.entries.values()
    )
    if total > len(data) + HARMLESS_BYTES:
        raise ValueError(f"its tags take {total} bytes of {len(data)}")


def check_tags(image: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """Raise ImageError with code "mode" for five kinds of TIFF, whose tags Pillow would ignore.

    These are signed samples of at most 8 bits, separate planes of more than 8 bits, inks other than
    CMYK, YCbCr without compression, and several layers in depth.
    """
    tags = image.tag_v2
    bits, formats = _values(tags, BITS), _values(tags, SAMPLE_FORMAT)
    photometric = tags.get(PHOTOMETRIC)
    wrong = (
        (SIGNED in formats and max(bits) <= 8, "signed samples"),
        (tags.get(PLANES) == APART and max(bits) > 8, "separate planes of more than 8 bits"),
        (photometric == CMYK and tags.get(INKS) == NOT_CMYK, "inks other than CMYK"),
        (
            photometric == YCBCR and tags.get(COMPRESSION, 1) == UNCOMPRESSED,
            "YCbCr without compression",
        ),
        (tags.get(IMAGE_DEPTH, 1) != 1, "several layers in depth"),
    )
    for is_so, kind in wrong:
        if is_so:
            raise _unread(f"a TIFF with {kind}", name)


def grey_depth(image: TiffImagePlugin.TiffImageFile) -> tuple[int, bool]:
    """Return a deep grey sample's number of bits, and whether 0 is white. Pillow ignores both."""
    return max(_values(image.tag_v2, BITS)), image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO


def unread_kind(data: bytes, name: str) -> ImageError | None:
    """Return the error that names the kind of TIFF that Pillow cannot open.

    Return None if the directory or a necessary tag is missing or malformed, because then the file
    is damaged.
    """
    try:
        directory = read_directory(data)
        bits = numbers(data, directory, BITS) or (1,)
        [photometric] = numbers(data, directory, PHOTOMETRIC)
        [compression] = numbers(data, directory, COMPRESSION) or (1,)
        [sample_format, *_] = numbers(data, directory, SAMPLE_FORMAT) or (1,)
    except (ValueError, struct.error):
        return None
    if compression in JPEG_2000:
        return _unread("a TIFF with JPEG 2000 inside", name)
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return _unread(f"a TIFF of compression {compression}", name)
    depth = "+".join(map(str, bits))
    return _unread(
        f"a TIFF of photometric interpretation {photometric}, sample format {sample_format} and "
        f"{depth} bits, which Pillow does not read",
        name,
    )


def _unread(fact: str, name: str) -> ImageError:
    return ImageError(
        fact,
        name=name,
        expected="grey, palette, RGB or CMYK samples of 1, 2, 4, 8 or 16 bits",
        remedy="convert it to PNG",
        code="mode",
    )


def _values(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> tuple[int, ...]:
    found = tags.get(tag, (1,))
    return found if isinstance(found, tuple) and found else (found,)
