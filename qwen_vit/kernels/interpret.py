"""Run a Triton kernel on a CPU, together with compiled kernels in one process.

`TRITON_INTERPRET=1` would turn the interpreter on for the whole process, and only if it is set
before anything imports triton. Wrapping single functions needs no environment variable.
"""

import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import triton
from packaging.version import Version
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction

from qwen_vit.errors import ArgumentError

__all__ = ["interpreted"]

# The interpreter swaps functions of triton.language while it runs: one launch at a time, and no
# fork in the middle of one, which would leave the child with swapped functions and a held lock.
_interpreter_lock = threading.RLock()
os.register_at_fork(
    before=_interpreter_lock.acquire,
    after_in_parent=_interpreter_lock.release,
    after_in_child=_interpreter_lock.release,
)


def interpreted(kernel: JITFunction) -> Callable[..., None]:
    """A launcher `run(grid, *args, **kwargs)` of the kernel's own source in the interpreter.

    The helpers that the kernel calls by a global name are interpreted as well. `tl.sum` and other
    functions that triton.language itself compiles are not: a kernel that runs both ways uses
    language builtins only.
    """
    if Version(triton.__version__) < Version("3.7.1") and np.lib.NumpyVersion(np.__version__) >= (
        "2.4.0"
    ):
        raise ArgumentError(
            f"triton {triton.__version__} cannot run on a CPU with numpy {np.__version__}",
            remedy="install triton>=3.7.1, or numpy<2.4, or use an NVIDIA GPU",
        )
    function = _interpreted_function(kernel)

    def run(grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        with (
            _interpreter_lock, _without_overflow_checks(),
            # NaN and infinity in are NaN out, as on a GPU, which does not warn of them
            np.errstate(all="ignore"), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            function[grid](*args, **kwargs)

    return run


@contextmanager
def _without_overflow_checks() -> Iterator[None]:
    """Switch off the interpreter's overflow checks, which compute every int32 operation twice.

    The checks take a fifth of the time. Compiled kernels do not check either. Ours count in int64
    before they could overflow.
    """
    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter_builder.options = options


def _interpreted_function(kernel: JITFunction) -> Any:
    source = kernel.fn
    names = {
        name: _interpreted_function(value) if isinstance(value, JITFunction) else value
        for name, value in source.__globals__.items()
        if name in source.__code__.co_names or name == "tl"
    }
    twin = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    twin.__annotations__ = source.__annotations__
    twin.__module__ = source.__module__
    twin.__kwdefaults__ = source.__kwdefaults__
    return InterpretedFunction(twin)
