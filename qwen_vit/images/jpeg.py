"""Check that a JPEG is complete.

This module reads the markers and the scans' headers, and libjpeg-turbo decodes the blocks.

libjpeg fills missing blocks with grey and only warns. Pillow drops these warnings, but simplejpeg
reports them. simplejpeg decodes at an eighth of the size, at which entropy decoding takes most of
the time.
"""

import re
from dataclasses import dataclass, field
from typing import IO

import simplejpeg
from PIL import TiffImagePlugin

from qwen_vit.errors import ImageError
from qwen_vit.images.refusals import damaged, lacks_parts, too_slow, truncated
from qwen_vit.images.tiff import check_directory

__all__ = ["JpegFile", "check_blocks", "check_strips", "read_jpeg"]

# Encoders write 1 scan, or about 10 progressive ones, and one Exif segment.
MAX_SCANS = 100
MAX_SEGMENTS = 5_000
MAX_EXIF_SEGMENTS = 100  # Pillow joins them in quadratic time

START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, EXIF, TEM = 0xD8, 0xD9, 0xDA, 0xE1, 0x01
METADATA = (*range(0xE0, 0xF0), 0xFE)
FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
PROGRESSIVE, ARITHMETIC = (0xC2, 0xCA), (0xC9, 0xCA)
UNREAD_FRAMES = {
    0xC3: "lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    0xCB: "lossless JPEG with arithmetic coding",
}
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker that is neither stuffing nor a restart
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# libjpeg's first warning if the data stops: it meets the end marker that this module adds
STOPS = re.compile("remature end|marker 0xd9")
PREFETCHED_BYTES = 16  # libjpeg buffers up to 8 bytes that it does not count as extraneous
COMPRESSION, JPEG_TABLES = 259, 347
STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES = 273, 279, 324, 325
JPEG_IN_TIFF = 7
UNCHECKED_IN_TIFF = {
    **dict.fromkeys((2, 3, 4), "CCITT fax"),
    6: "old-style JPEG compression",
}
EXIF_START = b"Exif\0\0"
COEFFICIENTS = 64
UNSEEN = -1


@dataclass(slots=True)
class JpegFile:
    """Hold the facts that the markers of a JPEG give.

    `pixel_part` is the first image without metadata, so that libjpeg warns only about pixels.
    For each component, `bits` contains each coefficient's lowest bit that a scan has coded so far.
    `entropy_end` is the offset in `pixel_part` where the last scan ends. `readable` is the file for
    Pillow, without Exif that would take much memory. `notes` then reports the removal. `closes`
    means that the last bytes of the file are an end marker.
    """

    n_bytes: int
    components: int = 0
    progressive: bool = False
    arithmetic: bool = False
    bits: dict[int, list[int]] = field(default_factory=dict)
    scans: int = 0
    has_end: bool = False
    closes: bool = False
    pixel_part: bytes = b""
    entropy_end: int = 0
    readable: bytes = b""
    notes: tuple[str, ...] = ()


def read_jpeg(data: bytes, name: str) -> JpegFile:
    """Read the markers of a JPEG's first image, without decoding."""
    jpeg = JpegFile(len(data), closes=data.endswith(b"\xff\xd9"))
    at, kept, segments = 2, [data[:2]], 0
    exif: list[tuple[int, int]] = []  # where the segments are
    between: tuple[str, ...] = ()
    first_scan = end = len(data)
    while found := MARKER.search(data, at):
        marker, start = data[found.start() + 1], found.start()
        if start < first_scan and data[at:start].strip(b"\xff"):  # 0xff may pad
            between = ("bytes between its segments ignored",)
        at = start + 2
        if marker == END_OF_IMAGE:
            jpeg.has_end, end = True, start
            break
        if marker in (START_OF_IMAGE, TEM):
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        at += max(2, length)
        segments += 1
        if marker == EXIF and body.startswith(EXIF_START):
            exif.append((start, at))
        if marker in FRAMES or marker in UNREAD_FRAMES:
            _read_frame(jpeg, marker, body, name)
        elif marker == START_OF_SCAN:
            first_scan = min(first_scan, start)
            _read_scan(jpeg, body, name)
        if start < first_scan and marker not in METADATA:
            kept.append(data[start:at])
        _check_counts(jpeg.scans, segments, len(exif), name)
    jpeg.pixel_part = b"".join((*kept, data[first_scan:end], b"\xff\xd9"))
    jpeg.entropy_end = len(jpeg.pixel_part) - 2
    jpeg.readable, notes = _without_costly_exif(data, exif)
    jpeg.notes = (*between, *notes)
    return jpeg


