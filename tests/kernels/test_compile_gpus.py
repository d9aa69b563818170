"""Test that the plain kernels compile for GPUs other than Hopper, without such a GPU.

Their speed on these GPUs has not been measured.
"""

from typing import Any

import pytest

from qwen_vit.kernels import attention, linear
from tests.support.compile_cases import USES
from tests.support.compile_kernels import compile_attention, compile_gemm

# A100; RTX 4090 and L40S; B200; RTX 5090
GPUS = (80, 89, 100, 120)
# The bytes that a program may spill. 128 query rows on 4 warps use every register if accumulators
# are in registers. sm_100 has separate memory for accumulators.
WINDOW_SPILLS = 8  # with Triton 3.9 on sm_80; 0 elsewhere
SPILLS = {80: 224, 89: 320, 100: 0, 120: 224}
EPILOGUES = ("plain", "gelu", "normed", "swiglu", "residual")
UNMARKED = {(80, "full"), (80, "residual"), (120, "residual")}


def cases(names: tuple[str, ...]) -> list[Any]:
    """Return each GPU with each name, and mark most cases as slow."""
    pairs = [(gpu, name) for gpu in GPUS for name in names]
    slow = pytest.mark.slow
    return [pytest.param(*pair, marks=() if pair in UNMARKED else slow) for pair in pairs]


@pytest.mark.parametrize(("capability", "use"), cases(("window", "full", "public")))
def test_attention_compiles_within_the_limits(capability: int, use: str) -> None:
    compiled = compile_attention(80, 16, use, capability)
    print(compiled)
    assert compiled.spill_bytes <= (WINDOW_SPILLS if use == "window" else SPILLS[capability])
    warps = attention.TILES[USES[use]["kind"], 16].num_warps
    assert compiled.programs_that_fit(warps) * warps >= 8
    if use != "window":  # the window kind, which has one tile of keys
        assert compiled.has_async_copies


@pytest.mark.parametrize(("capability", "epilogue"), cases(EPILOGUES))
def test_a_gemm_compiles_within_the_limits(capability: int, epilogue: str) -> None:
    """With tensor descriptors, sm_80 once used 255 registers and no asynchronous copies."""
    tile = linear.FALLBACK_TILES[16]
    compiled = compile_gemm(16, epilogue, tile, capability=capability)
    print(compiled)
    assert compiled.spill_bytes == 0
    assert compiled.registers <= 168
    assert compiled.programs_that_fit(tile.num_warps) >= 3
    assert compiled.has_async_copies


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_float32_compiles_within_the_limits(capability: int) -> None:
    tile = linear.FALLBACK_TILES[32]
    for epilogue in ("plain", "residual"):
        product = compile_gemm(32, epilogue, tile, capability=capability)
        print(product)
        assert product.programs_that_fit(tile.num_warps) >= 1
    for use in ("window", "full"):
        compiled = compile_attention(80, 32, use, capability)
        print(compiled)
        assert compiled.programs_that_fit(8) >= 1
