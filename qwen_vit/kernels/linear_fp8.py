"""Compute the MLP's two GEMMs in e4m3, with the epilogues that `linear` fuses.

    stream in e4m3 -> gate and up, SwiGLU -> hidden rows in e4m3 -> down, residual sum -> stream

Each GEMM takes rows with a scale for each row and each 128 columns, and a weight with a scale per
output column. The kernel scales and adds the sums of 128 columns in float32, because the matrix
instruction itself adds e4m3 products with a short mantissa. The epilogue that writes rows also
computes their scales.

All scales are powers of two, so scaling rounds nothing. A row's result depends on that row alone,
and `linear_fp8_hopper` gives the same bits. On a CPU, PyTorch multiplies the same e4m3 values in
float32. Only tests use this path: an encoder rejects e4m3 on a CPU.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vit.kernels import IS_KNOWN_GLUON, uses_hopper_kernels
from qwen_vit.kernels.activations import swiglu
from qwen_vit.kernels.fp8 import QuantizedWeight, empty_results, inverse_scale, scale_for
from qwen_vit.kernels.launch import LAUNCH
from qwen_vit.kernels.linear import (
    GROUPED_ROW_TILES,
    GemmTile,
    ResidualStream,
    first_row_and_column,
    has_tma,
    load_tile,
    matrix,
    row_scale,
    store_squares,
    store_tile,
)
from qwen_vit.weight_format import SCALE_COLUMNS, QuantizedRows, quantize, split_gate_and_up

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_fp8_hopper

__all__ = ["gated_rows", "linear_residual_fp8"]

# A tile's depth is 128, and its columns make whole scales of its result. The first row is for
# swiglu, whose result is half as wide.
TILES = {
    "swiglu": GemmTile(64, 256, SCALE_COLUMNS, 8, 2),
    "residual": GemmTile(128, 128, SCALE_COLUMNS, 8, 2),
}


@triton.jit(do_not_specialize=["M"])
def _fp8_gemm(
    x, x_scales, weight, weight_scale, bias, residual, squares, out, beside, eps, M, N,
    K: tl.constexpr, EPILOGUE: tl.constexpr, SQUARES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr = True,
):  # fmt: skip
    """Compute out (M, N) = epilogue(row scale * x (M, K) @ weight (N, K)^T * column scale + bias).

    `x`, `weight`, `residual` and `out` are tensor descriptors with TMA, otherwise pointers. For
    swiglu, `out` is e4m3, half as wide, and `beside` are its scales. The row scale is 1 / rms, from
    SQUARES chunks of sums of squares, or 1 without them. For a residual, `out` is the sum, and
    `beside` (N / 128, M) are its sums of squares.
    """
    i_m, i_n = first_row_and_column(M, N, BM, BN, GROUP)
    o_m = i_m + tl.arange(0, BM)  # [BM]
    o_n = i_n + tl.arange(0, BN)  # [BN]

    acc = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    for i_k in range(0, K, 128):
        b_x = load_tile(x, i_m, i_k, M, K, BM, 128, True, TMA)  # [BM, 128]
        b_weight = load_tile(weight, i_n, i_k, N, K, BN, 128, True, TMA)  # [BN, 128]
        b_scale = tl.load(x_scales + i_k // 128 * M + o_m, mask=o_m < M, other=0.0)  # [BM]
        acc += tl.dot(b_x, b_weight.T) * b_scale[:, None]

    if SQUARES > 0:
        acc = acc * row_scale(squares, o_m, M, eps, K, SQUARES)[:, None]
    acc = acc * tl.load(weight_scale + o_n, mask=o_n < N, other=0.0)[None, :]
    acc = acc + tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "swiglu":
        b_pairs = tl.reshape(acc, (BM, BN // 128, 8, 2, 4, 2))  # see weight_format.interleave_fp8
        b_gate, b_up = tl.split(tl.permute(b_pairs, (0, 1, 4, 2, 5, 3)))
        b_out = tl.reshape(swiglu(b_gate, b_up), (BM, BN // 2))  # [BM, BN / 2]
        b_largest = tl.max(tl.abs(b_out), 1)  # [BM]
        b_out = b_out * inverse_scale(b_largest)[:, None]
        store_tile(out, b_out, i_m, i_n // 2, M, N // 2, BM, BN // 2, TMA)
        tl.store(beside + i_n // BN * M + o_m, scale_for(b_largest), mask=o_m < M)
    else:
        b_residual = load_tile(residual, i_m, i_n, M, N, BM, BN, False, TMA)  # [BM, BN]
        b_out = store_tile(out, acc + b_residual.to(tl.float32), i_m, i_n, M, N, BM, BN, TMA)
        store_squares(beside, b_out, i_n // BN, o_m, o_n, M, N)


def gated_rows(
    stream: ResidualStream, weight: QuantizedWeight, bias: Tensor, *, eps: float
) -> QuantizedRows:
    """Return silu(gate) * up of the normalised stream in e4m3: (N, C) to (N, I).

    `weight` (2 I, C) includes the norm's weight. Its rows are in the order of
    `weight_format.interleave_fp8`. `stream` must contain its values in e4m3.
    """
    rows = stream.quantized
    if rows is None:
        raise ValueError(
            "the stream has no e4m3 values. Pass a stream from linear_residual(..., quantized=True)"
        )
    if rows.values.device.type == "cpu":
        C = rows.values.shape[1]
        row_scale = torch.rsqrt(stream.squares.sum(0).unsqueeze(1) / C + eps)
        y = F.linear(rows.dequantized(), _dequantized(weight)) * row_scale + bias
        gate, up = split_gate_and_up(y)
        return quantize(F.silu(gate) * up)
    run = _gemm_for(rows)
    return QuantizedRows(
        *run(rows, weight, bias, epilogue="swiglu", squares=stream.squares, eps=eps)
    )


def linear_residual_fp8(
    stream: ResidualStream, rows: QuantizedRows, weight: QuantizedWeight, bias: Tensor
) -> ResidualStream:
    """Return `stream + rows @ weight.T + bias`, rounded once, with the new sums of squares."""
    if rows.values.device.type == "cpu":
        product = F.linear(rows.dequantized(), _dequantized(weight), bias.float())
        return ResidualStream.from_values((stream.values + product).to(stream.values.dtype))
    run = _gemm_for(rows)
    return ResidualStream(*run(rows, weight, bias, epilogue="residual", residual=stream.values))


def _dequantized(weight: QuantizedWeight) -> Tensor:
    values, scale = weight
    return values.float() * scale.unsqueeze(1)


def _gemm_for(rows: QuantizedRows) -> Callable[..., tuple[Tensor, Tensor]]:
    is_for_hopper = uses_hopper_kernels() and linear_fp8_hopper.supports(rows)
    return linear_fp8_hopper.gemm if is_for_hopper else launch_gemm


def launch_gemm(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor,
    *,
    epilogue: str,
    squares: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    tile: GemmTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the GEMM. Return e4m3 values and scales for `swiglu`, else values and sums of squares."""
    M, K = rows.values.shape
    weight_values, weight_scale = weight
    N = len(weight_values)
    tile = tile or TILES[epilogue]
    out, beside = empty_results(rows, weight, epilogue)
    if M == 0:
        return out, beside
    out_block = [tile.rows, tile.columns // 2 if epilogue == "swiglu" else tile.columns]
    with torch.cuda.device(out.device):
        _fp8_gemm[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            matrix(rows.values, [tile.rows, SCALE_COLUMNS]), rows.scales,
            matrix(weight_values, [tile.columns, SCALE_COLUMNS]), weight_scale, bias,
            None if residual is None else matrix(residual, out_block), squares,
            matrix(out, out_block), beside, eps, M, N, K=K, EPILOGUE=epilogue,
            SQUARES=0 if squares is None else len(squares), BM=tile.rows, BN=tile.columns,
            GROUP=GROUPED_ROW_TILES, TMA=has_tma(out.device), num_warps=tile.num_warps,
            num_stages=tile.num_stages, **LAUNCH,
        )  # fmt: skip
    return out, beside
