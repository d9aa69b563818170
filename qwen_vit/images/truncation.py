"""Whether an image file holds every pixel that its header promises.

Some decoders stop at the end of a truncated file without an error and invent the missing pixels.
"""

import io
import struct
import zlib

from PIL import Image, JpegImagePlugin

__all__ = ["ends_early", "is_filled_up", "promised_bytes"]

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
    """Whether the file promises more bytes than it has."""
    try:
        return promised_bytes(data, file_format) > len(data)
    except struct.error:  # the header itself is incomplete
        return True


def promised_bytes(data: bytes, file_format: str) -> int:
    """The least length that the headers of a container imply, or 0 if they imply none."""
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
    if file_format == "AVIF":
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


def is_filled_up(data: bytes, file_format: str, image: Image.Image) -> bool:
    """Whether the decoder invented pixels that the file does not hold; two formats allow it."""
    if file_format == "PNG":
        return _png_misses_rows(data)
    if file_format == "JPEG":
        return _jpeg_misses_blocks(data, image)
    return False


def _png_misses_rows(data: bytes) -> bool:
    """Whether the compressed stream is complete and yet shorter than the picture."""
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
            if len(out) < piece:  # all of the chunk is used
                break
        at += 12 + length
    return missing > 0


def _jpeg_misses_blocks(data: bytes, image: Image.Image) -> bool:
    """Whether libjpeg filled missing blocks with mid-grey, without an error.

    Only a picture that ends in exactly that grey is suspect. It is decoded again with noise before
    its end marker: a complete picture ignores the noise, a truncated one shows it.
    """
    last = image.getpixel((image.width - 1, image.height - 1))
    if last not in (128, (128, 128, 128), (127,) * 4, (128,) * 4):
        return False
    end = data.rfind(b"\xff\xd9")
    noise = bytes(range(1, 255)) * 16
    again = JpegImagePlugin.JpegImageFile(io.BytesIO(data[:end] + noise + data[end:]), "")
    again.load()
    return again.tobytes() != image.tobytes()
