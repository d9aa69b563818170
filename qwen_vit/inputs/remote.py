"""List the objects of an address in object storage, and read their bytes."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from qwen_vit.common.storage import (
    BLOCK_BYTES,
    MAGIC,
    RemoteObject,
    find_object,
    is_remote,
    list_objects,
    match_objects,
    open_object,
    storage_errors,
)
from qwen_vit.common.store_cache import cache_folder, read_cached
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.images.image import ImageLimits, check_file_bytes
from qwen_vit.inputs.listing import Item

__all__ = [
    "below",
    "copy_object",
    "listed_objects",
    "open_input",
    "read_object",
    "refuse",
    "remote_item",
]

COPY_BYTES = 2**24  # of an object, copied to the disk at once
SLASHES = re.compile(r"(?<=[^:/])/{2,}")


def listed_objects(address: str) -> Iterator[tuple[str, RemoteObject, bool]]:
    """Yield each object of an address with its name, and whether the address names only this
    object.

    For a folder, the name is the object's path below the folder. For an object or a pattern, it is
    the object's address.
    """
    address = SLASHES.sub("/", address)
    count = 0
    try:
        if MAGIC.search(address):
            for found in match_objects(address):
                yield found.address, found, False
                count += 1
        elif (single := find_object(address)) is not None:
            yield address, single, True
            return
        else:
            folder = address.rstrip("/") + "/"
            for found in list_objects(folder):
                yield found.address.removeprefix(folder), found, False
                count += 1
    except OSError as error:
        raise refuse(address, error) from None
    if MAGIC.search(address) and not count:
        raise ExportError("no object matches", name=address, remedy="check the pattern")


def refuse(address: str, error: OSError) -> ExportError:
    fact, remedy, _ = storage_errors(error)
    return ExportError(fact, name=address, remedy=remedy)


def remote_item(name: str, found: RemoteObject) -> Item:
    return Item(name, found.address, offset=0, size=found.size, version=found.version)


def open_input(
    path: str,
    name: str,
    expected: str,
    *,
    block_bytes: int = BLOCK_BYTES,
    version: str | None = None,
) -> BinaryIO:
    """Open a file or an object to read it in pieces.

    Raises ImageError if the object cannot be opened, if its version is not `version`, or if the
    path is not a regular file. Raises OSError if the path cannot be opened, and ExportError if a
    package for object storage is not installed.
    """
    if is_remote(path):
        try:
            return open_object(path, block_bytes, version)
        except OSError as error:
            fact, remedy, code = storage_errors(error)
            raise ImageError(fact, name=name, remedy=remedy, code=code) from error
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block
        raise ImageError(
            "not a regular file",
            name=name,
            expected=expected,
            remedy="copy its content to a file",
            code="not-a-file",
        )
    return open(path, "rb")


def read_object(item: Item, limits: ImageLimits) -> bytes:
    with _image_errors(item):
        start, size, version = _extent(item)
        check_file_bytes(size, item.id, limits)
        return read_cached(item.source, start, start + size, version, cache_folder())


def copy_object(item: Item, file: BinaryIO, check_size: Callable[[int], None]) -> None:
    with _image_errors(item):
        start, size, version = _extent(item)
        check_size(size)
        folder = cache_folder()
        for begin in range(start, start + size, COPY_BYTES):
            end = min(begin + COPY_BYTES, start + size)
            file.write(read_cached(item.source, begin, end, version, folder))
        file.seek(0)


def _extent(item: Item) -> tuple[int, int, str | None]:
    """Return an item's offset in its object, its number of bytes, and the object's version."""
    if item.size is not None:
        return item.offset or 0, item.size, item.version
    found = find_object(item.source)  # a list gives no size
    if found is None:
        raise FileNotFoundError
    return item.offset or 0, found.size, found.version


@contextmanager
def _image_errors(item: Item) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except OSError as error:
        fact, remedy, code = storage_errors(error)
        name = "" if item.id == item.source else f"its object {item.source} "
        raise ImageError(f"{name}{fact}", name=item.id, remedy=remedy, code=code) from error
    except ExportError as error:  # a package is not installed
        raise ImageError.of(error, name=item.id, code="unreadable") from None


def below(folder_of: str, source: str) -> str:
    """Return the address of a source that a remote list names relative to the list's own folder.

    >>> below("s3://bucket/lists/a.txt", "../images/1.jpg")
    's3://bucket/images/1.jpg'
    """
    scheme, _, path = folder_of.partition("://")
    joined = os.path.normpath(os.path.join(os.path.dirname(path), source))
    return f"{scheme}://{joined}"
