"""Export to object storage. Upload whole shards, and write settings conditionally."""

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import file_digest
from itertools import compress
from pathlib import Path
from re import Pattern
from typing import Any

from qwen_vit.common.atomic_file import atomic_file, cannot_write
from qwen_vit.common.storage import list_names, storage_errors
from qwen_vit.common.storage_writes import (
    has_conditions,
    put_bytes,
    put_file,
    remove_object,
    written_s,
)
from qwen_vit.common.store_path import PathOrAddress, StorePath, as_path
from qwen_vit.errors import ExportError
from qwen_vit.export.folder import (
    OTHER_FOLDER,
    ChangedError,
    ExportFolder,
    LocalFolder,
    refuse_strange,
)
from qwen_vit.export.lock import hold_folder, short_lock

__all__ = ["StoreFolder", "as_folder"]

logger = logging.getLogger("qwen_vit")

READ_ONLY = {"hf": "git commits, which cannot be written file by file"}
COPY_BYTES = 2**22
ASKED_AT_A_TIME = 16  # requests at a time


class StoreFolder(ExportFolder):
    """Access an export below a prefix in object storage, through a scratch folder on each machine.

    Conditional writes, if the store supports them, resolve conflicts between machines. A new shard
    then never replaces another process's shard. Settings and a manifest replace only the version
    that this process has read. Locks separate the processes of one user on a machine. If an upload
    fails, the file remains in `scratch` for the next run.
    """

    def __init__(self, out: StorePath, scratch: Path | None = None) -> None:
        self.place = self.out = StorePath(out.address.rstrip("/"))
        self.scratch = scratch or _scratch_of(self.out.address)

    def __reduce__(self) -> Any:  # another machine needs a different scratch folder
        return StoreFolder, (self.out,)

    def __truediv__(self, name: str) -> StorePath:
        return self.out / name

    def names(self) -> set[str]:
        with self._plain_errors():
            return self.out.names()

    def has(self, name: str) -> bool:
        with self._plain_errors(name):
            return (self / name).is_file()

    def size(self, name: str) -> int:
        with self._plain_errors(name):
            return (self / name).stat().st_size

    def version(self, name: str) -> str | None:
        path = self / name
        with self._plain_errors(name):
            return path.content()[2] if path.is_file() else None

    def write(self, name: str, data: bytes, replaces: str | None) -> str | None:
        address = (self / name).address
        try:
            return put_bytes(address, data, replaces=replaces)
        except FileExistsError:
            raise ChangedError(
                "another process changed it", name=address, remedy="run the same command again"
            ) from None
        except OSError as error:
            raise self._error(error, name, "written") from error

    def publish(self, name: str, *, replace: bool = False, keep: bool = False) -> None:
        path = self.scratch / name
        try:
            put_file((self / name).address, path, is_new=not replace)
        except FileExistsError:  # the existing file is complete and has the same images
            logger.debug("%s exists", self / name)
        except OSError as error:
            raise self._error(error, name, "written") from error
        if not keep:
            path.unlink(missing_ok=True)

    def publish_version(self, name: str, replaces: str | None) -> None:
        path = self.scratch / name
        self.write(name, path.read_bytes(), replaces)
        path.unlink(missing_ok=True)

    def fetch(self, name: str, sha256: str | None = None) -> Path | None:
        path, source = self.scratch / name, self / name
        if path.exists() and (sha256 is None or _sha256_of(path) == sha256):
            return path
        _make_private(self.scratch)  # a worker on another machine has no folder yet
        with self._plain_errors(name):
            if not source.is_file():
                return None
            size = source.stat().st_size
            written = written_s(source.address)
            with atomic_file(path) as file:
                for start in range(0, size, COPY_BYTES):
                    file.write(source.read(start, min(start + COPY_BYTES, size)))
            # the export compares files that are newer than a listing
            os.utime(path, (written, written))
        return path

    def remove(self, name: str) -> None:
        with suppress(OSError):
            (self.scratch / name).unlink(missing_ok=True)
        with suppress(OSError):
            remove_object((self / name).address)

    def which_exist(self, names: Iterable[str]) -> set[str]:
        names, found = list(names), self.names()
        missing = [name for name in names if name not in found]
        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            is_there = list(pool.map(self.has, missing))  # a listing may omit the newest files
        return found.intersection(names) | {*compress(missing, is_there)}

    def check(self, settings: str, leftover: Pattern[str], *, make: bool) -> None:
        scheme = self.out.address.partition("://")[0].lower()
        if scheme in READ_ONLY:
            raise ExportError(
                f"{scheme}:// stores {READ_ONLY[scheme]}",
                name=str(self),
                remedy="export into a local folder, and upload this folder with `hf upload`",
            )
        with self._plain_errors():
            if self.out.is_file():
                raise ExportError("not a folder", name=str(self), remedy=OTHER_FOLDER)
            names = list_names(self.out.address)
        # the listing may omit a new file
        if names and settings not in names and not self.has(settings):
            refuse_strange(self, sorted(names), settings)
        if make:
            _make_private(self.scratch)

    @contextmanager
    def hold(self, part: tuple[int, int]) -> Iterator[None]:
        _make_private(self.scratch)
        with ExitStack() as locks:
            try:
                locks.enter_context(hold_folder(self.scratch, part))
            except ExportError as error:
                raise ExportError.of(error, name=str(self)) from None
            try:
                yield
            finally:
                self._clean_up(part)
        with suppress(OSError):
            self.scratch.rmdir()

    def check_conditions(self, name: str) -> None:
        path = self / name
        try:
            is_safe = has_conditions(path.address, path.read_bytes())
        except OSError as error:
            raise self._error(error, name, "written") from error
        if not is_safe:
            logger.warning(
                "%s has no conditional writes: make sure that no other process writes there", self
            )

    def _clean_up(self, part: tuple[int, int]) -> None:
        """Remove the copies of listings, unless other files in `scratch` show that another process
        on this machine or a later run needs them."""
        own = {"lock", "lock-moment", "lock-{}-of-{}".format(*part)}
        with suppress(OSError), short_lock(self.scratch):
            names = {*os.listdir(self.scratch)} - own
            if all(name.startswith("listing") for name in names):
                for name in names:
                    (self.scratch / name).unlink(missing_ok=True)

    def _error(self, error: OSError, name: str = "", doing: str = "read") -> ExportError:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        fact, remedy, _ = storage_errors(cause, doing)
        return ExportError(fact, name=str(self / name if name else self), remedy=remedy)

    @contextmanager
    def _plain_errors(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(error, name) from error


def as_folder(folder: PathOrAddress | ExportFolder) -> ExportFolder:
    """Return the export folder of a path or an address.

    >>> print(as_folder("features").scratch)
    features
    """
    if isinstance(folder, ExportFolder):
        return folder
    path = as_path(folder)
    return StoreFolder(path) if isinstance(path, StorePath) else LocalFolder(path)


def _scratch_of(address: str) -> Path:
    """Return the scratch folder of an address, which is the same for all runs of this user on this
    machine."""
    digest = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(tempfile.gettempdir(), f"qwen-vit-{os.getuid()}", digest)


def _make_private(folder: Path) -> None:
    """Make a folder and its parent folder. Only this user may read or write them."""
    for each in (folder.parent, folder):
        try:
            each.mkdir(mode=0o700, exist_ok=True)
            status = each.lstat()
        except OSError as error:
            raise cannot_write(each, error) from None
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ExportError(
                "not a folder that this user owns",
                name=str(each),
                remedy="set TMPDIR to another folder",
            )


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
