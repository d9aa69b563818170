"""Allow one writer for each part of a folder, with locks that name their owner.

The locks use flock, so the kernel releases the lock of a killed process. Some network disks do not
show one host's locks to another host, and some have no locks. Therefore the lock also belongs to
the owner that the lock file names, until the file is deleted. On the owner's host, the lock ends
with the named process.
"""

import fcntl
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_vit.common.atomic_file import cannot_write
from qwen_vit.common.strict_json import is_integer
from qwen_vit.errors import ExportError

__all__ = ["LOCK_NAME", "hold_folder", "short_lock"]

logger = logging.getLogger("qwen_vit")

LOCK_NAME = re.compile(r"lock(-moment|-\d+-of-\d+)?")
TIMEOUT_S = 0.5  # to wait for a lock that its owner is releasing
SHORT_LOCK_TIMEOUT_S = 600.0  # for another part's work on the whole folder, such as a manifest
POLL_S = 0.05


class _HeldError(ExportError):
    """Report that another process holds the lock."""


@contextmanager
def hold_folder(folder: Path, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Lock a folder, or part I of N, against every other writer while the block runs.

    >>> with hold_folder(Path("export")):  # doctest: +SKIP
    ...     write()

    Parts of the same N can be locked at the same time.
    """
    number, count = part
    with ExitStack() as locks:
        if count == 1:
            locks.enter_context(_hold(folder / "lock", fcntl.LOCK_EX))
            _refuse_other_counts(folder, count)  # for a disk without locks
        else:
            locks.enter_context(_hold(folder / "lock", fcntl.LOCK_SH))
            with short_lock(folder):
                _refuse_other_counts(folder, count)
                own = folder / f"lock-{number}-of-{count}"
                locks.enter_context(_hold(own, fcntl.LOCK_EX))
        yield


@contextmanager
def short_lock(folder: Path) -> Iterator[None]:
    """Let one part at a time do short work, such as writing a manifest.

    >>> with short_lock(Path("export")):  # doctest: +SKIP
    ...     write_manifest()

    The function waits up to SHORT_LOCK_TIMEOUT_S for each other owner of the lock.
    """
    with _hold(folder / "lock-moment", fcntl.LOCK_EX, SHORT_LOCK_TIMEOUT_S):
        yield


def _refuse_other_counts(folder: Path, count: int) -> None:
    for path in folder.glob("lock-*-of-*"):
        if not path.name.endswith(f"-of-{count}"):
            # raises if another process has it, else deletes the file
            with _hold(path, fcntl.LOCK_EX):
                pass


@contextmanager
def _hold(path: Path, kind: int, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    until, owner = math.inf, ""
    while True:
        try:
            descriptor = _acquire(path, kind)
            break
        except _HeldError as error:
            if error.fact != owner:  # reset the timeout when the owner changes
                until, owner = time.monotonic() + timeout_s, error.fact
            elif time.monotonic() > until:
                raise ExportError.of(error) from None
        time.sleep(POLL_S)
    try:
        yield
    finally:
        _release(descriptor, kind, path)


def _release(descriptor: int, kind: int, path: Path) -> None:
    """Release a lock. The last owner unlinks the file before it releases the exclusive lock,
    because another process may lock the file after the release."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_last = True
    except BlockingIOError:
        is_last = False
    except OSError:  # a disk without locks: other hosts would still respect our name
        is_last = kind == fcntl.LOCK_EX
    with suppress(OSError):
        if is_last:
            path.unlink(missing_ok=True)
    os.close(descriptor)


def _acquire(path: Path, kind: int) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from None
        try:
            is_locked = _lock(descriptor, kind, path)
            if _is_file_of(descriptor, path):
                _sign(descriptor, kind, path, is_locked=is_locked)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner unlinked it after we opened it


def _lock(descriptor: int, kind: int, path: Path) -> bool:
    """Lock the file, and return whether the disk has locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_owner(descriptor), path) from None
    except OSError as error:  # some network disks have no locks
        _warn_once(path.parent, str(error.strerror))
        return False
    return True


def _held(owner: str, path: Path) -> _HeldError:
    return _HeldError(
        f"{owner} is writing to it" if owner else "other parts are writing to it",
        name=str(path.parent),
        remedy="wait for the other process or stop it, and run the same command again",
    )


@lru_cache
def _warn_once(folder: Path, reason: str) -> None:
    logger.warning(
        "%s cannot be locked (%s): make sure that no other process writes there", folder, reason
    )


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int, kind: int, path: Path, *, is_locked: bool) -> None:
    """Write this process's name to the lock file, or empty the file for a shared lock.

    Raise _HeldError if a named owner may still write: an owner on another host, or, on a disk
    without locks, a running process of this host.
    """
    before = _read_owner(descriptor)
    host = socket.gethostname()
    if before and before.get("host") == host and not is_locked and _is_running(before.get("pid")):
        raise _held(_owner(descriptor), path)
    if before and before.get("host") != host:
        raise _HeldError(
            f"{_owner(descriptor)} was writing to it, and this host ({host}) cannot check whether "
            "that process still runs",
            name=str(path.parent),
            remedy=f"if that export has ended, delete {path}",
        )
    name = {"host": host, "pid": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    try:
        os.ftruncate(descriptor, 0)
        if kind == fcntl.LOCK_EX:
            os.pwrite(descriptor, json.dumps(name).encode(), 0)
    except OSError as error:
        raise cannot_write(path, error) from None
    if kind == fcntl.LOCK_EX and not is_locked:
        time.sleep(2 * POLL_S)  # for a process that read no name before we wrote ours
        if _read_owner(descriptor) != name:
            raise _held(_owner(descriptor), path)


def _is_running(pid: Any) -> bool:
    if not is_integer(pid) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # the process belongs to another user
        return True
    except (OSError, OverflowError):
        return False
    return True


def _read_owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _owner(descriptor: int) -> str:
    owner = _read_owner(descriptor)
    if not owner:
        return ""
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"
