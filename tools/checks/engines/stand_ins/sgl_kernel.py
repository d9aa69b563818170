"""Stands for SGLang's compiled kernels, which have no build for CPUs on the package index.

SGLang imports many of their names on a CPU and calls none of them for this model with the settings
of `sglang_child`. A name is there for every import, and fails where it is called. Without the
operator `convert_weight_packed` SGLang takes every CPU for one without AMX, whose plain PyTorch
path it runs.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

# looked up by modules that SGLang imports for this model
OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)

library = torch.library.Library("sgl_kernel", "DEF")
for name in OPERATORS:
    library.define(f"{name}(Tensor x) -> Tensor")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no build for this CPU")

    return missing
