"""Decode encoded bytes and PIL images to RGB, and reject truncated files."""

import io
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import (
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from qwen_vit.errors import ImageError
from qwen_vit.images.formats import decoder, identify
from qwen_vit.images.image import ExifPolicy, ImageLimits, RgbImage, check_pixels, check_ratio
from qwen_vit.images.isolated import decode_in_child
from qwen_vit.images.jpeg import JpegFile, check_blocks, check_strips, read_jpeg
from qwen_vit.images.memory import decoding_memory
from qwen_vit.images.png_chunks import without_needless_chunks
from qwen_vit.images.refusals import damaged, too_much_memory, truncated
from qwen_vit.images.tiff import check_directory, check_tags, unread_kind
from qwen_vit.images.to_rgb import is_deep, tiff_orientation, to_rgb, turn_back
from qwen_vit.images.truncation import ends_early, misses_rows, promised_bytes

__all__ = ["decode_bytes", "decode_pil"]

# Peak memory of decoding and converting, by format.
BYTES_A_PIXEL = {"WEBP": 28, "AVIF": 20, "JPEG": 14}
OTHER_BYTES_A_PIXEL = 12
MAX_ICONS = 256  # images in one file
SLOW_PIXELS_A_SECOND, SLOW_SCAN_PIXELS_A_SECOND = 5e6, 2e7

# Pillow does not lock its lazy loading, so these locks make threads decode a shared image one at a
# time.
LOAD_LOCKS = [threading.Lock() for _ in range(61)]


def decode_bytes(
    data: bytes,
    name: str,
    limits: ImageLimits,
    exif: ExifPolicy = "apply",
    page: int | None = None,
) -> RgbImage:
    """Decode an encoded image, or one page of it, to RGB. The first page is 1."""
    file_format = identify(data, name, limits.formats)
    open_image = decoder(file_format, name, limits)
    jpeg = read_jpeg(data, name) if file_format == "JPEG" else None
    readable = data if jpeg is None else jpeg.readable
    early_notes: tuple[str, ...] = ()
    if file_format == "PNG":
        readable, early_notes = without_needless_chunks(data)
    reader = _Reader(readable)
    with _decoding(data, file_format, name, header=reader):
        if file_format == "TIFF":
            check_directory(data)
        if file_format in ("WEBP", "TIFF") and promised_bytes(data, file_format) > len(data):
            raise EOFError  # before Pillow warns about missing bytes
        if file_format == "ICO":
            _check_icons(data, name, limits)
        image = open_image(reader, "")
        check_pixels(image.width, image.height, name, limits)
    check_ratio(image.width, image.height, name)
    if _seconds_at_most(image, jpeg) * (page or 1) > limits.max_seconds:
        return decode_in_child(data, name, limits, exif, page)
    mode = image.mode
    if page is not None:
        with decoding_memory.hold(_peak_bytes(image)), _decoding(data, file_format, name):
            image.seek(page - 1)
    if jpeg is not None and jpeg.arithmetic:  # this decoder needs the whole file in one piece
        image.decodermaxblock = len(data)
    deep, turned = is_deep(image), tiff_orientation(image)
    with decoding_memory.hold(_peak_bytes(image)), _decoding(data, file_format, name):
        early_notes += _load(image, name, limits, jpeg)
        if file_format == "PNG" and page in (None, 1) and misses_rows(data):
            raise EOFError
        if file_format == "GIF" and image.mode == "RGB" != mode:  # Pillow converted a later frame
            early_notes += (f"{mode} to RGB",)
        picture, notes = _to_rgb(image, name, deep, exif, turned)
        if picture is image:  # the image reads from its file, and counting frames seeks in it
            picture = image._new(image.im)
    frames = _frame_notes(image) if page is None else (f"page {page}",)
    return RgbImage(picture, file_format, name, (*early_notes, *notes, *frames))


def decode_pil(
    image: Image.Image,
    name: str,
    limits: ImageLimits,
    exif: ExifPolicy = "apply",
    *,
    is_lent: bool = False,
) -> RgbImage:
    """Convert a PIL image to RGB, after decoding it if it is still lazy.

    With `is_lent`, the result may share the image's pixels. The function checks neither the aspect
    ratio nor the decoding time.
    """
    file_format = str(image.format or "PIL image")
    with LOAD_LOCKS[id(image) // 16 % len(LOAD_LOCKS)]:
        if getattr(image, "tile", None) and getattr(image, "fp", image) is None:
            raise _closed(name)
        deep, turned = is_deep(image), tiff_orientation(image)
        data = _lazy_bytes(image, limits)
        with decoding_memory.hold(_peak_bytes(image)), _decoding(data, file_format, name):
            jpeg = None
            if data is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                jpeg = read_jpeg(data[getattr(image, "offset", 0) :], name)
            early_notes = _load(image, name, limits, jpeg)
            if data is not None and jpeg is None and misses_rows(data):
                raise EOFError
            picture, notes = _to_rgb(image, name, deep, exif, turned)
            if picture is image:  # the caller may change the image, unless it is lent
                picture = image._new(image.im) if is_lent else image.copy()
    return RgbImage(picture, "PIL", name, (*early_notes, *notes))


def _to_rgb(
    image: Image.Image, name: str, deep: bool, exif: ExifPolicy, turned: int | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """Run `to_rgb`. Pillow has already applied `turned`, the orientation of a TIFF: add a note, or
    undo the orientation for exif="ignore"."""
    picture, notes = to_rgb(image, name, deep, exif)
    if turned is None:
        return picture, notes
    if exif == "ignore":
        return turn_back(picture, turned), notes
    return picture, (f"EXIF orientation {turned} applied", *notes)


def _lazy_bytes(image: Image.Image, limits: ImageLimits) -> bytes | None:
    """Return the file bytes of a lazy PNG or JPEG, which the checks need.

    Return None for other images, and if the file is unreadable.
    """
    if not isinstance(image, PngImagePlugin.PngImageFile | JpegImagePlugin.JpegImageFile):
        return None
    if not image.tile or image.fp is None or image.decoderconfig:  # draft mode
        return None
    try:
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read(limits.max_file_bytes)
        image.fp.seek(position)
    except (OSError, ValueError):  # closed, or not seekable: decoding reports it
        return None
    return data


class _Reader(io.BytesIO):
    """Read from bytes, and record whether a read went beyond the end."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.ran_out |= size is not None and len(data) < size
        return data


@contextmanager
def _decoding(
    data: bytes | None, file_format: str, name: str, *, header: _Reader | None = None
) -> Iterator[None]:
    """Run Pillow strictly, and turn any plug-in exception into an ImageError.

    Pillow reads headers in pieces of known size, so with `header`, a read beyond the end means
    truncation.
    """
    try:
        with _strictly():
            yield
    except ImageError:
        raise
    except MemoryError:
        raise too_much_memory(name) from None
    except Image.DecompressionBombError:
        raise ImageError(
            "has more pixels than Pillow decodes (Image.MAX_IMAGE_PIXELS)",
            name=name,
            remedy="make the image smaller",
            code="too-many-pixels",
        ) from None
    except Exception as error:  # noqa: BLE001 - plug-ins raise SyntaxError, struct.error, ...
        text = str(error)
        if isinstance(error, ValueError) and "closed file" in text:  # Python's own exception text
            raise _closed(name) from None
        ends = data is not None and ends_early(data, file_format)
        if header and data and file_format == "TIFF" and isinstance(error, SyntaxError):
            kind = None if ends else unread_kind(data, name)
            if kind is not None:
                raise kind from None
        if (
            isinstance(error, EOFError)
            or "truncat" in text.lower()
            or "not enough image data" in text  # of a plain PPM
            or (header is not None and header.ran_out)
            or ends
        ):
            size = "" if data is None else f" after {len(data)} bytes"
            raise truncated(file_format, name, f"it ends early{size}") from None
        reason = type(error).__name__ if re.search(r"0x[0-9a-fA-F]{4}", text) else text
        raise damaged(file_format, name, reason or type(error).__name__) from None


def _closed(name: str) -> ImageError:
    return ImageError(
        "a PIL image whose file was closed before Pillow loaded the image",
        name=name,
        remedy="call the image's load() first, or pass the path",
        code="unreadable",
    )


class _Strictness:
    """Hold the number of decoding threads, and the value of LOAD_TRUNCATED_IMAGES to restore."""

    lock = threading.Lock()
    threads = 0
    found = False


def _forget_other_threads() -> None:
    """Reset the locks and the count after a fork, because the child has no other threads."""
    LOAD_LOCKS[:] = [threading.Lock() for _ in LOAD_LOCKS]
    _Strictness.lock = threading.Lock()
    if _Strictness.threads and _Strictness.found:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
    _Strictness.threads = 0


os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def _strictly() -> Iterator[None]:
    """Decode with Pillow's LOAD_TRUNCATED_IMAGES set to False, and restore it afterwards.

    The flag is process-wide, and other libraries set it. It is False while any thread decodes in
    this block.
    """
    with _Strictness.lock:
        if _Strictness.threads == 0:
            _Strictness.found = ImageFile.LOAD_TRUNCATED_IMAGES
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _Strictness.found = True
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _Strictness.threads += 1
    try:
        yield
    finally:
        with _Strictness.lock:
            _Strictness.threads -= 1
            if _Strictness.threads == 0 and _Strictness.found:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def _load(
    image: Image.Image, name: str, limits: ImageLimits, jpeg: JpegFile | None
) -> tuple[str, ...]:
    """Check the header, then decode the image. Return notes, for example on data that could not be
    checked."""
    check_pixels(image.width, image.height, name, limits)
    notes = check_blocks(jpeg, name) if jpeg is not None else ()
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        check_tags(image, name)
        if image.tile:
            _prepare_tiff(image, name, limits)
            notes = check_strips(image, name)
    image.load()
    return notes


def _prepare_tiff(image: TiffImagePlugin.TiffImageFile, name: str, limits: ImageLimits) -> None:
    """Check that the strips or tiles cover the image, and allocate the image.

    Pillow would leave the area of a missing strip black. Pillow also warns when it allocates an
    image above its own pixel limit.
    """
    width, height = image._tile_size
    check_pixels(width, height, name, limits)
    extents = {tile.extents for tile in image.tile if tile.extents is not None}
    if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in extents) < width * height:
        raise EOFError
    if image._im is None:
        image.im = Image.new(image.mode, (width, height)).im


def _check_icons(data: bytes, name: str, limits: ImageLimits) -> None:
    """Check the sizes in the headers of an icon's images, because its directory may claim less.

    Pillow decodes the largest image when it opens the file.
    """
    [count] = struct.unpack_from("<H", data, 4)
    if count > MAX_ICONS:
        raise ValueError(f"an icon with {count} images")
    for entry in range(count):
        [offset] = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data.startswith(b"\x89PNG", offset):
            width, height = struct.unpack_from(">II", data, offset + 16)
        else:
            width, height = (abs(side) for side in struct.unpack_from("<ii", data, offset + 4))
        check_pixels(width, height, name, limits)


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    """Return a note if the image has several frames. Call this function last, because it changes
    the file's position. For a GIF or TIFF, the note has no number, because counting would read the
    whole file."""
    try:
        with _strictly():
            if isinstance(image, GifImagePlugin.GifImageFile | TiffImagePlugin.TiffImageFile):
                return ("first of several frames",) if image.is_animated else ()
            frames = int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 - plug-ins raise anything
        return ("first of several frames",)
    return (f"first of {frames} frames",) if frames > 1 else ()


def _seconds_at_most(image: Image.Image, jpeg: JpegFile | None) -> float:
    """Estimate an upper bound on the seconds that decoding takes on a slow, busy core."""
    pixels = image.width * image.height
    if jpeg is None:
        return pixels / SLOW_PIXELS_A_SECOND
    return pixels * jpeg.scans / SLOW_SCAN_PIXELS_A_SECOND


def _peak_bytes(image: Image.Image) -> int:
    return image.width * image.height * BYTES_A_PIXEL.get(str(image.format), OTHER_BYTES_A_PIXEL)
