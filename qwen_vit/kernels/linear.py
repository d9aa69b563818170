"""Compute linear layers with fused norm, bias, SwiGLU, GELU and residual sum.

The residual stream consists of values and, for each row, sums of squares per chunk of columns.
Therefore a block's RMSNorms need no kernels of their own. The loader folds the norm's weight into
the next GEMM's weight, and that GEMM applies the norm's row scale to its result. The GEMM that adds
to the stream writes the new sums.

On a GPU, each output row depends only on its own input row, and every tile sums over K in the same
order. Therefore an image's embedding has the same bits alone and in any batch. On Hopper,
`linear_hopper` computes the tower's large GEMMs. On a CPU, PyTorch computes all GEMMs.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen_vit.kernels import IS_KNOWN_GLUON, uses_hopper_kernels
from qwen_vit.kernels.activations import gelu, swiglu
from qwen_vit.kernels.fp8 import inverse_scale, scale_for
from qwen_vit.kernels.launch import LAUNCH
from qwen_vit.weight_format import QuantizedRows, fp8_column_order, quantize

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_hopper

__all__ = [
    "GROUPED_ROW_TILES",
    "GemmTile",
    "ResidualStream",
    "first_row_and_column",
    "has_tma",
    "linear",
    "linear_residual",
    "load_tile",
    "matrix",
    "normed_linear",
    "rms_norm",
    "row_scale",
    "store_squares",
    "store_tile",
]


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """Hold the rows between two layers: `values` (N, C), and `squares` (chunks, N) float32.

    Summed over its first axis, `squares` gives the sum of each row's squared values. `quantized`
    are the values in e4m3, if the next GEMM needs them.
    """

    values: torch.Tensor
    squares: torch.Tensor
    quantized: QuantizedRows | None = None

    @classmethod
    def from_values(cls, x: torch.Tensor) -> "ResidualStream":
        N, C = x.shape
        if x.device.type == "cpu":
            return cls(x, x.float().square().sum(1).unsqueeze(0))
        squares = torch.empty((1, N), dtype=torch.float32, device=x.device)
        if N:
            with torch.cuda.device(x.device):
                _row_squares[(triton.cdiv(N, SQUARED_ROWS),)](
                    x, squares, N, C=C, C_PADDED=triton.next_power_of_2(C), BM=SQUARED_ROWS,
                    num_warps=4, **LAUNCH,
                )  # fmt: skip
        return cls(x, squares)


@dataclass(frozen=True, slots=True)
class GemmTile:
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


HOPPER = 9
SMALL = GemmTile(64, 128, 64, 4, 3)  # 3 programs fit one multiprocessor
SQUARE = GemmTile(128, 128, 64, 4, 3)  # 2 fit: one stores while the other multiplies
DEEP = GemmTile(128, 128, 64, 4, 4)
WIDE = GemmTile(128, 256, 64, 8, 3)

# Tiles for the GEMMs that `linear_hopper` does not support: the patch embedding (narrow), and with
# an untested Gluon all others (wide: N > 2048). Measured on an H200 with the patch embedding and
# the merger (docs/decisions). An entry gives the minimum number of rows for its tile. The tile may
# depend on the row count, because all tiles agree bit for bit (tested). All narrow tiles sum
# squares per 128 columns, so they work for every GEMM that writes such sums.
HOPPER_TILES: dict[bool, tuple[tuple[int, GemmTile], ...]] = {
    True: ((0, SMALL), (768, DEEP), (1536, WIDE)),
    False: ((0, SQUARE), (1536, SMALL), (6144, SQUARE)),
}
FALLBACK_TILES = {
    16: GemmTile(128, 64, 32, 4, 3),
    32: GemmTile(64, 64, 32, 8, 2),
}
QUANTIZING = GemmTile(128, 128, 64, 8, 3)  # a scale's 128 columns are a tile's
GROUPED_ROW_TILES = 8  # tiles of this many row blocks run together and share weights in L2
SQUARED_ROWS = 4  # rows of one program that sums squares


@triton.jit
def load_tile(
    matrix, i_row, i_column, n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load a tile of a matrix (n_rows, n_columns), with 0 beyond the edges.

    With TMA, `matrix` is a tensor descriptor, otherwise a pointer: GPUs without TMA would load a
    descriptor's tiles without a pipeline. If WHOLE is set, the tiles have no columns beyond the
    edge, so columns need no mask.
    """
    if TMA:
        b_tile = matrix.load([i_row, i_column])  # [ROWS, COLUMNS]
    else:
        o_row = i_row + tl.arange(0, ROWS)  # [ROWS]
        o_column = i_column + tl.arange(0, COLUMNS)  # [COLUMNS]
        m_tile = (o_row < n_rows)[:, None]  # [ROWS, 1]
        if not WHOLE:
            m_tile = m_tile & (o_column < n_columns)[None, :]  # [ROWS, COLUMNS]
        p_row = matrix + o_row[:, None].to(tl.int64) * n_columns  # [ROWS, 1]
        b_tile = tl.load(p_row + o_column[None, :], mask=m_tile, other=0.0)  # [ROWS, COLUMNS]
    return b_tile


