"""Detect writes beside a tensor, and values that no kernel wrote."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GUARD_BYTES = 4096  # on each side; a multiple of the alignment of tensor maps
FILL = 0xFF  # a value of these bytes is NaN in every floating type


@dataclass(frozen=True, slots=True)
class _Buffer:
    whole: Tensor  # uint8: guard, the tensor's own bytes, guard
    own: Tensor
    guard: int


class GuardedMemory(TorchFunctionMode):
    """Make `torch.empty` and `torch.empty_like` return NaN, between guards of `guard` bytes.

    >>> with GuardedMemory() as memory:
    ...     out = torch.empty(3)
    >>> out[:2] = 1.0
    >>> memory.unwritten(), memory.overruns()
    (1, 0)

    With `guard=0`, the function only fills the memory, so that a tool can check the allocation's
    exact bounds.
    """

    def __init__(self, guard: int = GUARD_BYTES) -> None:
        super().__init__()
        self.guard = guard
        self.buffers: list[_Buffer] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like) or not plain.is_floating_point():
            return plain
        n_bytes = plain.numel() * plain.element_size()
        size = n_bytes + 2 * self.guard
        whole = torch.full((size,), FILL, dtype=torch.uint8, device=plain.device)
        own = whole[self.guard : self.guard + n_bytes].view(plain.dtype).view(plain.shape)
        self.buffers.append(_Buffer(whole, own, self.guard))
        return own

    def unwritten(self) -> int:
        """Return the number of values that are NaN."""
        return sum(int(buffer.own.float().isnan().sum()) for buffer in self.buffers)

    def overruns(self) -> int:
        """Return the number of changed guard bytes."""
        return sum(
            int((part != FILL).sum())
            for buffer in self.buffers
            if buffer.guard
            for part in (buffer.whole[: buffer.guard], buffer.whole[-buffer.guard :])
        )
