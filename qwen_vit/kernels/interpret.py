"""Run a Triton kernel's own source on a CPU with PyTorch operations.

A group of a launch's programs runs at once, as lanes. A block is a tensor whose first axis is the
lane. This module calls the kernel's function with its own `tl`. Each operation on a block becomes
one PyTorch operation for all lanes, which uses PyTorch's threads and vector instructions.

Triton's own interpreter runs one program at a time with NumPy, and spends 35 us in Python on each
operation. Tests compare the two interpreters. This module implements only the names of
triton.language that the attention kernels need. Any other name raises AttributeError.
"""

import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

__all__ = ["interpreted"]


def interpreted(kernel: JITFunction) -> Callable[..., None]:
    """Return a function `run(grid, *args, lanes, **constants)` that interprets the kernel's source.

    The grid has one axis. `lanes` programs run at once, and must take the same branches. The
    function also interprets the helpers that the kernel calls by a global name.
    """

    @torch.no_grad()
    def run(grid: tuple[int], *args: Any, lanes: int, **constants: Any) -> None:
        args = tuple(_to_memory(x) if isinstance(x, Tensor) else x for x in args)
        for first in range(0, grid[0], lanes):
            language = _Language(torch.arange(first, min(first + lanes, grid[0]), device="cpu"))
            _function(kernel, language)(*args, **constants)

    return run


def _function(kernel: JITFunction, language: "_Language") -> types.FunctionType:
    """Return the kernel's function. This function and its helpers use `language` as `tl`, and this
    module's `range`."""
    source = kernel.fn
    names = {
        name: _function(value, language) if isinstance(value, JITFunction) else value
        for name, value in source.__globals__.items()
        if name in source.__code__.co_names
    }
    names |= {"tl": language, "range": _range}
    return types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)


class _Integers:
    """Represent integers `start + steps[0] * i + steps[1] * j` at (i, j), with a start per lane.

    Program ids, ranges and offsets have this form, and a load at such offsets can be a strided
    view instead of a gather. Operations whose result does not have this form return a block.
    """

    def __init__(
        self, start: Tensor, shape: tuple[int, ...] = (), steps: tuple[int, ...] = ()
    ) -> None:
        self.start = start  # (lanes,) int64, or (1,) if all lanes have the same
        self.shape = shape
        self.steps = steps

    def block(self) -> "_Block":
        total = self.start.view(-1, *[1] * len(self.shape))
        for axis, (length, step) in enumerate(zip(self.shape, self.steps, strict=True)):
            values = torch.arange(length, device="cpu") * step
            total = total + values.view(-1, *[1] * (len(self.shape) - axis - 1))
        return _Block(total)

    def reach(self) -> int:
        lengths = zip(self.shape, self.steps, strict=True)
        return sum((length - 1) * step for length, step in lengths)

    def to(self, dtype: torch.dtype) -> "_Integers":
        """Return the integers unchanged, because every integer in this interpreter has 64 bits."""
        return self

    def __getitem__(self, key: Any) -> "_Integers":
        shape, steps = iter(self.shape), iter(self.steps)
        return _Integers(
            self.start,
            tuple(1 if axis is None else next(shape) for axis in key),
            tuple(0 if axis is None else next(steps) for axis in key),
        )

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int):
            return _Integers(self.start + other, self.shape, self.steps)
        if isinstance(other, _Block):
            return self.block() + other
        n = max(len(self.shape), len(other.shape))
        pad, other_pad = n - len(self.shape), n - len(other.shape)
        shapes = zip((1,) * pad + self.shape, (1,) * other_pad + other.shape, strict=True)
        steps = zip((0,) * pad + self.steps, (0,) * other_pad + other.steps, strict=True)
        return _Integers(self.start + other.start, tuple(map(max, shapes)), tuple(map(sum, steps)))

    __radd__ = __add__

    def __mul__(self, factor: int) -> "_Integers":
        return _Integers(
            self.start * factor, self.shape, tuple(step * factor for step in self.steps)
        )

    def __sub__(self, other: Any) -> Any:
        return self + other * -1

    def __rsub__(self, other: int) -> Any:
        return self * -1 + other

    def __floordiv__(self, divisor: int) -> Any:
        return self.block() // divisor if self.shape else _Integers(self.start // divisor)

    def __mod__(self, divisor: int) -> Any:
        return self.block() % divisor if self.shape else _Integers(self.start % divisor)

    def __lt__(self, other: Any) -> Any:
        return self.block() < other

    def __ge__(self, other: Any) -> Any:
        return self.block() >= other


def _range(start: Any, stop: Any, step: int) -> Iterator[_Integers]:
    """All lanes must take the same number of steps."""
    steps = (stop - start + step - 1) // step
    for index in range(_same_in_all_lanes(steps.start)):
        yield start + index * step


def _same_in_all_lanes(values: Tensor) -> int:
    first = values[0]
    if not bool((values == first).all()):
        raise NotImplementedError("programs take different branches: run them separately")
    return int(first)


