"""Compute the MLP's e4m3 GEMMs on Hopper, warp-specialised as in `linear_hopper`.

The matrix instruction sums e4m3 products with a short mantissa. Therefore each step of 128 columns
of K starts from zero. The kernel multiplies the step's sums by the rows' scales for these columns,
and adds them in float32. An MMA partition of 256 columns, for SwiGLU, multiplies the left half and
then the right. The reason is that the registers hold only the float32 accumulators of one tile, and
one step's sums for half a tile.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwen_vit.kernels.activations import swiglu
from qwen_vit.kernels.fp8 import QuantizedWeight, empty_results, inverse_scale, scale_for
from qwen_vit.kernels.hopper import (
    copy_to_global,
    descriptor,
    hold_barriers,
    is_hopper,
    multiprocessors,
)
from qwen_vit.kernels.launch import LAUNCH
from qwen_vit.kernels.linear_hopper import (
    FIRST_STEPS,
    GROUPED_ROW_TILES,
    HopperGemmTile,
    load_partition,
    make_barriers,
    make_buffers,
    row_and_column_tile,
)
from qwen_vit.weight_format import SCALE_COLUMNS, QuantizedRows

__all__ = ["gemm", "supports"]

BK = SCALE_COLUMNS  # of x and the weight in a stage: one swizzled line of 128 bytes
HALF = 128  # columns of one matrix instruction

# Each tile's minimum number of rows, measured on an H200 at 9,216 and 32,768 rows (docs/decisions).
TILES: dict[str, tuple[tuple[int, HopperGemmTile], ...]] = {
    "swiglu": ((0, HopperGemmTile(128, 256, 4, 2)),),  # whole scales: 128 columns of the result
    "residual": ((0, HopperGemmTile(128, 128, 5, 2)), (1536, HopperGemmTile(192, 128, 4, 3))),
}


@gluon.jit
def _promoted(acc, b_x, b_weight, b_scale):
    zeros = gl.zeros_like(acc)
    part = warpgroup_mma(b_x, b_weight.permute((1, 0)), zeros, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
    return acc + part * b_scale[:, None]


@gluon.jit
def _accumulate(
    left, right, step, n_steps, p_scales, m_row, M, buffers, barriers, I_GROUP: gl.constexpr
):  # fmt: skip
    x_ring, weight_ring, _ = buffers  # [STAGES * GROUPS, ROWS, BK], [STAGES * HALVES, HALF, BK]
    empty, ready, _, _ = barriers
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = x_ring.shape[0] // STAGES
    HALVES: gl.constexpr = weight_ring.shape[0] // STAGES
    b_next = gl.load(p_scales, mask=m_row, other=0.0)  # [ROWS]
    for i in range(n_steps):
        stage = step % STAGES
        b_scale = b_next
        p_scales += M
        b_next = gl.load(p_scales, mask=m_row & (i + 1 < n_steps), other=0.0)  # [ROWS]
        # until this stage's x and weight have arrived
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        b_x = x_ring.index(stage * GROUPS + I_GROUP)  # [ROWS, BK]
        left = _promoted(left, b_x, weight_ring.index(stage * HALVES), b_scale)  # [ROWS, HALF]
        if HALVES == 2:
            right = _promoted(right, b_x, weight_ring.index(stage * HALVES + 1), b_scale)
        mbarrier.arrive(empty.index(stage), count=1)  # this partition has read the stage
        step += 1
    return left, right, step, p_scales


@gluon.jit
def _gated(acc):
    """Return silu(gate) * up (ROWS, 64). `weight_format.interleave_fp8` interleaved the 64 gate
    columns and the 64 up columns of `acc`."""
    ROWS: gl.constexpr = acc.shape[0]
    b_pairs = acc.reshape((ROWS, 8, 2, 4, 2)).permute((0, 3, 1, 4, 2))
    b_gate, b_up = b_pairs.split()  # [ROWS, 4, 8, 2]: a thread holds 16 adjacent columns
    return swiglu(b_gate, b_up).reshape((ROWS, 64))


@gluon.jit
def _scaled(acc, b_factor, b_bias, MMA_COLUMNS: gl.constexpr):
    acc = acc * gl.convert_layout(b_factor, MMA_COLUMNS)[None, :]
    return acc + gl.convert_layout(b_bias, MMA_COLUMNS).to(gl.float32)[None, :]


@gluon.jit
def _mma_partition(
    operands, outs, buffers, barriers, sizes, K: gl.constexpr, GROUP: gl.constexpr,
    EPILOGUE: gl.constexpr, SQUARES: gl.constexpr, FIRST: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    x_scales, weight_scale, bias, squares, eps = operands
    out_desc, beside = outs
    x_ring, weight_ring, results = buffers
    _, ready, result_is_free, residual_is_there = barriers
    M, n_row_tiles, n_column_tiles = sizes
    ROWS: gl.constexpr = x_ring.shape[1]
    HALF: gl.constexpr = weight_ring.shape[1]
    STAGES: gl.constexpr = ready.shape[0]
    BM: gl.constexpr = ROWS * (x_ring.shape[0] // STAGES)
    BN: gl.constexpr = HALF * (weight_ring.shape[0] // STAGES)
    STEPS: gl.constexpr = K // x_ring.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 32]
    )
    MMA_ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    MMA_COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    # in this layout each thread loads its own columns; in MMA's it would hold a quarter of them all
    EARLY_ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_row = gl.arange(0, ROWS, layout=EARLY_ROWS)  # [ROWS]
    o_column = gl.arange(0, HALF, layout=EARLY_ROWS)  # [HALF]
    gdc_wait()  # wait for the previous kernel, which writes the scales and the sums of squares
    gdc_launch_dependents()
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), n_row_tiles * n_column_tiles, gl.num_programs(0)):
        i_m, i_n = row_and_column_tile(i_tile, n_row_tiles, n_column_tiles, GROUP)
        i_row = i_m * BM + I_GROUP * ROWS
        i_column = i_n * BN
        # the epilogue's operands arrive while the GEMM runs
        b_bias = gl.load(bias + i_column + o_column)  # [HALF]
        b_factor = gl.load(weight_scale + i_column + o_column)  # [HALF]
        parts = gl.tuple(())
        if EPILOGUE == "swiglu":
            b_right_bias = gl.load(bias + i_column + HALF + o_column)  # [HALF]
            b_right_factor = gl.load(weight_scale + i_column + HALF + o_column)  # [HALF]
            for chunk in gl.static_range(SQUARES):
                p_squares = squares + chunk * M + i_row + o_row
                b_squares = gl.load(p_squares, mask=i_row + o_row < M, other=0.0)  # [ROWS]
                parts = parts + (b_squares,)

        o_m = i_row + gl.arange(0, ROWS, layout=MMA_ROWS)  # [ROWS]
        p_scales = x_scales + o_m
        left = gl.zeros([ROWS, HALF], gl.float32, MMA)  # [ROWS, HALF]
        right = left
        left, right, step, p_scales = _accumulate(
            left, right, step, FIRST, p_scales, o_m < M, M, buffers, barriers, I_GROUP
        )
        if EPILOGUE == "residual":
            tma.store_wait(0)  # until the previous result is stored: the residual takes its space
            mbarrier.arrive(result_is_free.index(0), count=1)
        else:  # every tile adds a row's chunks in the same order
            total = parts[0]
            for chunk in gl.static_range(1, SQUARES):
                total += parts[chunk]
            row_scale = gl.rsqrt(total / K + eps)  # [ROWS], one register instead of SQUARES
        left, right, step, p_scales = _accumulate(
            left, right, step, STEPS - FIRST, p_scales, o_m < M, M, buffers, barriers, I_GROUP
        )
        if EPILOGUE == "swiglu":
            tma.store_wait(0)  # until the previous result is stored: this one takes its space
            b_row_scale = gl.convert_layout(row_scale, MMA_ROWS)[:, None]
            b_left = _gated(_scaled(left * b_row_scale, b_factor, b_bias, MMA_COLUMNS))
            b_right = _gated(
                _scaled(right * b_row_scale, b_right_factor, b_right_bias, MMA_COLUMNS)
            )  # [ROWS, 64] each
            b_largest = gl.maximum(gl.max(gl.abs(b_left), 1), gl.max(gl.abs(b_right), 1))  # [ROWS]
            b_inverse = inverse_scale(b_largest)[:, None]
            results.index(I_GROUP * 2).store((b_left * b_inverse).to(out_desc.dtype))
            results.index(I_GROUP * 2 + 1).store((b_right * b_inverse).to(out_desc.dtype))
            fence_async_shared()
            i_out = i_column // 2
            copy_to_global(out_desc, [i_row, i_out], results.index(I_GROUP * 2))
            copy_to_global(out_desc, [i_row, i_out + 64], results.index(I_GROUP * 2 + 1))
            b_beside = gl.convert_layout(scale_for(b_largest), MMA_ROWS)  # [ROWS]
        else:
            acc = _scaled(left, b_factor, b_bias, MMA_COLUMNS)  # [ROWS, HALF]
            # until this tile's residual has arrived
            mbarrier.wait(residual_is_there.index(0), turn & 1)
            acc = acc + results.index(I_GROUP).load(MMA).to(gl.float32)
            b_out = acc.to(out_desc.dtype)
            results.index(I_GROUP).store(b_out)
            fence_async_shared()
            copy_to_global(out_desc, [i_row, i_column], results.index(I_GROUP))
            b_squared = b_out.to(gl.float32)  # [ROWS, HALF], of what was stored: rounded
            b_beside = gl.sum(b_squared * b_squared, 1)  # [ROWS]
        gl.store(beside + i_n * M + o_m, b_beside, mask=o_m < M)
        turn += 1
    tma.store_wait(0)  # until the last result is stored


@gluon.jit(do_not_specialize=["M", "n_row_tiles"])
def _fp8_hopper_gemm(
    x, x_scales, weight, weight_scale, bias, residual, squares, out, beside, eps, M, n_row_tiles,
    n_column_tiles, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, EPILOGUE: gl.constexpr, SQUARES: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = epilogue(row scale * x (M, K) @ weight (N, K)^T * column scale + bias).

    `out` and `beside` are e4m3 values and scales for swiglu, and bf16 values and sums of squares
    for a residual.
    """
    descs = (x, weight, residual)
    operands = (x_scales, weight_scale, bias, squares, eps)
    outs = (out, beside)
    buffers = make_buffers(x, weight, out, BN, STAGES, GROUPS)
    barriers = make_barriers(STAGES, GROUPS)
    sizes = (M, n_row_tiles, n_column_tiles)
    if GROUPS == 2:
        gl.warp_specialize([
            (_mma_partition, (operands, outs, buffers, barriers, sizes, K, GROUP, EPILOGUE,
                              SQUARES, FIRST, 0)),
            (_mma_partition, (operands, outs, buffers, barriers, sizes, K, GROUP, EPILOGUE,
                              SQUARES, FIRST, 1)),
            (load_partition, (descs, buffers, barriers, sizes, K, GROUP, EPILOGUE)),
        ], [4, 1], [232, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_mma_partition, (operands, outs, buffers, barriers, sizes, K, GROUP, EPILOGUE,
                              SQUARES, FIRST, 0)),
            (_mma_partition, (operands, outs, buffers, barriers, sizes, K, GROUP, EPILOGUE,
                              SQUARES, FIRST, 1)),
            (_mma_partition, (operands, outs, buffers, barriers, sizes, K, GROUP, EPILOGUE,
                              SQUARES, FIRST, 2)),
            (load_partition, (descs, buffers, barriers, sizes, K, GROUP, EPILOGUE)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
    hold_barriers(barriers)


def supports(rows: QuantizedRows) -> bool:
    least_steps = FIRST_STEPS + TILES["residual"][0][1].num_stages
    return rows.values.shape[1] >= least_steps * BK and is_hopper(rows.values.device)


def gemm(
    rows: QuantizedRows,
    weight: QuantizedWeight,
    bias: Tensor,
    *,
    epilogue: str,
    squares: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    tile: HopperGemmTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the GEMM on Hopper, with the same results as `linear_fp8.launch_gemm`, bit for bit.

    The previous kernel must not write `weight`, because this kernel reads it before the previous
    kernel has ended.
    """
    M, K = rows.values.shape
    weight_values, weight_scale = weight
    N = len(weight_values)
    tile = tile or next(each for least_rows, each in reversed(TILES[epilogue]) if least_rows <= M)
    out, beside = empty_results(rows, weight, epilogue)
    if M == 0:
        return out, beside
    n_row_tiles, n_column_tiles = -(-M // tile.rows), N // tile.columns
    group_rows = tile.rows // tile.num_groups
    out_descriptor = descriptor(out, [group_rows, HALF // 2 if epilogue == "swiglu" else HALF])
    with torch.cuda.device(out.device):
        _fp8_hopper_gemm[(min(n_row_tiles * n_column_tiles, multiprocessors(out.device)),)](
            descriptor(rows.values, [group_rows, BK]), rows.scales,
            descriptor(weight_values, [HALF, BK]), weight_scale, bias,
            out_descriptor if residual is None else descriptor(residual, [group_rows, HALF]),
            rows.scales if squares is None else squares, out_descriptor, beside, eps, M,
            n_row_tiles, n_column_tiles, K=K, BM=tile.rows, BN=tile.columns,
            STAGES=tile.num_stages, GROUPS=tile.num_groups, GROUP=GROUPED_ROW_TILES,
            EPILOGUE=epilogue, SQUARES=0 if squares is None else len(squares),
            FIRST=FIRST_STEPS, num_warps=4, launch_pdl=True, **LAUNCH,
        )  # fmt: skip
    return out, beside
