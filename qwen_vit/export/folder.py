"""Where an export is: a folder on a disk, or one in object storage.

Files grow on a disk. In a local folder they grow at their place. For object storage they grow in a
scratch folder of this machine, and `publish` uploads each whole. Everything else in the export is
the same for both.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from re import Pattern

from qwen_vit.common.atomic_file import atomic_file, cannot_write, check_utf8
from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import ExportError, Wording, display_name
from qwen_vit.export.lock import LOCK_NAME, hold_folder

__all__ = ["OTHER_FOLDER", "ChangedError", "ExportFolder", "LocalFolder", "refuse_strange"]

OTHER_FOLDER = Wording("pass another folder", shell="pass another --out")


class ChangedError(ExportError):
    """Another process wrote the file since it was read."""


class ExportFolder(ABC):
    """An export's files, by name. `folder / name` is the path or the address of a finished file.

    Attributes:
        place: the folder's path, or its address.
        scratch: where files grow, on this machine's disk.
    """

    place: AnyPath
    scratch: Path

    def __str__(self) -> str:
        return str(self.place)

    @abstractmethod
    def __truediv__(self, name: str) -> AnyPath: ...

    @abstractmethod
    def names(self) -> set[str]:
        """The names of the finished files. A store may omit the newest."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a finished file exists."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The bytes of a finished file."""

    @abstractmethod
    def version(self, name: str) -> str | None:
        """The version of a file in a store; None if it does not exist, and on a disk."""

    @abstractmethod
    def write(self, name: str, data: bytes, replaces: str | None) -> str | None:
        """Write a small file. Returns its version.

        It replaces the version `replaces`, or is new for None. Raises ChangedError if another
        process changed it.
        """

    @abstractmethod
    def publish(self, name: str, *, replace: bool = False, keep: bool = False) -> None:
        """Give a file that grew in `scratch` its place.

        Where one exists it stays, unless `replace`. With `keep` it stays in `scratch` as well.
        """

    @abstractmethod
    def publish_version(self, name: str, replaces: str | None) -> None:
        """Give a file that grew in `scratch` its place, as `write` does."""

    @abstractmethod
    def fetch(self, name: str, sha256: str | None = None) -> Path | None:
        """A finished file on this machine's disk; None if it does not exist.

        A copy in `scratch` that has the hash, or any copy without one, is not fetched again.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a finished file, if there is one."""

    @abstractmethod
    def check(self, settings: str, leftover: Pattern[str], *, make: bool) -> None:
        """Raise ExportError for a folder that holds anything but an export."""

    @abstractmethod
    def hold(self, part: tuple[int, int]) -> AbstractContextManager[None]:
        """Lock the checked folder, or a part of it, while the block runs."""

    @abstractmethod
    def check_conditions(self, name: str) -> None:
        """Log a warning if nothing keeps other machines from writing. The file must exist."""

    @abstractmethod
    def which_exist(self, names: Iterable[str]) -> set[str]:
        """Which of some names exist, newest ones included."""


class LocalFolder(ExportFolder):
    """A folder on a disk: files grow at their place.

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
        """Nothing to do: it grew at its place."""

    def publish_version(self, name: str, replaces: str | None) -> None:
        """Nothing to do."""

    def fetch(self, name: str, sha256: str | None = None) -> Path | None:
        return self / name if self.has(name) else None

    def remove(self, name: str) -> None:
        with suppress(OSError):
            (self / name).unlink(missing_ok=True)

    def check_conditions(self, name: str) -> None:
        """Nothing to do: a folder has locks."""

    def which_exist(self, names: Iterable[str]) -> set[str]:
        return set(filter(self.has, names))

    def check(self, settings: str, leftover: Pattern[str], *, make: bool) -> None:
        folder = self.scratch
        check_utf8(folder)
        try:
            if not folder.absolute().parent.is_dir():
                raise ExportError("not a folder", name=str(folder.parent), remedy="create it first")
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
            if self._is_new and part == (1, 1):  # removes it only if it is still empty
                with suppress(OSError):
                    self.scratch.rmdir()


def refuse_strange(folder: ExportFolder, names: Sequence[str], settings: str) -> None:
    """Raise ExportError for files that are not an export's."""
    if names:
        raise ExportError(
            f"it holds {display_name(sorted(names)[0])} ({len(names)} in all) and no {settings}",
            name=str(folder),
            expected="an export or an empty folder",
            remedy=OTHER_FOLDER,
        )
