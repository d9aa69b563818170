"""Write files that appear complete and flushed to the disk, or not at all."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qwen_vit.common.arguments import check_local_path, missing_remedy
from qwen_vit.errors import ArgumentError, ExportError, with_options

__all__ = [
    "TEMPORARY_SUFFIX",
    "AtomicFile",
    "WriteError",
    "atomic_file",
    "cannot_write",
    "check_parent",
    "check_target",
    "check_utf8",
    "refuse_existing",
    "refuse_protected",
    "sync_folder",
]

TEMPORARY_SUFFIX = ".tmp"
# other suffixes are valid: "run-0.5" has the suffix .5
FORMATS = frozenset(
    (".arrow", ".csv", ".h5", ".html", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".pickle",
     ".pkl", ".png", ".pt", ".pth", ".safetensors", ".tsv")
)  # fmt: skip
# the errors of os.link on file systems without hard links, such as FAT
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# the names of an export's files
OF_EXPORT = re.compile(
    r"export\.json|listing(-\d+)?\.jsonl|manifest\.(parquet|jsonl)|(shard|segment)-[\d-]+\.safetensors"
)
NAME_CHARACTERS = 40  # of the file's own name: the hidden name must fit into 255 bytes


class WriteError(ExportError):
    """Report that the system could not write a file, for example on a full disk."""


class AtomicFile:
    """Write a hidden file beside `path`, and replace `path` with the file on commit.

    >>> growing = AtomicFile(Path("notes.txt"))  # doctest: +SKIP
    >>> growing.file.write(b"whole or absent")  # doctest: +SKIP
    >>> growing.commit()  # doctest: +SKIP

    A killed process may leave a hidden file, whose name ends in TEMPORARY_SUFFIX. With
    `overwrite=False`, the class raises ExportError if `path` exists, now or at `commit`.
    """

    def __init__(self, path: Path, *, overwrite: bool = True) -> None:
        self.path = path
        self._overwrite = overwrite
        if os.path.isdir(path):
            raise ExportError(
                "a folder", name=str(path), expected="a file to write", remedy="pass another path"
            )
        if not overwrite:
            refuse_existing(path)  # before the work
        self._temporary = path.with_name(
            f".{path.name[:NAME_CHARACTERS]}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        )
        try:
            self.file: BinaryIO = open(self._temporary, "x+b")  # noqa: SIM115 - closed below
        except OSError as error:
            raise cannot_write(path, error) from None

    def commit(self, path: Path | None = None) -> None:
        """Flush the file to the disk, and rename it to its path, or to another path in the same
        folder."""
        self.path = path or self.path
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._take_its_name()
            sync_folder(self.path.parent)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        finally:
            self.discard()

    def _take_its_name(self) -> None:
        if self._overwrite:
            os.replace(self._temporary, self.path)
            return
        try:
            os.link(self._temporary, self.path)  # a rename would replace an existing file
        except FileExistsError:
            refuse_existing(self.path)
            raise
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            refuse_existing(self.path)
            os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Close the file, and remove it if it is not committed. A second call has no effect."""
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing. If the block succeeds, the file replaces `path`.

    >>> with atomic_file(Path("notes.txt")) as file:  # doctest: +SKIP
    ...     file.write(b"whole or absent")

    The block should only write, because the function reports every OSError of the block as an error
    of this file.
    """
    growing = AtomicFile(path, overwrite=overwrite)
    try:
        yield growing.file
        growing.commit()
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:  # also after an interrupt
        growing.discard()


def check_utf8(path: Path) -> None:
    """Raise ExportError for a path that is not UTF-8, which safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ExportError(
            "not UTF-8",
            name=str(path),
            expected="a path that safetensors can open",
            remedy="pass another path",
        ) from None


def check_parent(path: Path) -> None:
    """Raise ExportError if an output's parent is not an existing folder.

    Also raises the other OSErrors of os.stat.
    """
    try:
        is_folder, fact = stat.S_ISDIR(os.stat(path.absolute().parent).st_mode), "not a folder"
    except FileNotFoundError:
        is_folder, fact = False, "does not exist"
    except NotADirectoryError:
        is_folder, fact = False, "not a folder"
    if not is_folder:
        raise ExportError(
            fact, name=str(path.parent), remedy=missing_remedy(path, "create the folder first")
        )


def refuse_existing(path: Path) -> None:
    """Raise ExportError for a file that a result would replace."""
    if os.path.lexists(path):
        raise ExportError(
            "already exists",
            name=str(path),
            remedy=with_options(
                "pass another path, or {} to replace the file", ("overwrite", True)
            ),
        ) from None


def check_target(name: str, value: str | os.PathLike[str], suffix: str = ".safetensors") -> Path:
    """Return an argument that names a file to write, as a path.

    Raises ArgumentError for an address, a folder's name and a value that is not a path. Raises
    ExportError for the suffix of another format, for a path that is not UTF-8 or not in an existing
    folder, and for a file that `refuse_protected` refuses.
    """
    path = check_local_path(name, value, "the file to write")
    if os.fspath(value).endswith(os.sep):
        raise ArgumentError(
            f"{name} names a folder", name=os.fspath(value), expected="the file to write"
        )
    check_utf8(path)
    refuse_protected(path)
    if path.suffix.lower() in FORMATS - {suffix}:
        raise ExportError(
            f"its suffix is {path.suffix}",
            name=str(path),
            expected=suffix,
            remedy=f"pass {path.with_suffix(suffix)}",
        )
    try:
        check_parent(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    return path


def refuse_protected(path: Path) -> None:
    """Raise ExportError for a file that a result must not replace: a symbolic link, such as
    /dev/stdout, or a file of an export."""
    if os.path.islink(path):
        raise ExportError(
            "a symbolic link", name=str(path), expected="a file", remedy="pass the link's target"
        )
    if OF_EXPORT.fullmatch(path.name) and _is_in_export(path):
        raise ExportError(
            "the name of a file of the export in this folder",
            name=str(path),
            remedy="pass another path",
        )


def _is_in_export(path: Path) -> bool:
    # an export can restore a lost export.json from its other files
    return any(os.path.lexists(path.with_name(name)) for name in ("export.json", "listing.jsonl"))


def cannot_write(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"could not be written ({error.strerror or error})",
        name=str(path),
        remedy="check the folder, its permissions and the space on its disk",
    )


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that new names in it survive a power cut, if the file system can flush
    folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
