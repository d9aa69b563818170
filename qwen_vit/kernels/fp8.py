"""Compute the scales of e4m3 rows inside kernels, bit for bit as in `weight_format.quantize`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vit.weight_format import SCALE_COLUMNS, QuantizedRows

__all__ = ["QuantizedWeight", "empty_results", "inverse_scale", "scale_for"]

QuantizedWeight = tuple[Tensor, Tensor]  # e4m3 (N, K), and a scale per row of it (N,), float32


def empty_results(
    rows: QuantizedRows, weight: QuantizedWeight, epilogue: str
) -> tuple[Tensor, Tensor]:
    """Return uninitialised results for a GEMM: (M, N / 2) in e4m3 and scales for `swiglu`,
    otherwise (M, N) in bf16 and sums of squares. Scales and sums are (columns / 128, M)."""
    device, M, N = rows.values.device, len(rows.values), len(weight[0])
    if epilogue == "swiglu":
        gated = QuantizedRows.empty(M, N // 2, device)
        return gated.values, gated.scales
    out = torch.empty((M, N), dtype=torch.bfloat16, device=device)
    return out, torch.empty((N // SCALE_COLUMNS, M), dtype=torch.float32, device=device)


@triton.jit
def scale_for(largest):
    """Return the scale for a row whose largest magnitude is `largest`.

    The scale is a power of two, or NaN if `largest` is not finite. The row divided by the scale has
    magnitudes of at most 448.
    """
    scale = ((_exponent(largest) - 8) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def inverse_scale(largest):
    """Return the exact reciprocal of `scale_for(largest)`, if `largest` is finite."""
    return ((262 - _exponent(largest)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(largest):
    bits = largest.to(tl.int32, bitcast=True)
    return tl.maximum((bits + 0x1FFFFF) >> 23, 16)
