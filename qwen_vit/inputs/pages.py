"""List the pages of images, each page as a separate image."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import ImageError
from qwen_vit.images.formats import identify
from qwen_vit.images.image import ImageLimits, ImagePage
from qwen_vit.images.pages import HEAD_BYTES, ONE_PAGE, count_pages, page_id
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item
from qwen_vit.inputs.urls import is_https

__all__ = ["as_page", "page_items"]


def page_items(items: Iterable[Item], limits: ImageLimits) -> Iterator[Item]:
    """Yield each page of an image as an item. Yield videos and images with a single page unchanged.

    An image with more than `images.pages.MAX_PAGES` pages becomes an item with an error.

    >>> rocket = Item("rocket.jpg", "tests/photographs/rocket.jpg")
    >>> [item.id for item in page_items([rocket], ImageLimits())]
    ['rocket.jpg']
    """
    for item in items:
        is_one = item.error is not None or item.page is not None or item.is_video
        try:
            count = 1 if is_one else _count(item, limits)
        except ImageError as error:
            yield replace(item, error=(error.code, str(error)))
            continue
        if count == 1:
            yield item
        for page in range(1, count + 1) if count > 1 else ():
            yield replace(item, id=page_id(item.id, page), page=page)


def as_page(data: bytes, item: Item) -> bytes | ImagePage:
    return data if item.page is None else ImagePage(data, item.page)


def _count(item: Item, limits: ImageLimits) -> int:
    """Return the number of pages, or 1 for an unreadable image."""
    if item.is_file and _has_one_page(item):
        return 1
    try:
        data = read_item(item, limits)
    except ImageError:  # reading the image again reports the error
        return 1
    return count_pages(data, item.id, limits)


def _has_one_page(item: Item) -> bool:
    """Return whether the listing need not read a file, because its format has no pages or it is not
    a regular file."""
    is_on_disk = not (is_remote(item.source) or is_https(item.source))
    if is_on_disk and not os.path.isfile(item.source):  # opening a FIFO would block
        return True
    try:
        with open(item.source, "rb") as file:
            start = file.read(HEAD_BYTES)
        return identify(start, item.id) in ONE_PAGE
    except (OSError, ValueError):
        return False
