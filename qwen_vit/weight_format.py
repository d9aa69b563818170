"""Define the padding, order, scales and 8-bit floats of stored weights, for the loader and the
model."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from qwen_vit.config import VisionConfig
from qwen_vit.errors import FLOAT16_OVERFLOWS, ArgumentError

__all__ = [
    "FP8", "PIXEL_ZERO", "SCALE_COLUMNS", "Quantization", "QuantizedRows", "fp8_column_order",
    "interleave_fp8", "padded_mlp_size", "padded_pixel_size", "pixel_weight_exponent", "quantize",
    "split_gate_and_up",
]  # fmt: skip

Quantization = Literal["fp8"]

MLP_MULTIPLE = 128  # one GEMM tile; 3420 alone is not aligned to 16 bytes and costs 3.5x
PIXEL_MULTIPLE = 64
PIXEL_ZERO = 128  # uint8 pixels enter as pixel - 128, which reduces the GEMM's rounding errors

FP8 = torch.float8_e4m3fn
SCALE_COLUMNS = 128  # of a row that share a scale, and of one step of a GEMM over K
# The largest e4m3 is 448 = 1.75 * 2^8. The largest value that shares a scale becomes 224 to 448.
MAX_EXPONENT = 8
MIN_EXPONENT = 16  # biased: the smallest scale is 2^-119, and values up to 2^-129 become 0
UP_TO_448 = 0x1FFFFF  # carries into the exponent for a mantissa above 1.75


def pixel_weight_exponent(dtype: torch.dtype) -> int:
    """Return the exponent e of pixel_weight's scale 2**e: 10 for bfloat16, 0 for float32.

    With bfloat16, the folded weights are float16, which has 3 more mantissa bits but a smaller
    range. The scale keeps small weights out of float16's subnormal range.

    >>> pixel_weight_exponent(torch.bfloat16)
    10
    """
    exponents = {torch.bfloat16: 10, torch.float32: 0}
    if dtype == torch.float16:
        raise ArgumentError(
            f"dtype is float16, and {FLOAT16_OVERFLOWS}", remedy="use bfloat16 or float32"
        )
    if dtype not in exponents:
        raise ArgumentError(f"dtype is {dtype}", expected="torch.bfloat16 or torch.float32")
    return exponents[dtype]


def padded_mlp_size(config: VisionConfig) -> int:
    """Return I', the MLP size with zero padding: a multiple of 128."""
    return _round_up(config.intermediate_size, MLP_MULTIPLE)


def padded_pixel_size(config: VisionConfig) -> int:
    """Return the number of values of one patch in one frame, with zero padding: a multiple of
    64."""
    return _round_up(config.in_channels * config.patch_px**2, PIXEL_MULTIPLE)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Hold rows of e4m3 `values` (N, C), and `scales` (groups of columns, N) float32.

    A group has 128 columns in a GEMM's input, and all columns in a weight.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, n_rows: int, n_columns: int, device: torch.device) -> Self:
        scales = torch.empty(n_columns // SCALE_COLUMNS, n_rows, dtype=torch.float32, device=device)
        return cls(torch.empty(n_rows, n_columns, dtype=FP8, device=device), scales)

    def dequantized(self) -> Tensor:
        blocks: Tensor = self.values.float().unflatten(1, (len(self.scales), -1))
        return (blocks * self.scales.T.unsqueeze(2)).flatten(1)


def quantize(rows: Tensor, columns: int = SCALE_COLUMNS) -> QuantizedRows:
    """Quantise rows to e4m3, with a scale for each row and each `columns` columns.

    >>> quantized = quantize(torch.tensor([[448.0, 3.0] + [0.0] * 126]))
    >>> quantized.scales, quantized.values[0, :2].float()
    (tensor([[1.]]), tensor([448.,   3.]))

    The kernels give the same bits. A scale is a power of two, so multiplying by it is exact, and
    only the conversion to e4m3 rounds. An infinite value makes its scale NaN, and NaN stays NaN, so
    neither becomes a finite value.

    Source: "FP8 Formats for Deep Learning" (arXiv:2209.05433).
    """
    blocks = rows.float().unflatten(1, (-1, columns))
    largest = blocks.abs().nan_to_num(0.0, float("inf")).amax(2)  # NaN stays in its own place
    exponent = ((largest.view(torch.int32) + UP_TO_448) >> 23).clamp(min=MIN_EXPONENT)
    inverse = ((254 + MAX_EXPONENT - exponent) << 23).view(torch.float32)
    scales = ((exponent - MAX_EXPONENT) << 23).view(torch.float32)
    scales = scales.masked_fill(largest.isinf(), float("nan"))
    values = (blocks * inverse.unsqueeze(2)).flatten(1)
    return QuantizedRows(values.to(FP8), scales.T.contiguous())


# A matrix instruction gives a thread 2 adjacent columns of each 8, and 4 threads share a row. These
# two orders let a thread store whole 16 bytes of e4m3. Columns of K may have any order, if x and
# the weight have the same.


def fp8_column_order(n_columns: int) -> Tensor:
    """Return the order of the e4m3 stream's columns.

    In each 128 columns, a thread's 32 columns are adjacent.

    >>> fp8_column_order(128)[:6].tolist()
    [0, 1, 8, 9, 16, 17]
    """
    return torch.arange(n_columns).view(-1, 16, 4, 2).transpose(1, 2).flatten()


def interleave_fp8(gate: Tensor, up: Tensor) -> Tensor:
    """Interleave the rows of gate and up, 64 of each, for the e4m3 GEMM with SwiGLU.

    Each 128 columns of the GEMM are 8 groups of 8 gate columns and 8 up columns. In each row, each
    of 4 threads computes 2 of every 8 columns. A thread's 16 results are adjacent among the 64.
    """
    halves = [half.unflatten(0, (-1, 4, 8, 2)) for half in (gate, up)]  # (64s, thread, group, 2)
    return torch.stack(halves, 1).movedim(3, 1).flatten(0, 4)  # (64s, group, half, thread, 2)


def split_gate_and_up(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Split the columns (N, 2 I) of a GEMM with the weight of `interleave_fp8` into gate and up (N,
    I)."""
    parts = columns.unflatten(1, (-1, 8, 2, 4, 2)).permute(3, 0, 1, 4, 2, 5).flatten(2)
    return parts[0], parts[1]
