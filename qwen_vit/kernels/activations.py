"""Activations in the epilogues of GEMMs, in float32: one code for both kernels, so bits agree."""

import triton
import triton.language as tl

__all__ = ["gelu", "swiglu"]

LOG2_E = tl.constexpr(1.4426950408889634)
ROOT_OF_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up by 2^x and 1 / sqrt(x): half the instructions of exp and division.

    2^x and 1 / sqrt(x) are right to 2^-22: one value in about 100,000 rounds to another bfloat16.
    """
    root = tl.rsqrt(1.0 + tl.exp2(gate * -LOG2_E))
    return gate * (root * root) * up


@triton.jit
def gelu(x):
    """The exact GELU, by erf, not the tanh form."""
    return x * 0.5 * (1.0 + tl.erf(x * ROOT_OF_HALF))
