"""Record the images that a process is decoding, in a file that remains if the process is killed.

An image can end the decoding process, because the system runs out of memory or a decoder crashes. A
resumed export first decodes each recorded image in a child process, so a crash of the decoder does
not end the export again.
"""

import fcntl
import mmap
import os
import re
import secrets
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

__all__ = ["UNDER_WAY_NAME", "UnderWay"]

UNDER_WAY_NAME = re.compile(r"under-way-[0-9a-f]{16}")
# more slots than threads; a slot has a line of the listing, counted from 1, or 0 if it is free
SLOTS, SLOT = 1_024, struct.Struct("<Q")


class UnderWay:
    """Record the images that this process is decoding, and read the records of dead processes.

    >>> with UnderWay(Path("out")) as under_way, under_way.mark(7):  # doctest: +SKIP
    ...     decode()

    `suspects` are the lines that dead processes recorded, counted from 0 through all listings. The
    system keeps the file's pages after a process is killed, but not after a power cut.
    """

    def __init__(self, folder: Path) -> None:
        self.suspects = _left_by_dead_processes(folder)
        self.path = folder / f"under-way-{secrets.token_hex(8)}"
        self._free = list(range(SLOTS))
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        try:
            self._map = self._make_map()
        except OSError:  # a full disk: continue the export without this record
            self._map = mmap.mmap(-1, SLOTS * SLOT.size)

    def _make_map(self) -> mmap.mmap:
        self._file = open(self.path, "x+b")  # noqa: SIM115 - closed in __exit__
        with suppress(OSError):  # a file system without locks: no process takes over such a file
            fcntl.flock(self._file, fcntl.LOCK_EX)
        # storing to a page without disk space would kill the process
        os.posix_fallocate(self._file.fileno(), 0, SLOTS * SLOT.size)
        return mmap.mmap(self._file.fileno(), SLOTS * SLOT.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()  # the map remains until the last thread has finished its image
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    @contextmanager
    def mark(self, line: int) -> Iterator[None]:
        with self._lock:
            slot = self._free.pop()
        SLOT.pack_into(self._map, slot * SLOT.size, line + 1)
        try:
            yield
        finally:
            SLOT.pack_into(self._map, slot * SLOT.size, 0)
            with self._lock:
                self._free.append(slot)


def _left_by_dead_processes(folder: Path) -> frozenset[int]:
    """Return the lines in the files of ended processes, and remove these files."""
    lines: set[int] = set()
    for name in os.listdir(folder):
        if UNDER_WAY_NAME.fullmatch(name):
            with suppress(OSError), open(folder / name, "r+b") as file:
                # raises while the file's owner runs
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                data = file.read(SLOTS * SLOT.size)
                whole = data[: len(data) // SLOT.size * SLOT.size]
                lines |= {line - 1 for (line,) in SLOT.iter_unpack(whole) if line}
                (folder / name).unlink()
    return frozenset(lines)
