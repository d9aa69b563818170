"""Run Triton's own interpreter, which is the reference for `qwen_vit.kernels.interpret`.

`TRITON_INTERPRET=1` works only if it is set before the import of triton, and then interprets every
kernel of the process. This module wraps single functions, and needs no environment variable.
"""

import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
from packaging.version import Version
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction

__all__ = ["RUNS_HERE", "interpreted_by_triton"]

# Older versions of Triton need an older NumPy for `range()` over a loaded bound.
RUNS_HERE = Version(triton.__version__) >= Version("3.7.1") or np.__version__ < "2.4"


def interpreted_by_triton(kernel: JITFunction) -> Callable[..., None]:
    """Return a launcher `run(grid, *args, **kwargs)` of the kernel's source in Triton's
    interpreter. It also interprets helpers that the kernel calls by a global name, but not
    `tl.sum` and other functions that triton.language itself compiles.
    """
    function = InterpretedFunction(_plain_twin(kernel))

    def run(grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        # the overflow checks would compute every int32 operation twice
        options = replace(interpreter_builder.options, sanitize_overflow=False)
        with (
            patch.object(interpreter_builder, "options", options),
            np.errstate(all="ignore"), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            function[grid](*args, **kwargs)

    return run


def _plain_twin(kernel: JITFunction) -> types.FunctionType:
    """Return the kernel's function in a separate namespace, in which its helpers are plain
    functions.

    As an `InterpretedFunction`, a helper would replace the functions of triton.language at each
    call.
    """
    source = kernel.fn
    names = {
        name: InterpretedFunction(_plain_twin(value)).rewrite()
        if isinstance(value, JITFunction)
        else value
        for name, value in source.__globals__.items()
        if name in source.__code__.co_names or name == "tl"
    }
    twin = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    twin.__annotations__ = source.__annotations__
    twin.__module__ = source.__module__
    twin.__kwdefaults__ = source.__kwdefaults__
    return twin
