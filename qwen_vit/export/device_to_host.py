"""Pinned memory for results on their way from the GPU: one piece, used in turns."""

from collections import deque
from threading import Lock

import torch

__all__ = ["PinnedRing"]

ALIGNED_BYTES = 512


class PinnedRing:
    """Memory that is given out and comes back in the same order.

    >>> ring = PinnedRing(torch.empty(2**20, dtype=torch.uint8))
    >>> place = ring.take(1_000)
    >>> ring.give_back()

    torch's own allocator of pinned memory keeps every size that was ever asked for: an export of
    images of many sizes grew by hundreds of megabytes. One thread takes, another may give back.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._taken: deque[tuple[int, int]] = deque()  # begin and end of each place, oldest first
        self._lock = Lock()

    def take(self, n_bytes: int) -> torch.Tensor | None:
        """So many bytes, or None where they do not fit now."""
        size = n_bytes + -n_bytes % ALIGNED_BYTES
        with self._lock:
            begin = self._begin_of_room(size)
            if begin is None:
                return None
            self._taken.append((begin, begin + size))
            return self._memory[begin : begin + n_bytes]

    def give_back(self) -> None:
        """The oldest place that was taken is free again."""
        with self._lock:
            self._taken.popleft()

    def _begin_of_room(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= len(self._memory) else None
        oldest, end = self._taken[0][0], self._taken[-1][1]
        if end <= oldest:  # the places go round the end
            return end if end + size <= oldest else None
        if end + size <= len(self._memory):
            return end
        return 0 if size <= oldest else None