def _without_costly_exif(data: bytes, exif: list[tuple[int, int]]) -> tuple[bytes, tuple[str, ...]]:
    head = 4 + len(EXIF_START)  # a marker, a length, and the segment's signature
    try:
        check_directory(b"".join(data[start + head : end] for start, end in exif))
    except ValueError:
        begins = [0, *(end for _, end in exif)]
        ends = [*(start for start, _ in exif), len(data)]
        kept = [data[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return b"".join(kept), ("unreadable EXIF ignored",)
    return data, ()


def check_blocks(jpeg: JpegFile, name: str) -> tuple[str, ...]:
    """Raise ImageError for a JPEG that lacks blocks, scans or its end marker, or that libjpeg
    reports as corrupt. Return notes on any other JPEG.

    The check cannot find damage that keeps the number of blocks, such as one changed bit, because
    the format has no checksum.
    """
    lacking = [component for component, bits in jpeg.bits.items() if any(bits)]
    are_missing = bool(lacking) or len(jpeg.bits) < jpeg.components
    if jpeg.has_end and are_missing:
        raise truncated("JPEG", name, "scans of its picture are missing")
    if not jpeg.has_end and jpeg.closes:  # damage hides the end marker from this reader
        raise lacks_parts("JPEG", name)
    try:
        simplejpeg.decode_jpeg(
            jpeg.pixel_part,
            "CMYK" if jpeg.components == 4 else "GRAY",
            fastdct=True,
            fastupsample=True,
            min_height=1,
            min_width=1,
            strict=True,
        )
    except ValueError as error:
        warning = str(error)
    else:
        warning = ""
    if not jpeg.has_end:
        if warning.startswith("Corrupt JPEG data") and not STOPS.search(warning):
            raise lacks_parts("JPEG", name)
        raise truncated("JPEG", name, f"it ends early after {jpeg.n_bytes} bytes")
    return (*jpeg.notes, *(_judge(jpeg, warning, name) if warning else ()))


def check_strips(image: TiffImagePlugin.TiffImageFile, name: str) -> tuple[str, ...]:
    """Check the JPEG of each strip or tile of a TIFF, because libtiff also only warns.

    Returns notes. For fax codes and old-style JPEG, which cannot be checked, the note names the
    compression.
    """
    tags = image.tag_v2
    compression = tags.get(COMPRESSION, 1)
    if compression != JPEG_IN_TIFF:
        unchecked = UNCHECKED_IN_TIFF.get(compression)
        return () if unchecked is None else (f"{unchecked}, not checked for damage",)
    tables = bytes(tags.get(JPEG_TABLES, b"")).removesuffix(b"\xff\xd9")[2:]
    offsets, counts = tags.get(TILE_OFFSETS), tags.get(TILE_BYTES)
    if offsets is None or counts is None:
        offsets, counts = tags.get(STRIP_OFFSETS, ()), tags.get(STRIP_BYTES, ())
    notes = dict[str, None]()
    file: IO[bytes] = image.fp  # type: ignore[assignment]  # it is open before the image is loaded
    position = file.tell()
    for offset, count in zip(offsets, counts, strict=False):
        file.seek(offset)
        strip = file.read(count)
        if strip:  # a sparse file lacks tiles
            jpeg = read_jpeg(strip[:2] + tables + strip[2:], name)
            jpeg.has_end = True  # a strip may end without a marker, since its length is a tag
            notes |= dict.fromkeys(check_blocks(jpeg, name))
    file.seek(position)
    return tuple(notes)


def _judge(jpeg: JpegFile, warning: str, name: str) -> tuple[str, ...]:
    if "remature end" in warning:
        raise lacks_parts("JPEG", name)  # its data stopped, or changed
    if extraneous := EXTRANEOUS.search(warning):
        count, marker = int(extraneous[1]), int(extraneous[2], 16)
        if marker == END_OF_IMAGE and _is_padding(jpeg, count):
            return (f"{count} bytes of padding after the picture",)
        raise damaged("JPEG", name, f"{count} bytes of its picture belong to no block")
    if warning.startswith(("Corrupt JPEG data", "Inconsistent progression")):
        raise damaged("JPEG", name, warning)
    return ("not checked for missing blocks",)  # simplejpeg cannot read it; Pillow may


def _is_padding(jpeg: JpegFile, count: int) -> bool:
    """Return whether the bytes after the last block repeat one value and the repetition starts
    after that block.

    If the run of this value begins earlier, libjpeg decoded the last blocks from it, so the file
    lost data.
    """
    end = jpeg.entropy_end
    last = jpeg.pixel_part[end - 1 : end]
    window = jpeg.pixel_part[max(0, end - count - PREFETCHED_BYTES - 1) : end]
    return count <= len(window) - len(window.rstrip(last)) <= count + PREFETCHED_BYTES


def _read_frame(jpeg: JpegFile, marker: int, body: bytes, name: str) -> None:
    if jpeg.components or len(body) < 6:
        raise damaged("JPEG", name, "it has more than one frame header, or a cut one")
    if marker in UNREAD_FRAMES:
        raise _unread(UNREAD_FRAMES[marker], name)
    if body[0] != 8:
        raise _unread(f"JPEG of {body[0]} bits per sample", name)
    jpeg.components = body[5]
    jpeg.progressive, jpeg.arithmetic = marker in PROGRESSIVE, marker in ARITHMETIC


def _read_scan(jpeg: JpegFile, body: bytes, name: str) -> None:
    jpeg.scans += 1
    count = body[0] if body else 0
    if len(body) < 4 + 2 * count:
        return  # libjpeg rejects it
    first, last, approximation = body[1 + 2 * count : 4 + 2 * count]
    previous, now = approximation >> 4, approximation & 15
    if not jpeg.progressive:
        first, last, previous, now = 0, COEFFICIENTS - 1, 0, 0
    for component in body[1 : 1 + 2 * count : 2]:
        bits = jpeg.bits.setdefault(component, [UNSEEN] * COEFFICIENTS)
        for at in range(first, min(last + 1, COEFFICIENTS)):
            if bits[at] != (previous or UNSEEN) or now >= (previous or COEFFICIENTS):
                raise damaged("JPEG", name, "a scan repeats others or does not continue them")
            bits[at] = now


def _check_counts(scans: int, segments: int, exif_segments: int, name: str) -> None:
    for count, most, what in (
        (scans, MAX_SCANS, "scans"),
        (exif_segments, MAX_EXIF_SEGMENTS, "Exif segments"),
        (segments, MAX_SEGMENTS, "segments"),
    ):
        if count > most:
            raise too_slow(f"a JPEG of more than {most:,} {what}", name, f"at most {most:,}")


def _unread(kind: str, name: str) -> ImageError:
    return ImageError(
        f"of an unsupported format ({kind})",
        name=name,
        expected="JPEG of 8 bits per sample, baseline or progressive",
        remedy="convert it to PNG or to an 8-bit JPEG",
        code="format",
    )
