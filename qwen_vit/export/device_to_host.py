"""Convert features to the stored dtype, and copy a GPU's features to pinned memory on a separate
CUDA stream."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_vit.export.options import RowFormat
from qwen_vit.export.records import ImageRecord
from qwen_vit.feature_files.schema import EMBEDS, rows_by_tensor
from qwen_vit.feature_files.writer import RowTensor
from qwen_vit.features import ImageFeatures

__all__ = ["MAX_UNWRITTEN_BYTES", "HostCopier", "HostCopy", "PinnedRing"]

ALIGNED_BYTES = 512
RING_BYTES = 2**29  # of pinned memory
MAX_UNWRITTEN_BYTES = RING_BYTES // 4 * 3  # of copies: room remains for one more


class HostCopy(NamedTuple):
    """Hold the rows of a group of images, which a GPU may still copy to the CPU. `event` marks the
    end of the copy, and is None if no copy is in progress."""

    rows: dict[str, Tensor]  # by tensor, in the order of the images
    is_finite: Tensor  # for each row of image_embeds: a NaN in a layer reaches image_embeds
    event: torch.cuda.Event | None
    release: Callable[[], None]  # frees the memory of the rows

    @property
    def n_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())


class HostCopier:
    def __init__(self, device: torch.device, form: RowFormat) -> None:
        self._form = form
        self._ring: PinnedRing | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._ring = PinnedRing(_pinned(RING_BYTES))

    def copy(self, images: Sequence[ImageRecord], features: Sequence[ImageFeatures]) -> HostCopy:
        """Set each image's `n_rows`, convert the rows, and begin to copy a GPU's rows to the CPU.

        `features` has one element for each image without an error, in the order of `images`. The
        caller must release copies in the order of their creation.
        """
        lengths = iter([len(each.embeds) for each in features])
        for image in images:
            image.n_rows = 0 if image.error is not None else next(lengths)
        found = [rows_by_tensor(each) for each in features]
        stored = {
            tensor.name: _joined(tensor, [rows[tensor.name] for rows in found])
            for tensor in self._form.tensors
        }
        embeds = stored[EMBEDS]
        if not features:
            return HostCopy(stored, torch.empty(0, dtype=torch.bool, device="cpu"), None, _nothing)
        # test the extremes, because a test of every value would take more memory
        is_finite = embeds.amin(1).isfinite() & embeds.amax(1).isfinite()
        if self._ring is None:
            return HostCopy(stored, is_finite, None, _nothing)
        sizes = [_aligned(rows.nbytes) for rows in (*stored.values(), is_finite)]
        memory, release = self._ring.allocate(sum(sizes)), self._ring.release
        if memory is None:
            memory, release = _pinned(sum(sizes)), _nothing
        on_host = [
            part[: rows.nbytes].view(rows.dtype).view(rows.shape)
            for part, rows in zip(memory.split(sizes), (*stored.values(), is_finite), strict=True)
        ]
        self._stream.wait_stream(torch.cuda.current_stream(embeds.device))
        with torch.cuda.stream(self._stream):
            for on_device, copied in zip((*stored.values(), is_finite), on_host, strict=True):
                copied.copy_(on_device, non_blocking=True)
                on_device.record_stream(self._stream)
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        *rows_on_host, flags = on_host
        return HostCopy(dict(zip(stored, rows_on_host, strict=True)), flags, event, release)


def _joined(tensor: RowTensor, parts: list[Tensor]) -> Tensor:
    if not parts:
        return torch.empty(0, tensor.width, dtype=tensor.dtype, device="cpu")
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(tensor.dtype)


def _nothing() -> None: ...


def _aligned(n_bytes: int) -> int:
    return n_bytes + -n_bytes % ALIGNED_BYTES


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class PinnedRing:
    """Allocate pinned memory from a ring buffer, and release it in the order of allocation.

    >>> ring = PinnedRing(torch.empty(2**20, dtype=torch.uint8))
    >>> ring.allocate(1_000).shape
    torch.Size([1000])
    >>> ring.release()

    torch's allocator of pinned memory keeps its blocks, so an export of images with many sizes
    would keep blocks of many sizes. One thread allocates, and another thread may release.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._taken: deque[tuple[int, int]] = deque()  # begin and end of each piece, oldest first
        self._lock = Lock()

    def allocate(self, n_bytes: int) -> Tensor | None:
        """Return a piece of `n_bytes`, or None if no free piece is large enough now."""
        size = _aligned(n_bytes)
        with self._lock:
            begin = self._begin_of_room(size)
            if begin is None:
                return None
            self._taken.append((begin, begin + size))
            return self._memory[begin : begin + n_bytes]

    def release(self) -> None:
        with self._lock:
            self._taken.popleft()

    def _begin_of_room(self, size: int) -> int | None:
        if not self._taken:
            return 0 if size <= len(self._memory) else None
        oldest, end = self._taken[0][0], self._taken[-1][1]
        if end <= oldest:  # the pieces wrap around the end
            return end if end + size <= oldest else None
        if end + size <= len(self._memory):
            return end
        return 0 if size <= oldest else None