@triton.jit
def store_tile(
    matrix, b_tile, i_row, i_column, n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Round a tile to the matrix's type, store the rounded tile and return it."""
    if TMA:
        b_tile = b_tile.to(matrix.dtype)
        matrix.store([i_row, i_column], b_tile)
    else:
        b_tile = b_tile.to(matrix.dtype.element_ty)
        o_row = i_row + tl.arange(0, ROWS)  # [ROWS]
        o_column = i_column + tl.arange(0, COLUMNS)  # [COLUMNS]
        m_tile = (o_row < n_rows)[:, None] & (o_column < n_columns)[None, :]  # [ROWS, COLUMNS]
        p_row = matrix + o_row[:, None].to(tl.int64) * n_columns  # [ROWS, 1]
        tl.store(p_row + o_column[None, :], b_tile, mask=m_tile)
    return b_tile


@triton.jit
def first_row_and_column(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Order the programs so that tiles that run together share weights."""
    i_program = tl.program_id(0)
    n_row_tiles = tl.cdiv(M, BM)
    n_column_tiles = tl.cdiv(N, BN)
    group_size = GROUP * n_column_tiles
    first_row_tile = i_program // group_size * GROUP
    group_rows = min(n_row_tiles - first_row_tile, GROUP)
    i_m = (first_row_tile + i_program % group_size % group_rows) * BM
    i_n = i_program % group_size // group_rows * BN
    return i_m, i_n


@triton.jit
def row_scale(squares, o_m, M, eps, K: tl.constexpr, SQUARES: tl.constexpr):
    """Return each row's 1 / rms, from SQUARES chunks of its sum of squares."""
    total = tl.load(squares + o_m, mask=o_m < M, other=0.0)  # [BM]
    for chunk in range(1, SQUARES):
        total += tl.load(squares + chunk * M + o_m, mask=o_m < M, other=0.0)
    return tl.rsqrt(total / K + eps)


@triton.jit
def store_squares(squares_out, b_out, chunk, o_m, o_n, M, N):
    """Store the sum of squares of each row of a stored tile. Return the tile in float32, with 0
    beyond the last column.
    """
    b_rounded = tl.where((o_n < N)[None, :], b_out.to(tl.float32), 0.0)  # [BM, BN]
    tl.store(squares_out + chunk * M + o_m, tl.sum(b_rounded * b_rounded, 1), mask=o_m < M)
    return b_rounded


# one binary for every number of rows: otherwise Triton would compile during a user's call
@triton.jit(do_not_specialize=["M"])
def _gemm(
    x, weight, bias, residual, squares, out, squares_out, rows_out, scales_out, M, N, out_scale,
    eps, K: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SQUARES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr = True,
):  # fmt: skip
    """Compute out (M, N) = epilogue(x (M, K) @ weight (N, K)^T * scale + bias).

    `x`, `weight`, `residual`, `out` and `rows_out` are tensor descriptors with TMA, otherwise
    pointers. The scale is `out_scale` or, with SQUARES chunks of sums of squares, a row's 1 / rms.
    For SwiGLU, groups of 8 columns alternate between gate and up, and `out` is half as wide. With a
    residual, `out` is the sum, and `squares_out` (N / BN, M) receives its sums of squares.
    `rows_out`, if given, receives `out` in e4m3, and `scales_out` a scale for each 128 columns.
    """
    i_m, i_n = first_row_and_column(M, N, BM, BN, GROUP)
    acc = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    for i_k in range(0, K, BK):
        b_x = load_tile(x, i_m, i_k, M, K, BM, BK, K % BK == 0, TMA)  # [BM, BK]
        b_weight = load_tile(weight, i_n, i_k, N, K, BN, BK, K % BK == 0, TMA)  # [BN, BK]
        acc = tl.dot(b_x, b_weight.T, acc, input_precision=PRECISION)

    o_m = i_m + tl.arange(0, BM)  # [BM]
    o_n = i_n + tl.arange(0, BN)  # [BN]
    if SQUARES > 0:
        acc = acc * row_scale(squares, o_m, M, eps, K, SQUARES)[:, None]
    else:
        acc = acc * out_scale
    if HAS_BIAS:
        b_bias = tl.load(bias + o_n, mask=o_n < N, other=0.0)  # [BN]
        acc += b_bias.to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        acc = gelu(acc)
    if EPILOGUE == "swiglu":
        b_pairs = tl.permute(tl.reshape(acc, (BM, BN // 16, 2, 8)), (0, 1, 3, 2))
        b_gate, b_up = tl.split(b_pairs)  # [BM, BN / 16, 8] each
        b_out = tl.reshape(swiglu(b_gate, b_up), (BM, BN // 2))  # [BM, BN / 2]
        store_tile(out, b_out, i_m, i_n // 2, M, N // 2, BM, BN // 2, TMA)
    else:
        if EPILOGUE == "residual":
            b_residual = load_tile(residual, i_m, i_n, M, N, BM, BN, False, TMA)  # [BM, BN]
            acc += b_residual.to(tl.float32)
        b_out = store_tile(out, acc, i_m, i_n, M, N, BM, BN, TMA)  # [BM, BN]
        if EPILOGUE == "residual":
            b_rounded = store_squares(squares_out, b_out, i_n // BN, o_m, o_n, M, N)  # [BM, BN]
            if rows_out is not None:  # the stream in e4m3 as well, for the next GEMM
                b_largest = tl.max(tl.abs(b_rounded), 1)  # [BM]
                b_values = b_rounded * inverse_scale(b_largest)[:, None]  # [BM, BN]
                # see weight_format.fp8_column_order
                b_values = tl.permute(tl.reshape(b_values, (BM, 16, 4, 2)), (0, 2, 1, 3))
                b_values = tl.reshape(b_values, (BM, BN))  # [BM, BN]
                store_tile(rows_out, b_values, i_m, i_n, M, N, BM, BN, TMA)
                tl.store(scales_out + i_n // BN * M + o_m, scale_for(b_largest), mask=o_m < M)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    epilogue: str = "plain",
    out_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return `epilogue(x @ weight.T * out_scale + bias)`: (M, K) to (M, N). On a GPU, the kernel
    sums in float32 and rounds each result once.

    The epilogue is `plain` or `gelu` (the exact GELU).
    """
    out_dtype = out_dtype or x.dtype
    if x.device.type == "cpu":
        y = F.linear(x, weight) * out_scale if out_scale != 1.0 else F.linear(x, weight, bias)
        if out_scale != 1.0 and bias is not None:
            y = y + bias
        return (F.gelu(y) if epilogue == "gelu" else y).to(out_dtype)
    is_unscaled = out_scale == 1.0 and out_dtype == x.dtype
    if is_unscaled and bias is not None and _is_for_hopper(x, weight):
        return linear_hopper.gemm(x, weight, bias, epilogue=epilogue)[0]
    return _launch_gemm(
        x, weight, bias, epilogue=epilogue, out_scale=out_scale, out_dtype=out_dtype
    )[0]


def normed_linear(
    stream: ResidualStream,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    epilogue: str = "plain",
) -> torch.Tensor:
    """Return `epilogue(rms_norm(stream) @ weight.T + bias)`. `weight` includes the norm's weight.

    For a stream (N, C), the epilogue `plain` gives (N, O), and `swiglu` gives silu(gate) * up,
    (N, I). For `swiglu`, groups of 8 rows of `weight` (2 I, C) alternate between gate and up.
    """
    x = stream.values
    if x.device.type == "cpu":
        C = x.shape[1]
        row_scale = torch.rsqrt(stream.squares.sum(0).unsqueeze(1) / C + eps)
        y = F.linear(x * row_scale, weight, bias)
        if epilogue == "swiglu":
            gate, up = y.unflatten(1, (-1, 2, 8)).unbind(2)
            y = (F.silu(gate.contiguous()) * up).flatten(1)  # strided gates take twice as long
        return y
    run = linear_hopper.gemm if _is_for_hopper(x, weight) else _launch_gemm
    return run(x, weight, bias, epilogue=epilogue, squares=stream.squares, eps=eps)[0]


def linear_residual(
    stream: ResidualStream,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    quantized: bool = False,
) -> ResidualStream:
    """Return `stream + x @ weight.T + bias` with the new sums of squares. On a GPU, the kernel sums
    in float32 and rounds each result once.

    With `quantized`, the new stream also contains its values in e4m3, in the order of
    `weight_format.fp8_column_order`.
    """
    if x.device.type == "cpu":
        summed = ResidualStream.from_values(stream.values + F.linear(x, weight, bias))
        if not quantized:
            return summed
        ordered = summed.values[:, fp8_column_order(summed.values.shape[1])]
        return replace(summed, quantized=quantize(ordered))
    run = linear_hopper.gemm if _is_for_hopper(x, weight) else _launch_gemm
    N, C = stream.values.shape
    rows = QuantizedRows.empty(N, C, x.device) if quantized else None
    values, squares = run(
        x, weight, bias, epilogue="residual", residual=stream.values, quantized=rows
    )
    return ResidualStream(values, squares, rows)


def _is_for_hopper(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return uses_hopper_kernels() and linear_hopper.supports(x, weight)


def _launch_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    epilogue: str,
    squares: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    out_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    tile: GemmTile | None = None,
    quantized: QuantizedRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the GEMM and return the result and, for `residual`, the result's sums of squares.

    For `residual`, `quantized` also receives the result in e4m3, if the caller passes it.
    """
    M, K = x.shape
    N = weight.shape[0]
    tile = tile or (_gemm_tile(x, weight, epilogue) if quantized is None else QUANTIZING)
    n_out = N // 2 if epilogue == "swiglu" else N
    out = torch.empty((M, n_out), dtype=out_dtype or x.dtype, device=x.device)
    squares_out = out
    if epilogue == "residual":
        chunks = triton.cdiv(N, tile.columns)
        squares_out = torch.empty((chunks, M), dtype=torch.float32, device=x.device)
    if M == 0:
        return out, squares_out
    out_block = [tile.rows, tile.columns // 2 if epilogue == "swiglu" else tile.columns]
    out_matrix = matrix(out, out_block)
    rows_out = scales_out = None
    if quantized is not None:
        rows_out, scales_out = matrix(quantized.values, out_block), quantized.scales
    with torch.cuda.device(x.device):
        _gemm[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            matrix(x, [tile.rows, tile.depth]), matrix(weight, [tile.columns, tile.depth]), bias,
            out_matrix if residual is None else matrix(residual, out_block), squares, out_matrix,
            squares_out, rows_out, scales_out, M, N, out_scale, eps, K=K,
            HAS_BIAS=bias is not None, EPILOGUE=epilogue,
            SQUARES=0 if squares is None else len(squares), PRECISION="ieee", BM=tile.rows,
            BN=tile.columns, BK=tile.depth, GROUP=GROUPED_ROW_TILES, TMA=has_tma(x.device),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **LAUNCH,
        )  # fmt: skip
    return out, squares_out


def has_tma(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


def matrix(rows: torch.Tensor, block: list[int]) -> torch.Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(rows, block) if has_tma(rows.device) else rows


def _gemm_tile(x: torch.Tensor, weight: torch.Tensor, epilogue: str) -> GemmTile:
    bits = x.dtype.itemsize * 8
    if _capability(x.device)[0] != HOPPER or bits != 16:
        return FALLBACK_TILES[bits]
    tiles = HOPPER_TILES[weight.shape[0] > 2048 and epilogue != "residual"]
    return next(tile for least_rows, tile in reversed(tiles) if len(x) >= least_rows)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def _rms_norm(x, weight, out, C: tl.constexpr, C_PADDED: tl.constexpr, EPS: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, C_PADDED)  # [C_PADDED]
    m_c = o_c < C
    b_x = tl.load(x + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)  # [C_PADDED]
    scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + EPS)
    b_x = (b_x * scale).to(out.dtype.element_ty)
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0)  # [C_PADDED]
    tl.store(out + i_row * C + o_c, b_x * b_weight, mask=m_c)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return `x / rms(x)` cast to x's dtype, then times `weight`: (N, C) to (N, C).

    The function casts before it multiplies by the weight, as transformers' Qwen2_5_VLRMSNorm does.
    In bf16 this order changes the result.
    """
    if x.device.type == "cpu":
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    N, C = x.shape
    out = torch.empty_like(x)
    if N:
        with torch.cuda.device(x.device):
            _rms_norm[(N,)](
                x, weight, out, C=C, C_PADDED=triton.next_power_of_2(C), EPS=eps, num_warps=4,
                **LAUNCH,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_rows"])
def _row_squares(x, squares, n_rows, C: tl.constexpr, C_PADDED: tl.constexpr, BM: tl.constexpr):
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_c = tl.arange(0, C_PADDED)  # [C_PADDED]
    m_x = (o_row < n_rows)[:, None] & (o_c < C)[None, :]  # [BM, C_PADDED]
    b_x = tl.load(x + o_row[:, None].to(tl.int64) * C + o_c[None, :], mask=m_x, other=0.0)
    b_x = b_x.to(tl.float32)  # [BM, C_PADDED]
    tl.store(squares + o_row, tl.sum(b_x * b_x, 1), mask=o_row < n_rows)
