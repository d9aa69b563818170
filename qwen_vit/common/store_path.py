"""Give an address in object storage pathlib's methods for reading files."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from qwen_vit.common.arguments import check_path, is_address
from qwen_vit.common.storage import (
    RemoteObject,
    find_object,
    has_bucket,
    is_remote,
    list_names,
    storage_errors,
)
from qwen_vit.common.store_cache import read_cached
from qwen_vit.errors import ArgumentError

__all__ = ["AnyPath", "PathOrAddress", "StorePath", "as_path"]


class _Status(NamedTuple):
    st_size: int


@dataclass(frozen=True)
class StorePath:
    """Represent an address in object storage as a path. It caches the object's size and version.

    `cache` is a folder on this machine that stores the ranges read.

    >>> StorePath("s3://bucket/export/") / "export.json"
    StorePath(address='s3://bucket/export/export.json')

    Methods raise OSErrors whose `strerror` is the fact and the remedy for a message.
    """

    address: str
    listed: RemoteObject | None = field(default=None, repr=False, compare=False)
    cache: Path | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.address.rstrip('/')}/{name}", cache=self.cache)

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        return StorePath(self.address.rstrip("/").rpartition("/")[0], cache=self.cache)

    def absolute(self) -> "StorePath":
        """Return this path, because an address has the same meaning on every machine."""
        return self

    def names(self) -> set[str]:
        with _facts():
            return {name for name in list_names(self.address) if not name.endswith("/")}

    def is_file(self) -> bool:
        try:
            return self._object is not None
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Return whether the address is a prefix of objects."""
        try:
            return self._object is None
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> _Status:
        return _Status(self._found().size)

    def content(self) -> tuple[str, int, str | None]:
        """Return a value that changes with the object."""
        found = self._found()
        return found.address, found.size, found.version

    def read_bytes(self) -> bytes:
        return self.read(0, self._found().size)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """Open the object for reading. With `buffering=0`, each read requests a range. Otherwise
        one request reads the whole object."""
        return _Ranges(self) if buffering == 0 else io.BytesIO(self.read_bytes())

    def read(self, start: int, end: int) -> bytes:
        found = self._found()
        end = min(end, found.size)
        with _facts():
            return read_cached(found.address, start, end, found.version, self.cache)

    def _found(self) -> RemoteObject:
        found = self._object
        if found is None:
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        return found

    @cached_property
    def _object(self) -> RemoteObject | None:
        if self.listed is not None:
            return self.listed
        with _facts():
            return find_object(self.address)


AnyPath: TypeAlias = Path | StorePath
PathOrAddress: TypeAlias = str | os.PathLike[str] | StorePath


def as_path(
    path: PathOrAddress, name: str = "path", expected: str = "a path or an address"
) -> AnyPath:
    """Return a path on this machine, or an address in object storage.

    Raises ArgumentError for an address without a bucket, and for a value that is not a path. `name`
    and `expected` are for this error.

    >>> as_path("s3://bucket/features")
    StorePath(address='s3://bucket/features')
    """
    if isinstance(path, StorePath):
        return path
    path = check_path(name, path, expected)
    if not is_remote(path):
        if is_address(path):
            raise ArgumentError(
                "not an address in object storage",
                name=path,
                expected=expected,
                remedy="pass a path on this machine, or an address such as s3://BUCKET/NAME",
            )
        return Path(path)
    if not has_bucket(path):  # for example "s3://$BUCKET" with an empty variable
        raise ArgumentError(
            "names no bucket",
            name=path,
            expected=f"{path.partition('://')[0]}://BUCKET/NAME",
            remedy="check the address",
        )
    return StorePath(path)


class _Ranges(io.RawIOBase):
    """Read an object as a file, one range per read."""

    def __init__(self, path: StorePath) -> None:
        self._path, self._place = path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place}.get(whence, self._path.stat().st_size)
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._path.read(self._place, self._place + len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextmanager
def _facts() -> Iterator[None]:
    """Replace the text of a store's OSErrors with the fact and the remedy for a message."""
    try:
        yield
    except OSError as error:
        fact, remedy, _ = storage_errors(error)
        raise type(error)(error.errno or errno.EIO, f"{fact}; {remedy}") from error
