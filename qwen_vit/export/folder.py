"""Define the access to an export's folder, and implement it for a folder on a disk.

The shard writer needs files on a disk. A local export keeps these files in the export's folder. For
object storage, the shard writer uses a scratch folder of this machine, and `publish` uploads each
finished file.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from re import Pattern

from qwen_vit.common.atomic_file import atomic_file, cannot_write, check_parent, check_utf8
from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import ExportError, Wording, display_name
from qwen_vit.export.lock import LOCK_NAME, hold_folder
from qwen_vit.feature_files.schema import SHARD

__all__ = ["OTHER_FOLDER", "ChangedError", "ExportFolder", "LocalFolder", "refuse_strange"]

OTHER_FOLDER = Wording("pass another folder", shell="pass another --out")


class ChangedError(ExportError):
    """Report that another process wrote the file after this process read the file's version."""


class ExportFolder(ABC):
    """Access an export's files by name. `folder / name` is a finished file's path or address.

    `scratch` is the folder on this machine's disk in which the export writes files.
    """

    place: AnyPath
    scratch: Path

    def __str__(self) -> str:
        return str(self.place)

    @abstractmethod
    def __truediv__(self, name: str) -> AnyPath: ...

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of all finished files, and on a disk also of temporary files. A store
        may omit its newest files."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int: ...

    @abstractmethod
    def version(self, name: str) -> str | None:
        """Return a file's version in a store, or None on a disk or for a missing file."""

    @abstractmethod
    def write(self, name: str, data: bytes, replaces: str | None) -> str | None:
        """Write a small file, and return its version in a store.

        In a store, the file replaces the version `replaces`, or must be new if `replaces` is None.
        Raises ChangedError if the store finds another version. A file on a disk is always replaced,
        because locks exclude other writers.
        """

    @abstractmethod
    def publish(self, name: str, *, replace: bool = False, keep: bool = False) -> None:
        """Move a finished file from `scratch` to its place in the export.

        Without `replace`, the method keeps an existing file there. With `keep`, a copy remains in
        `scratch`.
        """

    @abstractmethod
    def publish_version(self, name: str, replaces: str | None) -> None:
        """Move a finished file from `scratch` to its place, under the conditions of `write`."""

    @abstractmethod
    def fetch(self, name: str, sha256: str | None = None) -> Path | None:
        """Return a finished file's path on this machine's disk, or None if the file does not exist.

        The method returns a copy in `scratch` without a download if the copy has the hash `sha256`,
        or if `sha256` is None.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a finished file, and ignore errors."""

    @abstractmethod
    def check(self, settings: str, leftover: Pattern[str], *, make: bool) -> None:
        """Raise ExportError if the folder cannot hold an export, for example because of other
        files.

        With `make`, create a folder on a disk, or the scratch folder of a store.
        """

    @abstractmethod
    def hold(self, part: tuple[int, int]) -> AbstractContextManager[None]: ...

    @abstractmethod
    def check_conditions(self, name: str) -> None:
        """Log a warning if the store has no conditional writes. The file `name` must exist."""

    @abstractmethod
    def which_exist(self, names: Iterable[str]) -> set[str]:
        """Return the existing files among these names, including the newest files."""


class LocalFolder(ExportFolder):
    """Access an export in a folder on a disk, which is also its scratch folder.

    >>> print(LocalFolder(Path("features")) / "export.json")
    features/export.json
    """

    def __init__(self, path: Path) -> None:
        self.place = self.scratch = path
        self._is_new = False

    def __truediv__(self, name: str) -> Path:
        return self.scratch / name

    def names(self) -> set[str]:
        return set(os.listdir(self.scratch)) if self.scratch.exists() else set()

    def has(self, name: str) -> bool:
        return (self / name).exists()

    def size(self, name: str) -> int:
        return (self / name).stat().st_size

    def version(self, name: str) -> str | None:
        return None

    def write(self, name: str, data: bytes, replaces: str | None) -> str | None:
        with atomic_file(self / name) as file:
            file.write(data)
        return None

    def publish(self, name: str, *, replace: bool = False, keep: bool = False) -> None:
        """Do nothing, because the writer wrote the file at its final place."""

    def publish_version(self, name: str, replaces: str | None) -> None: ...

    def fetch(self, name: str, sha256: str | None = None) -> Path | None:
        return self / name if self.has(name) else None

    def remove(self, name: str) -> None:
        with suppress(OSError):
            (self / name).unlink(missing_ok=True)

    def check_conditions(self, name: str) -> None:
        """Do nothing, because a folder on a disk needs no conditional writes."""

    def which_exist(self, names: Iterable[str]) -> set[str]:
        return set(filter(self.has, names))

    def check(self, settings: str, leftover: Pattern[str], *, make: bool) -> None:
        folder = self.scratch
        check_utf8(folder)
        try:
            check_parent(folder)
            if os.path.lexists(folder) and not folder.is_dir():
                raise ExportError("not a folder", name=str(folder), remedy=OTHER_FOLDER)
            if make:
                self._is_new = not os.path.exists(folder)
                folder.mkdir(exist_ok=True)
            names = self.names()
        except OSError as error:
            raise cannot_write(folder, error) from None
        strange = [n for n in names if not LOCK_NAME.fullmatch(n) and not leftover.fullmatch(n)]
        if settings not in names:
            refuse_strange(self, strange, settings)
        written = folder if folder.exists() else folder.absolute().parent
        if not os.access(written, os.W_OK):
            raise ExportError("not writable", name=str(written), remedy="check its permissions")

    @contextmanager
    def hold(self, part: tuple[int, int]) -> Iterator[None]:
        try:
            with hold_folder(self.scratch, part):
                yield
        finally:
            if self._is_new and part == (1, 1):  # rmdir removes only an empty folder
                with suppress(OSError):
                    self.scratch.rmdir()


def refuse_strange(folder: ExportFolder, names: Sequence[str], settings: str) -> None:
    if names and not any(map(SHARD.fullmatch, names)):  # shards can restore the settings
        raise ExportError(
            f"the folder contains {display_name(sorted(names)[0])} ({len(names)} in all) and no "
            f"{settings}",
            name=str(folder),
            expected="an export or an empty folder",
            remedy=OTHER_FOLDER,
        )
