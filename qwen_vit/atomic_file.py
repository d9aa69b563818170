"""Files that appear under their name whole and flushed to the disk, or not at all."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qwen_vit.errors import ExportError

__all__ = ["TEMPORARY_SUFFIX", "atomic_file", "cannot_write"]

TEMPORARY_SUFFIX = ".tmp"
NAME_CHARACTERS = 40  # of the file's own name: with the rest well below a name's 255 bytes


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` when the block ends well.

    >>> with atomic_file(Path("notes.txt")) as file:  # doctest: +SKIP
    ...     file.write(b"whole or absent")

    It is written beside `path` under a hidden name that starts with the file's own, and ends in
    TEMPORARY_SUFFIX: only a process that was killed leaves one. Raises ExportError where the system
    refuses. The block should write and do nothing else: its OSErrors are taken for the file's.
    """
    temporary = path.with_name(
        f".{path.name[:NAME_CHARACTERS]}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    )
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:  # whatever stopped it, an interrupt too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> ExportError:
    """What to say where the system refuses to write `path`."""
    return ExportError(
        f"{path} could not be written ({error.strerror or error}); check the folder, its "
        "permissions and the space on its disk"
    )


def _sync_folder(folder: Path) -> None:
    """The new name, too, outlives a power cut, where the file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
