"""Compute the tower's large GEMMs on Hopper, warp-specialised and with fused epilogues.

The load partition, one warp, fetches tiles of x and the weight into a ring of shared memory. Two or
three MMA partitions, a warpgroup each, multiply the tiles, each for its own rows. Each
multiprocessor runs one program, which loops over its tiles. The load partition fetches its first
weights before the previous kernel has ended (programmatic dependent launch).

Names follow Gluon's tutorials. `descs` are TMA descriptors. `buffers` are shared memory. `barriers`
are mbarriers. Each stage of the ring has two barriers. The MMA partitions wait for the stage's data
on `ready`. The load partition waits on `empty` until all MMA partitions have read the stage. Each
pass over the ring flips a barrier's phase.

The kernel is written in Gluon, Triton's lower level, because Triton cannot express this overlap. It
sums over K in the same order as `linear._gemm`, so both kernels give the same bits. `linear` uses
this kernel for every GEMM that `supports` accepts, if it has a bias, no `out_scale` and bf16
results.
"""

from dataclasses import dataclass

import torch
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

from qwen_vit.kernels.activations import gelu, swiglu
from qwen_vit.kernels.fp8 import inverse_scale, scale_for
from qwen_vit.kernels.hopper import (
    copy_to_global,
    copy_to_shared,
    descriptor,
    hold_barriers,
    is_hopper,
    multiprocessors,
)
from qwen_vit.kernels.launch import LAUNCH
from qwen_vit.weight_format import QuantizedRows

__all__ = [
    "FIRST_STEPS",
    "GROUPED_ROW_TILES",
    "SQUARES_COLUMNS",
    "HopperGemmTile",
    "gemm",
    "load_partition",
    "make_barriers",
    "make_buffers",
    "row_and_column_tile",
    "supports",
]

SQUARES_COLUMNS = 128  # every tile writes sums of squares per chunk of this number of columns
BK = 64  # columns of x and the weight in a stage: one swizzled line of 128 bytes
FIRST_STEPS = 4  # of a tile with a residual, while the previous result is still being stored
GROUPED_ROW_TILES = 8  # tiles of this many row blocks run together and share weights in L2


@dataclass(frozen=True, slots=True)
class HopperGemmTile:
    rows: int
    columns: int
    num_stages: int
    num_groups: int


WIDE = HopperGemmTile(128, 256, 3, 2)
WIDE_SWIGLU = HopperGemmTile(
    128, 256, 4, 2
)  # results are half as wide, which leaves space for a stage
TALL = HopperGemmTile(192, 128, 4, 3)
TALL_SWIGLU = HopperGemmTile(192, 128, 5, 3)
SQUARE = HopperGemmTile(128, 128, 6, 2)
NARROW = HopperGemmTile(128, 64, 7, 2)

# (epilogue, K > 2048): each tile's minimum number of rows, measured on an H200 at 1,024 to 32,768
# patches (docs/decisions). The tile may depend on the rows, because all tiles agree bit for bit
# (tested).
TILES: dict[tuple[str, bool], tuple[tuple[int, HopperGemmTile], ...]] = {
    ("plain", False): ((0, WIDE), (1536, TALL), (16384, WIDE)),  # qkv
    # the merger's, with a row per 4 patches
    ("gelu", True): ((0, SQUARE), (512, TALL), (768, SQUARE)),
    ("plain", True): ((0, NARROW), (512, TALL), (768, WIDE)),
    ("swiglu", False): ((0, WIDE_SWIGLU), (1536, TALL_SWIGLU), (12288, WIDE_SWIGLU)),
    ("residual", False): ((0, SQUARE), (1536, TALL), (3072, SQUARE)),  # proj
    ("residual", True): ((0, SQUARE), (1536, TALL), (3072, SQUARE), (6144, WIDE)),  # down
}


