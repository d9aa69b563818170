"""Check that a container has all the bytes that its headers declare, and that a PNG has all rows.

For some truncated files, Pillow stops without an error and fills in the missing pixels.
"""

import struct
import zlib

__all__ = ["ends_early", "misses_rows", "promised_bytes"]

# PNG: samples per pixel by colour type; (first column, first row, step, step) of Adam7's passes.
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_ONE_PASS = ((0, 0, 1, 1),)
PNG_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def ends_early(data: bytes, file_format: str) -> bool:
    """Return whether the headers are incomplete, or declare more bytes than the file has."""
    try:
        return promised_bytes(data, file_format) > len(data)
    except struct.error:  # the header itself is incomplete
        return True


def promised_bytes(data: bytes, file_format: str) -> int:
    """Return the minimum length that a container's headers imply, or 0 if they imply none.

    Raises struct.error if a header is incomplete.
    """
    if file_format == "WEBP":
        return int(8 + struct.unpack_from("<I", data, 4)[0])
    if file_format == "TIFF":
        order = "<" if data[:2] == b"II" else ">"
        is_big = data[2:4] in (b"+\0", b"\0+")
        start = int(
            struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0]
        )
        entry_bytes, count_format = (20, "Q") if is_big else (12, "H")
        if start + struct.calcsize(order + count_format) > len(data):
            return start + 2
        count = int(struct.unpack_from(order + count_format, data, start)[0])
        return start + count * entry_bytes
    if file_format in ("AVIF", "HEIF") or (file_format == "JPEG2000" and data[:1] == b"\0"):
        at = 0
        while at < len(data):
            size = int(struct.unpack_from(">I", data, at)[0])
            if size == 1:
                size = int(struct.unpack_from(">Q", data, at + 8)[0])
            if size < 8:  # 0 means: up to the end
                return 0
            at += size
        return at
    return 0


def misses_rows(data: bytes) -> bool:
    """Return whether a PNG's compressed data contain fewer rows than the image has."""
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * PNG_SAMPLES[colour]
    missing = 0
    for x, y, x_step, y_step in PNG_ADAM7 if interlace else PNG_ONE_PASS:
        columns, rows = -(-(width - x) // x_step), -(-(height - y) // y_step)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * bits + 7) // 8)
    inflater, at, piece = zlib.decompressobj(), 8, 2**20
    while missing > 0 and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at + 8 : at + 8 + length]
        while kind == b"IDAT" and missing > 0:
            out = inflater.decompress(chunk, piece)
            missing -= len(out)
            chunk = inflater.unconsumed_tail
            if len(out) < piece:  # the decompressor used the whole chunk
                break
        at += 12 + length
    return missing > 0