class _Block:
    """Hold one block per lane: (lanes, ...), or (1, ...) if all lanes have the same block."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def to(self, dtype: torch.dtype) -> "_Block":
        return _Block(self.values.to(dtype))

    def __bool__(self) -> bool:
        return bool(_same_in_all_lanes(self.values))

    def __getitem__(self, key: Any) -> "_Block":
        return _Block(self.values[(slice(None), *key)])

    def _with(self, other: Any, apply: Callable[[Any, Any], Any]) -> "_Block":
        if isinstance(other, _Integers):
            other = other.block()
        if not isinstance(other, _Block):
            return _Block(apply(self.values, other))
        ndim = max(self.values.ndim, other.values.ndim)
        return _Block(apply(self._padded(ndim), other._padded(ndim)))

    def _padded(self, ndim: int) -> Tensor:
        """Insert axes of length 1 after the lane axis, so that a scalar broadcasts over a block."""
        return self.values[(slice(None), *[None] * (ndim - self.values.ndim))]

    def __neg__(self) -> "_Block":
        return _Block(-self.values)

    def __add__(self, other: Any) -> "_Block":
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> "_Block":
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> "_Block":
        return self._with(other, operator.mul)

    def __rtruediv__(self, other: float) -> "_Block":
        return _Block(other / self.values)

    def __floordiv__(self, other: int) -> "_Block":
        return self._with(other, operator.floordiv)

    def __mod__(self, other: int) -> "_Block":
        return self._with(other, operator.mod)

    def __and__(self, other: "_Block") -> "_Block":
        return self._with(other, operator.and_)

    def __lt__(self, other: Any) -> "_Block":
        return self._with(other, operator.lt)

    def __ge__(self, other: Any) -> "_Block":
        return self._with(other, operator.ge)


class _ElementType:
    def __init__(self, element_ty: torch.dtype) -> None:
        self.element_ty = element_ty


class _Pointers:
    def __init__(self, memory: Tensor, offsets: Any) -> None:
        self.memory = memory
        self.offsets = offsets

    @property
    def dtype(self) -> _ElementType:
        return _ElementType(self.memory.dtype)

    def __add__(self, offsets: Any) -> "_Pointers":
        return _Pointers(self.memory, self.offsets + offsets)

    def view(self) -> Tensor | None:
        """Return a strided view that a lane indexes with its start, or None if it must gather."""
        at = self.offsets
        if not isinstance(at, _Integers):
            return None
        places = len(self.memory) - at.reach()
        if places <= int(at.start.max()):  # masked elements beyond the end
            return None
        return self.memory.as_strided((places, *at.shape), (1, *at.steps))

    def written_out(self) -> Tensor:
        at = self.offsets
        return at.block().values if isinstance(at, _Integers) else at.values


def _to_memory(tensor: Tensor) -> _Pointers:
    length = tensor.untyped_storage().nbytes() // tensor.itemsize
    start = torch.tensor([tensor.storage_offset()], device="cpu")
    return _Pointers(tensor.detach().as_strided((length,), (1,), 0), _Integers(start))


class _Language:
    """Replace `triton.language` for a group of a launch's programs."""

    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    standard = tl.standard

    def __init__(self, programs: Tensor) -> None:
        self.programs = programs

    def program_id(self, axis: int) -> _Integers:
        return _Integers(self.programs)

    def arange(self, start: int, end: int) -> _Integers:
        return _Integers(torch.tensor([start], device="cpu"), (end - start,), (1,))

    def full(self, shape: list[int], value: float, dtype: torch.dtype) -> _Block:
        return _Block(torch.full((1, *shape), value, dtype=dtype, device="cpu"))

    def load(self, pointers: _Pointers, mask: _Block | None = None, other: float = 0) -> Any:
        view = pointers.view()
        if view is not None:
            values = view[pointers.offsets.start]
            if values.ndim == 1 and not values.is_floating_point():
                return _Integers(values.long())
            return _Block(values) if mask is None else self.where(mask, _Block(values), other)
        offsets = pointers.written_out()
        if mask is None:
            return _Block(pointers.memory.take(offsets))
        inside = torch.where(mask.values, offsets, 0)
        return self.where(mask, _Block(pointers.memory.take(inside)), other)

    def store(self, pointers: _Pointers, value: _Block, mask: _Block | None = None) -> None:
        view = pointers.view()
        is_whole = mask is None or bool(mask.values.all())
        if is_whole and view is not None:
            view[pointers.offsets.start] = value.values
            return
        offsets, values = torch.broadcast_tensors(pointers.written_out(), value.values)
        if mask is not None:
            chosen = mask.values.expand_as(values)
            offsets, values = offsets[chosen], values[chosen]
        pointers.memory.put_(offsets, values)

    def where(self, condition: _Block, x: Any, y: Any) -> _Block:
        c = condition.values
        if isinstance(x, _Block) and c.numel() < x.values.numel() and bool(c.all()):
            return x
        a, b = (v.values if isinstance(v, _Block) else v for v in (x, y))
        return _Block(torch.where(c, a, b))

    def dot(
        self, a: _Block, b: _Block, acc: _Block | None = None, input_precision: str = "ieee"
    ) -> _Block:
        if acc is None:
            return _Block(torch.bmm(a.values, b.values))
        return _Block(torch.baddbmm(acc.values, a.values, b.values))

    def reduce(self, x: _Block, axis: int, combine: JITFunction) -> _Block:
        if combine is tl.standard._sum_combine:
            return _Block(x.values.sum(axis + 1))
        if combine is tl.standard._elementwise_max:
            return _Block(x.values.amax(axis + 1))
        raise NotImplementedError(f"the interpreter has no reduction by {combine}")

    def exp2(self, x: _Block) -> _Block:
        return _Block(torch.exp2(x.values))

    def maximum(self, x: _Block, y: _Block) -> _Block:
        return _Block(torch.maximum(x.values, y.values))

    def trans(self, x: _Block) -> _Block:
        return _Block(x.values.mT)

    def reshape(self, x: _Block, shape: tuple[int, ...]) -> _Block:
        return _Block(x.values.reshape(-1, *shape))

    def split(self, x: _Block) -> tuple[_Block, _Block]:
        first, second = x.values.unbind(-1)
        return _Block(first), _Block(second)

    def join(self, x: _Block, y: _Block) -> _Block:
        return _Block(torch.stack((x.values, y.values), dim=-1))