@gluon.jit
def row_and_column_tile(i_tile, n_row_tiles, n_column_tiles, GROUP: gl.constexpr):
    """Return a tile's row and column, ordered so that tiles that run together share weights."""
    group_size = GROUP * n_column_tiles
    first_row_tile = i_tile // group_size * GROUP
    group_rows = min(n_row_tiles - first_row_tile, GROUP)
    return first_row_tile + i_tile % group_size % group_rows, i_tile % group_size // group_rows


@gluon.jit
def load_partition(
    descs, buffers, barriers, sizes, K: gl.constexpr, GROUP: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Load the stages of x and the weight, and each tile's residual rows, with one warp.

    A stage's weight may consist of parts with the same number of columns.
    """
    x_desc, weight_desc, residual_desc = descs
    # [STAGES * GROUPS, ROWS, BK], [STAGES * PARTS, COLUMNS, BK]
    x_ring, weight_ring, results = buffers
    empty, ready, result_is_free, residual_is_there = barriers
    _, n_row_tiles, n_column_tiles = sizes
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = x_ring.shape[0] // STAGES
    ROWS: gl.constexpr = x_ring.shape[1]
    BK: gl.constexpr = x_ring.shape[2]
    PARTS: gl.constexpr = weight_ring.shape[0] // STAGES
    COLUMNS: gl.constexpr = weight_ring.shape[1]
    BM: gl.constexpr = ROWS * GROUPS
    BN: gl.constexpr = COLUMNS * PARTS
    STAGE_BYTES: gl.constexpr = (BM + BN) * BK * (x_ring.dtype.primitive_bitwidth // 8)
    n_tiles = n_row_tiles * n_column_tiles
    # weights do not depend on the previous kernel: load the first ring of them before it ends
    i_m, i_n = row_and_column_tile(gl.program_id(0), n_row_tiles, n_column_tiles, GROUP)
    for early in gl.static_range(STAGES):
        mbarrier.expect(ready.index(early), STAGE_BYTES)
        for part in gl.static_range(PARTS):
            copy_to_shared(
                weight_desc, [i_n * BN + part * COLUMNS, early * BK], ready.index(early),
                weight_ring.index(early * PARTS + part),
            )  # fmt: skip
    gdc_wait()  # wait for the previous kernel, which writes x and the residual
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_m, i_n = row_and_column_tile(i_tile, n_row_tiles, n_column_tiles, GROUP)
        for i_k in range(0, K, BK):
            stage = step % STAGES
            bar = ready.index(stage)
            if step >= STAGES:
                # until every MMA partition has read what this stage held
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(bar, STAGE_BYTES)
                for part in gl.static_range(PARTS):
                    copy_to_shared(
                        weight_desc, [i_n * BN + part * COLUMNS, i_k], bar,
                        weight_ring.index(stage * PARTS + part),
                    )  # fmt: skip
            for group in gl.static_range(GROUPS):
                copy_to_shared(
                    x_desc, [i_m * BM + group * ROWS, i_k], bar,
                    x_ring.index(stage * GROUPS + group),
                )  # fmt: skip
            step += 1
        if EPILOGUE == "residual":
            # until every MMA partition has stored its previous result, whose space this takes
            mbarrier.wait(result_is_free.index(0), turn & 1)
            mbarrier.expect(residual_is_there.index(0), BM * BN * 2)
            for group in gl.static_range(GROUPS):
                copy_to_shared(
                    residual_desc, [i_m * BM + group * ROWS, i_n * BN], residual_is_there.index(0),
                    results.index(group),
                )  # fmt: skip
        turn += 1


@gluon.jit
def _accumulate(
    acc, step, n_steps, buffers, barriers, I_GROUP: gl.constexpr
):  # fmt: skip
    x_ring, weight_ring, results = buffers  # [STAGES * GROUPS, ROWS, BK], [STAGES, BN, BK]
    empty, ready, _, _ = barriers
    GROUPS: gl.constexpr = results.shape[0]
    STAGES: gl.constexpr = weight_ring.shape[0]
    for i in range(n_steps):
        stage = step % STAGES
        # until this stage's x and weight have arrived
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        b_x = x_ring.index(stage * GROUPS + I_GROUP)  # [ROWS, BK]
        b_weight = weight_ring.index(stage)  # [BN, BK]
        acc = warpgroup_mma(b_x, b_weight.permute((1, 0)), acc, is_async=True)  # [ROWS, BN]
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))  # until the previous product ends
        # this partition has read the previous stage
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    # this partition has read the last stage
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def _store_quantized(
    b_out, rows_out, scales_out, i_row, i_chunk, M, N, MMA_ROWS: gl.constexpr
):  # fmt: skip
    ROWS: gl.constexpr = b_out.shape[0]
    # a thread's 32 columns of a row are adjacent in memory: see weight_format.fp8_column_order
    BYTES: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [8, 0]],
        lane_bases=[[0, 32], [0, 64], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[ROWS, 128],
    )  # fmt: skip
    b_values = b_out.to(gl.float32)  # [ROWS, 128]
    b_largest = gl.max(gl.abs(b_values), 1)  # [ROWS]
    b_values = (b_values * inverse_scale(b_largest)[:, None]).to(gl.float8e4nv)
    b_values = b_values.reshape((ROWS, 16, 4, 2)).permute((0, 2, 1, 3)).reshape((ROWS, 128))
    b_values = gl.convert_layout(b_values, BYTES, assert_trivial=True)
    o_row = i_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BYTES))  # [ROWS]
    o_column = i_chunk * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, BYTES))  # [128]
    p_rows = rows_out + o_row.to(gl.int64)[:, None] * N + o_column[None, :]
    gl.store(p_rows, b_values, mask=(o_row < M)[:, None])
    o_m = i_row + gl.arange(0, ROWS, layout=MMA_ROWS)  # [ROWS]
    b_scale = gl.convert_layout(scale_for(b_largest), MMA_ROWS)
    gl.store(scales_out + i_chunk * M + o_m, b_scale, mask=o_m < M)


@gluon.jit
def _mma_partition(
    operands, outs, buffers, barriers, sizes, K: gl.constexpr, GROUP: gl.constexpr,
    EPILOGUE: gl.constexpr, SQUARES: gl.constexpr, FIRST: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    bias, squares, eps = operands  # of the epilogue
    out_desc, squares_out, rows_out, scales_out = outs
    x_ring, weight_ring, results = buffers
    _, _, result_is_free, residual_is_there = barriers
    M, n_row_tiles, n_column_tiles = sizes
    ROWS: gl.constexpr = x_ring.shape[1]
    BN: gl.constexpr = weight_ring.shape[1]
    BM: gl.constexpr = ROWS * results.shape[0]
    STEPS: gl.constexpr = K // x_ring.shape[2]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    MMA_ROWS: gl.constexpr = gl.SliceLayout(1, MMA)
    MMA_COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    # in this layout each thread loads its own columns; in MMA's it would hold a quarter of them all
    EARLY_ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    EARLY_COLUMNS: gl.constexpr = gl.BlockedLayout([max(1, BN // 128)], [32], [4], [0])
    o_row = gl.arange(0, ROWS, layout=EARLY_ROWS)  # [ROWS]
    o_column = gl.arange(0, BN, layout=EARLY_COLUMNS)  # [BN]
    gdc_wait()  # wait for the previous kernel, which writes the sums of squares
    gdc_launch_dependents()
    step = 0
    turn = 0
    for i_tile in range(gl.program_id(0), n_row_tiles * n_column_tiles, gl.num_programs(0)):
        i_m, i_n = row_and_column_tile(i_tile, n_row_tiles, n_column_tiles, GROUP)
        i_row = i_m * BM + I_GROUP * ROWS
        # the epilogue's operands arrive while the GEMM runs
        b_bias = gl.load(bias + i_n * BN + o_column)  # [BN]
        parts = gl.tuple(())
        if SQUARES > 0:
            for chunk in gl.static_range(SQUARES):
                p_squares = squares + chunk * M + i_row + o_row
                b_squares = gl.load(p_squares, mask=i_row + o_row < M, other=0.0)  # [ROWS]
                parts = parts + (b_squares,)

        acc = gl.zeros([ROWS, BN], gl.float32, MMA)  # [ROWS, BN]
        if EPILOGUE == "residual":
            acc, step = _accumulate(acc, step, FIRST, buffers, barriers, I_GROUP)
            tma.store_wait(0)  # until the previous result is stored: the residual takes its space
            mbarrier.arrive(result_is_free.index(0), count=1)
            acc, step = _accumulate(acc, step, STEPS - FIRST, buffers, barriers, I_GROUP)
        else:
            acc, step = _accumulate(acc, step, STEPS, buffers, barriers, I_GROUP)
            tma.store_wait(0)  # until the previous result is stored: this one takes its space

        if SQUARES > 0:  # every tile adds a row's chunks in the same order
            total = parts[0]
            for chunk in gl.static_range(1, SQUARES):
                total += parts[chunk]
            row_scale = gl.convert_layout(gl.rsqrt(total / K + eps), MMA_ROWS)  # [ROWS]
            acc = acc * row_scale[:, None]
        acc = acc + gl.convert_layout(b_bias, MMA_COLUMNS).to(gl.float32)[None, :]
        i_column = i_n * BN
        if EPILOGUE == "gelu":
            acc = gelu(acc)
        if EPILOGUE == "swiglu":  # 8 columns of the gate, 8 of up: a thread has both of a pair
            b_pairs = acc.reshape((ROWS, BN // 16, 2, 8)).permute((0, 1, 3, 2))
            b_gate, b_up = b_pairs.split()  # [ROWS, BN / 16, 8] each
            acc = swiglu(b_gate, b_up).reshape((ROWS, BN // 2))  # [ROWS, BN / 2]
            i_column = i_n * (BN // 2)
        if EPILOGUE == "residual":
            mbarrier.wait(
                residual_is_there.index(0), turn & 1
            )  # until this tile's residual has arrived
            acc = acc + results.index(I_GROUP).load(MMA).to(gl.float32)
        b_out = acc.to(out_desc.dtype)
        results.index(I_GROUP).store(b_out)
        fence_async_shared()
        copy_to_global(out_desc, [i_row, i_column], results.index(I_GROUP))

        if EPILOGUE == "residual":  # of what was stored: rounded
            o_m = i_row + gl.arange(0, ROWS, layout=MMA_ROWS)  # [ROWS]
            b_squared = b_out.to(gl.float32)  # [ROWS, BN]
            b_squared = b_squared * b_squared
            if BN == 256:
                b_halves = b_squared.reshape((ROWS, 2, 128)).permute((0, 2, 1))
                b_left, b_right = b_halves.split()  # [ROWS, 128] each
                b_left = gl.convert_layout(gl.sum(b_left, 1), MMA_ROWS)  # [ROWS]
                b_right = gl.convert_layout(gl.sum(b_right, 1), MMA_ROWS)  # [ROWS]
                gl.store(squares_out + (2 * i_n) * M + o_m, b_left, mask=o_m < M)
                gl.store(squares_out + (2 * i_n + 1) * M + o_m, b_right, mask=o_m < M)
            else:
                gl.store(squares_out + i_n * M + o_m, gl.sum(b_squared, 1), mask=o_m < M)
            if rows_out is not None:  # the stream in e4m3 as well, for the next GEMM
                N = n_column_tiles * BN
                _store_quantized(b_out, rows_out, scales_out, i_row, i_n, M, N, MMA_ROWS)
        turn += 1
    tma.store_wait(0)  # until the last result is stored


@gluon.jit
def make_buffers(x, weight, out, BN: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    X: gl.constexpr = x.block_type.shape
    WEIGHT: gl.constexpr = weight.block_type.shape
    OUT: gl.constexpr = out.block_type.shape
    PARTS: gl.constexpr = BN // WEIGHT[0]
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS] + X, x.layout)
    weight_ring = gl.allocate_shared_memory(weight.dtype, [STAGES * PARTS] + WEIGHT, weight.layout)
    results = gl.allocate_shared_memory(out.dtype, [GROUPS * PARTS] + OUT, out.layout)
    return x_ring, weight_ring, results


@gluon.jit
def make_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    result_is_free = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    residual_is_there = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=GROUPS)  # every MMA partition arrives
        mbarrier.init(ready.index(stage), count=1)  # the load partition arrives, with bytes
    mbarrier.init(result_is_free.index(0), count=GROUPS)
    mbarrier.init(residual_is_there.index(0), count=1)
    return empty, ready, result_is_free, residual_is_there


@gluon.jit(do_not_specialize=["M", "n_row_tiles"])
def _hopper_gemm(
    x, weight, bias, residual, squares, out, squares_out, rows_out, scales_out, eps, M,
    n_row_tiles, n_column_tiles, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr, EPILOGUE: gl.constexpr,
    SQUARES: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = epilogue(row scale * x (M, K) @ weight (N, K)^T + bias).

    With `rows_out`, the kernel also stores a residual's result in e4m3, with its scales.
    """
    descs = (x, weight, residual)
    operands = (bias, squares, eps)
    outs = (out, squares_out, rows_out, scales_out)
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


def supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    N, K = weight.shape
    return (
        x.dtype == torch.bfloat16
        and N % 256 == 0
        and K % BK == 0
        and (FIRST_STEPS + SQUARE.num_stages) * BK <= K
        and is_hopper(x.device)
    )


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    epilogue: str,
    squares: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    tile: HopperGemmTile | None = None,
    quantized: QuantizedRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the GEMM on Hopper and return the result and, for `residual`, its sums of squares.

    For `residual`, `quantized` also receives the result in e4m3, if the caller passes it. A tile
    then has 128 columns.

    The previous kernel must not write `weight`, because this kernel reads it before the previous
    kernel has ended.
    """
    M, K = x.shape
    N = weight.shape[0]
    tile = tile or _tile(epilogue, K, M, is_quantizing=quantized is not None)
    out = torch.empty((M, N // 2 if epilogue == "swiglu" else N), dtype=x.dtype, device=x.device)
    squares_out = out
    if epilogue == "residual":
        chunks = N // SQUARES_COLUMNS
        squares_out = torch.empty((chunks, M), dtype=torch.float32, device=x.device)
    if M == 0:
        return out, squares_out
    n_row_tiles, n_column_tiles = -(-M // tile.rows), N // tile.columns
    x_block = [tile.rows // tile.num_groups, BK]
    weight_block = [tile.columns, BK]
    out_block = [x_block[0], tile.columns // 2 if epilogue == "swiglu" else tile.columns]
    out_descriptor = descriptor(out, out_block)
    with torch.cuda.device(x.device):
        _hopper_gemm[(min(n_row_tiles * n_column_tiles, multiprocessors(x.device)),)](
            descriptor(x, x_block), descriptor(weight, weight_block), bias,
            out_descriptor if residual is None else descriptor(residual, out_block),
            out if squares is None else squares, out_descriptor, squares_out,
            None if quantized is None else quantized.values,
            None if quantized is None else quantized.scales, eps, M,
            n_row_tiles, n_column_tiles, K=K, BM=tile.rows, BN=tile.columns,
            STAGES=tile.num_stages, GROUPS=tile.num_groups, GROUP=GROUPED_ROW_TILES,
            EPILOGUE=epilogue, SQUARES=0 if squares is None else len(squares),
            FIRST=FIRST_STEPS, num_warps=4, launch_pdl=True, **LAUNCH,
        )  # fmt: skip
    return out, squares_out


def _tile(epilogue: str, K: int, M: int, *, is_quantizing: bool = False) -> HopperGemmTile:
    # with scales, a tile needs 128 columns: every tile of a residual with a small K has them
    is_deep = K > 2048 and not is_quantizing
    # a tower of an unpublished width may have a K that was not measured
    rows = TILES.get((epilogue, is_deep)) or TILES[epilogue, not is_deep]
    return next(tile for least_rows, tile in reversed(rows) if least_rows <= M)
