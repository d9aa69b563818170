"""Replace SGLang's compiled kernels, which have no CPU build on the package index.

On a CPU, SGLang imports many names of this package. With the settings of `sglang_child`, it calls
no function of the package for this model. This module defines a name for every import, and each
call fails. Without the operator `convert_weight_packed`, SGLang treats every CPU as a CPU without
AMX, and runs its plain PyTorch path.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

# Modules that SGLang imports for this model look up these operators.
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
