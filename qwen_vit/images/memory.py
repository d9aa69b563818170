"""Limit the memory that all threads of the process together use for decoding."""

import ctypes
import os
import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_vit.common.arguments import short_repr
from qwen_vit.errors import ArgumentError

__all__ = ["DecodingMemory", "available_bytes", "decoding_memory", "set_decoding_memory"]

SHARE = 2  # half of the available memory: resized images and the encoder need the rest
TRIM_BYTES = 2**27  # for decoding: a trim before each smaller image would take too much time
UNKNOWN_BYTES = 2**32  # if the system does not report available memory
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class DecodingMemory:
    """Admit images to decoding, in the order of their requests, while their bytes fit.

    >>> memory = DecodingMemory(100)
    >>> with memory.hold(1_000):  # one image is always admitted
    ...     memory.held
    1000

    The default total is half of the memory that is available when the total is first needed,
    within the limits of machine, control group and process.
    """

    def __init__(self, total: int | None = None) -> None:
        self.held = 0
        self._total = total
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def total(self) -> int:
        if self._total is None:
            self._total = available_bytes() // SHARE
        return self._total

    def set_total(self, n_bytes: int | None) -> None:
        """With None, `total` computes the default again."""
        with self._changed:
            self._total = n_bytes
            self._changed.notify_all()

    @contextmanager
    def hold(self, n_bytes: int) -> Iterator[None]:
        """Wait until this number of bytes fits, and reserve it while the block runs.

        A block must not reserve a second time, because it might wait for itself.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or (
                    self.held and self.held + n_bytes > self.total
                ):
                    self._changed.wait()
                self.held += n_bytes
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            if n_bytes >= TRIM_BYTES:
                _give_back()
            yield
        finally:
            with self._changed:
                self.held -= n_bytes
                self._changed.notify_all()

    def forget_other_threads(self) -> None:
        """Reset the state after a fork, because the child has no other threads."""
        self.held = 0
        self._changed = threading.Condition()
        self._waiting.clear()


decoding_memory = DecodingMemory()
os.register_at_fork(after_in_child=decoding_memory.forget_other_threads)


def _give_back() -> None:
    """Return freed memory to the system, because glibc keeps it in per-thread arenas."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def set_decoding_memory(n_bytes: int | None) -> None:
    """Set the bytes that all threads together may use for decoding. With None, compute the default
    again.

    >>> set_decoding_memory(2**31)
    >>> set_decoding_memory(None)

    If an image needs more, the process decodes no other image at the same time.
    """
    if n_bytes is not None and (
        isinstance(n_bytes, bool) or not isinstance(n_bytes, int) or n_bytes < 1
    ):
        raise ArgumentError(
            f"n_bytes is {short_repr(n_bytes)}", expected="a whole number above 0, or None"
        )
    decoding_memory.set_total(n_bytes)


def available_bytes() -> int:
    """Return the available memory in bytes, within the limits of the machine, the control group
    and the process.

    >>> available_bytes() > 0
    True
    """
    left = [each for each in (_of_machine(), *_of_process(), *_of_control_groups()) if each]
    return max(1, min(left)) if left else UNKNOWN_BYTES


def _of_machine() -> int | None:
    return _in_kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _of_process() -> Iterator[int]:
    """Yield the memory that the process's own limits leave available (`ulimit -v` and `ulimit
    -d`)."""
    for limit, label in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield max(1, soft - (_in_kilobytes(Path("/proc/self/status"), label) or 0))


def _in_kilobytes(path: Path, label: str) -> int | None:
    kilobytes = _first_number(path, label)
    return None if kilobytes is None else kilobytes * 1024


def _first_number(path: Path, label: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.split()[:1] == [label]:
                return int(line.split()[1])
    return None


def _of_control_groups() -> Iterator[int]:
    """Yield the memory that the process's control group and its parents leave available (cgroup v2
    or v1)."""
    with suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = CGROUPS / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            place = root / group.strip("/")
            places = [place, *place.parents]  # in a container, the path may be the host's
            for each in places[: places.index(root) + 1]:
                yield from _left(each, *names)


def _left(group: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """Yield the memory that a group leaves available. Its inactive page cache counts as free,
    because the system can drop it."""
    with suppress(OSError, ValueError):  # "max" is not a number
        left = int((group / limit).read_text()) - int((group / used).read_text())
        yield max(1, left + (_first_number(group / "memory.stat", cache) or 0))
