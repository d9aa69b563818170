"""Split a TIFF into pages and an animation into frames, as separate images."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

from PIL import GifImagePlugin, Image, ImageFile, TiffImagePlugin

from qwen_vit.errors import ImageError
from qwen_vit.images.formats import decoder, identify
from qwen_vit.images.image import ImageLimits, ImagePage, check_pixels

__all__ = [
    "HEAD_BYTES", "MAX_PAGES", "Pages", "count_pages", "is_still", "page_id", "split_page_id",
    "split_pages",
]  # fmt: skip

Pages = Literal["first", "all"]

MAX_PAGES = 10_000  # pages of one file
PAGE_ID = re.compile(r"(.+)#page=([1-9][0-9]{0,4})", re.DOTALL)
HEAD_BYTES = 16  # first bytes of a file, enough to recognise a format without pages
ONE_PAGE = ("JPEG", "BMP", "PPM", "ICO", "TGA", "JPEG2000")


def page_id(name: str, page: int) -> str:
    """Return the id of one page of an image with several pages.

    >>> page_id("scan.tif", 2)
    'scan.tif#page=2'
    """
    return f"{name}#page={page}"


def split_page_id(name: str) -> tuple[str, int | None]:
    """Return an image's name and its page, or None for an image without pages.

    >>> split_page_id("scan.tif#page=2"), split_page_id("scan.tif")
    (('scan.tif', 2), ('scan.tif', None))
    """
    found = PAGE_ID.fullmatch(name)
    return (name, None) if found is None else (found[1], int(found[2]))


def split_pages(source: Any, name: str, limits: ImageLimits) -> Iterator[tuple[Any, str]]:
    """Yield an image's pages with names. An image with one page keeps its own name.

    A source other than bytes or a PIL image counts as one page.
    """
    if isinstance(source, bytes):
        for page in range(1, (count := count_pages(source, name, limits)) + 1):
            yield (source, name) if count == 1 else (ImagePage(source, page), page_id(name, page))
    elif isinstance(source, Image.Image) and getattr(source, "is_animated", False):
        count, before = _bounded(getattr(source, "n_frames", 1), name), source.tell()
        try:
            for page in range(1, count + 1):
                source.seek(page - 1)
                check_pixels(*source.size, page_id(name, page), limits)
                yield source.copy(), page_id(name, page)
        finally:
            source.seek(before)
    else:
        yield source, name


def is_still(head: bytes) -> bool:
    """Return whether a file with these first bytes is a PNG or WebP without animation.

    >>> is_still(b"\\x89PNG...IHDR...IDAT"), is_still(b"\\x89PNG...IHDR...acTL...IDAT")
    (True, False)
    """
    if head.startswith(b"\x89PNG"):
        return b"IDAT" in head and b"acTL" not in head
    # a still WebP has no VP8X chunk, or one without the animation bit
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP" and len(head) > 20
    return is_webp and not (head[12:16] == b"VP8X" and head[20] & 2)


def count_pages(data: bytes, name: str, limits: ImageLimits) -> int:
    """Count a file's pages by its headers. An unreadable file counts as one page.

    Raises ImageError with code "slow" for more than MAX_PAGES.
    """
    try:
        file_format = identify(data, name, limits.formats)
        if file_format in ONE_PAGE:
            return 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoding it warns
            image = decoder(file_format, name, limits)(io.BytesIO(data), "")
            return _bounded(_count(image, data), name)
    except ImageError as error:
        if error.code == "slow":
            raise
    except Exception:  # noqa: BLE001 - plug-ins raise anything; decoding reports it
        pass
    return 1


def _count(image: ImageFile.ImageFile, data: bytes) -> int:
    if isinstance(image, GifImagePlugin.GifImageFile):
        return _gif_frames(data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow's n_frames has no bound
        count = 1
        with suppress(EOFError):
            while count <= MAX_PAGES:
                image.seek(count)
                count += 1
        return count
    return int(getattr(image, "n_frames", 1))


def _gif_frames(data: bytes) -> int:
    """Count a GIF's frames, up to MAX_PAGES + 1. Pillow's count would decode without a bound."""
    at, count = 13 + _palette_bytes(data[10]), 0
    while at < len(data) and count <= MAX_PAGES:
        kind = data[at]
        if kind == 0x2C and at + 9 < len(data):  # an image: position, size, palette, code size
            count += 1
            at += 10 + _palette_bytes(data[at + 9]) + 1
        elif kind == 0x21:  # an extension
            at += 2
        else:
            break
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return max(1, count)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _bounded(count: int, name: str) -> int:
    if count > MAX_PAGES:
        raise ImageError(
            f"more than {MAX_PAGES:,} pages or frames",
            name=name,
            remedy="split it into several files",
            code="slow",
        )
    return max(1, count)
