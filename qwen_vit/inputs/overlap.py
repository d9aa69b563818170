"""Reject an image that two inputs contain."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import ExportError, display_name
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.lists import JSON_SUFFIX, LIST_SUFFIXES
from qwen_vit.inputs.suffixes import suffix_of
from qwen_vit.inputs.tars import COMPRESSED_TARS, MEDIA_SUFFIXES, TAR_SUFFIX

__all__ = ["Overlap"]


class Overlap:
    """Find images inside a folder that is another input, and files that have two names.

    The class does not check images of lists or of object storage. With several inputs, the memory
    grows with the number of files outside folders and lists, but not with the images inside a file.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._folders = {
            Path(given).absolute(): given
            for given in (inputs if len(inputs) > 1 else ())
            if not is_remote(given) and os.path.isdir(given)
        }
        self._is_needed = len(inputs) > 1
        self._ids: dict[str, str] = {}  # the first id of each file

    def checked(self, given: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items of an input. Raise ExportError for an image that another input also
        contains."""
        is_list = given == "-" or given.lower().endswith((*LIST_SUFFIXES, JSON_SUFFIX))
        if not self._is_needed or is_list or is_remote(given):
            yield from items
        elif (path := Path(given).absolute()) in self._folders:
            self._check_place(given, path)
            yield from items
        else:
            source = folder = ""
            for item in items:
                if item.source != source:  # the images of a tar follow each other
                    source = item.source
                    if _is_taken(item) and os.path.dirname(source) != folder:
                        folder = os.path.dirname(source)
                        self._check_place(item.id, Path(source))
                    other = self._ids.setdefault(source, item.id)
                    if other != item.id:
                        raise _twice(item.id, f"the same file as {display_name(other)}")
                yield item

    def _check_place(self, name: str, path: Path) -> None:
        for above in path.parents:
            if above in self._folders:
                folder = display_name(self._folders[above])
                raise _twice(name, f"also in the folder {folder}, which is another input")


def _is_taken(item: Item) -> bool:
    """Return whether a folder search also finds an item's file."""
    is_tar = item.source.lower().endswith((TAR_SUFFIX, *COMPRESSED_TARS))
    return is_tar or item.row is not None or suffix_of(item.source) in MEDIA_SUFFIXES


def _twice(name: str, fact: str) -> ExportError:
    return ExportError(
        fact, name=name, expected="each image once", remedy="omit one of the two inputs"
    )
