"""Warn of options that apply to no input, by the extensions of the inputs."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from qwen_vit.errors import Wording, with_options
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.pages import is_still
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.suffixes import suffix_of
from qwen_vit.inputs.tars import IMAGE_SUFFIXES
from qwen_vit.inputs.urls import is_https

__all__ = ["UnusedOptions"]

logger = logging.getLogger("qwen_vit")

OPTIONAL_SUFFIXES = (".jp2", ".j2k", ".ico", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
HEAD_BYTES = 4096  # usually enough to contain the start of a PNG's pixels
ANIMATIONS = (".gif", ".png", ".webp")
ONE_PAGE = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", *OPTIONAL_SUFFIXES)


class _Option(NamedTuple):
    name: Wording
    reason: str
    applies_to: Callable[[Item], bool] | None  # None: to no input


class UnusedOptions:
    """Find options that apply to no input, to log a warning for each.

    >>> unused = UnusedOptions(columns=ParquetColumns("image"), as_video=True)
    >>> items = list(unused.watch([Item("a.gif", "/data/a.gif")]))
    >>> unused.names
    ['column']

    `video` names the changed options of videos. An option with its default value is not checked.
    Every option applies to a file with an unknown extension, to a Parquet row and to an input that
    cannot be read.
    """

    def __init__(
        self,
        *,
        columns: ParquetColumns | None = None,
        limits: ImageLimits | None = None,
        video: Wording | None = None,
        as_video: bool = False,
        pages: str = "first",
        exif: str = "apply",
    ) -> None:
        limits = limits or ImageLimits()
        found = []
        if columns is not None:
            names = ("column",) if columns.id is None else ("column", "id_column")
            found.append(_Option(_named(*names), "no input is a Parquet file", _is_row))
        if limits.allow_urls:
            is_url = _Option(
                with_options("{}", "allow_urls"), "no input is an https:// address",
                lambda item: is_https(item.source),
            )  # fmt: skip
            found.append(is_url)
        if limits.formats:
            reason = "every input has the extension of another format"
            found.append(_Option(with_options("{}", "formats"), reason, _may_be_optional))
        if as_video:
            reason = "no input is an animated GIF, WebP or PNG"
            is_used: Callable[[Item], bool] | None = _may_be_animation
            if pages == "all":
                reason = with_options("with {}, each frame is an image", ("pages", "all"))
                is_used, as_video = None, False
            found.append(_Option(with_options("{}", "as_video"), reason, is_used))
        if pages == "all":
            reason = "no input has the extension of a format with pages or frames"
            found.append(_Option(with_options("{}", "pages"), reason, _may_have_pages))
        if exif != "apply":
            reason = "every input has the extension of a video"
            found.append(
                _Option(with_options("{}", "exif"), reason, lambda item: not item.is_video)
            )
        if video:
            found.append(
                _Option(
                    video,
                    "no input has the extension of a video",
                    lambda item: item.is_video or (as_video and _may_be_animation(item)),
                )
            )
        self._found = found

    @property
    def names(self) -> list[str]:
        return [str(each.name) for each in self._found]

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            if self._found:
                self._found = [each for each in self._found if not _applies(each, item)]
            yield item

    def warn(self) -> None:
        for each in self._found:
            logger.warning("ignored %s: %s", each.name, each.reason)


def _named(*names: str) -> Wording:
    return Wording.joined(" and ", [with_options("{}", name) for name in names])


def _applies(option: _Option, item: Item) -> bool:
    is_known = _suffix(item) in IMAGE_SUFFIXES or item.is_video
    is_unsure = _is_row(item) or item.error is not None or not is_known
    return option.applies_to is not None and (is_unsure or option.applies_to(item))


def _suffix(item: Item) -> str:
    return suffix_of(item.source if item.is_file else item.id)


def _is_row(item: Item) -> bool:
    return item.row is not None


def _may_be_optional(item: Item) -> bool:
    return _suffix(item) in OPTIONAL_SUFFIXES


def _may_be_animation(item: Item) -> bool:
    return _suffix(item) in ANIMATIONS and not (item.is_file and _is_still(item.source))


@lru_cache(maxsize=1)  # two options check the same item
def _is_still(path: str) -> bool:
    try:
        if not os.path.isfile(path):  # opening a FIFO would block
            return False
        with open(path, "rb") as file:
            return is_still(file.read(HEAD_BYTES))
    except (OSError, ValueError):  # reading the image reports the error
        return False


def _may_have_pages(item: Item) -> bool:
    return not item.is_video and _suffix(item) not in ONE_PAGE
