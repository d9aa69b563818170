"""Both kinds of the attention on Hopper: the same kernel, with its loads in progress together.

In a window, Q, K and V of a head arrive by the tensor memory accelerator (TMA) while the angles
load. Q and K are rotated in registers and go back to the same shared memory, where the tensor cores
read them.

Over a frame, a program has three roles. A producer warp fetches tiles of K (rotated beforehand) and
V into a ring of shared memory. Each of two warpgroups attends for 64 query rows; Q is rotated in
registers while it loads. A warpgroup multiplies Q with the next tile's keys before it needs them,
and the two alternate: one's softmax runs while the tensor cores work for the other.

Both use programmatic dependent launch: they may start before the previous kernel has ended, and let
the next one start early. Each waits for the previous kernel before it reads that kernel's output.

They are written in Gluon, Triton's lower level, because Triton cannot express that overlap. They
support head dim 80, which every published tower has, in bf16. Otherwise the Triton kernel runs.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwen_vit.kernels.hopper import descriptor, fence_for_wgmma, hold_barriers, is_hopper

__all__ = ["Q_ROWS", "W_ROWS", "full_attention", "supports", "window_attention"]

Q_ROWS = 128  # of a tile: 64 for each of two warpgroups
K_ROWS = 128
NUM_STAGES = 3
W_ROWS = 64  # of a window at most
MAIN, TAIL = 64, 16  # head dim 80 in parts that a matrix instruction takes whole


@gluon.jit
def _tile_of_program(tiles, n_tiles):
    """(head, first and last query row, first and last key row). A padding tile has no rows."""
    i_program = gl.program_id(0)
    p_tile = tiles + (i_program % n_tiles).to(gl.int64) * 4
    return (
        i_program // n_tiles, gl.load(p_tile), gl.load(p_tile + 1), gl.load(p_tile + 2),
        gl.load(p_tile + 3),
    )  # fmt: skip


@gluon.jit
def load_partition(
    tiles, n_tiles, operands, rings, barriers,
    H: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: K, then V, of one tile of keys after the other."""
    k0, k1, v0, v1 = operands
    k0_ring, k1_ring, v0_ring, v1_ring = rings
    k_ready, k_empty, v_ready, v_empty, _ = barriers
    i_head, _, _, k_begin, k_end = _tile_of_program(tiles, n_tiles)
    k_column = i_head * D
    v_column = (2 * H + i_head) * D
    gdc_wait()
    for i in range(gl.cdiv(k_end - k_begin, BN)):
        stage = i % STAGES
        phase = (i // STAGES & 1) ^ 1
        row = k_begin + i * BN
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), BN * D * 2)
        tma.async_copy_global_to_shared(
            k0, [row, k_column], k_ready.index(stage), k0_ring.index(stage)
        )
        tma.async_copy_global_to_shared(
            k1, [row, k_column + D0], k_ready.index(stage), k1_ring.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), BN * D * 2)
        tma.async_copy_global_to_shared(
            v0, [row, v_column], v_ready.index(stage), v0_ring.index(stage)
        )
        tma.async_copy_global_to_shared(
            v1, [row, v_column + D0], v_ready.index(stage), v1_ring.index(stage)
        )


@gluon.constexpr_function
def _dims_layout(width):
    """Rows of `width` dims, 16 bytes to a thread: with both dims of its pairs."""
    lanes = width // 8  # that share a row
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def _pairs_layout(width):
    """The rotary pairs of the same rows and threads."""
    lanes = width // 8
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _angles(
    cos, sin, axis_index, row_begin, n_rows,
    D_BEGIN: gl.constexpr, D_BLOCK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Cosines and sines of the pairs in dims D_BEGIN to D_BEGIN + D_BLOCK: [ROWS, D_BLOCK / 2]."""
    A: gl.constexpr = D // 4  # angles of one axis
    PAIRS: gl.constexpr = _pairs_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PAIRS))
    o_pair = D_BEGIN // 2 + gl.arange(0, D_BLOCK // 2, layout=gl.SliceLayout(0, PAIRS))
    m_pair = (o_row[:, None] < n_rows) & (o_pair[None, :] < 2 * A)
    p_axis = axis_index + (row_begin + o_row[:, None].to(gl.int64)) * 2 + (o_pair // A)[None, :]
    o_angle = gl.load(p_axis, mask=m_pair, other=0) * A + (o_pair % A)[None, :]
    c = gl.load(cos + o_angle, mask=m_pair, other=0.0)
    s = gl.load(sin + o_angle, mask=m_pair, other=0.0)
    return c, s


@gluon.jit
def _rotated(x, c, s, D_BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Rows of dims with adjacent rotary pairs, rotated in fp32."""
    PAIRS: gl.constexpr = _pairs_layout(D_BLOCK)
    first, second = x.to(gl.float32).reshape((ROWS, D_BLOCK // 2, 2)).split()
    first = gl.convert_layout(first, PAIRS)
    second = gl.convert_layout(second, PAIRS)
    return gl.join(first * c - second * s, second * c + first * s).reshape((ROWS, D_BLOCK))


@gluon.jit
def _rotated_queries(
    qkv, cos, sin, axis_index, row_begin, n_rows, column, scale,
    D_BEGIN: gl.constexpr, D_BLOCK: gl.constexpr, D: gl.constexpr, ROW_STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """Dims D_BEGIN to D_BEGIN + D_BLOCK of ROWS rows, rotated and scaled in fp32, rounded once."""
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))
    o_dim = gl.arange(0, D_BLOCK, layout=gl.SliceLayout(0, DIMS))
    p_row = qkv + (row_begin + o_row[:, None].to(gl.int64)) * ROW_STRIDE + column + D_BEGIN
    x = gl.load(p_row + o_dim[None, :], mask=o_row[:, None] < n_rows, other=0.0)
    c, s = _angles(cos, sin, axis_index, row_begin, n_rows, D_BEGIN, D_BLOCK, D, ROWS)
    return (_rotated(x, c, s, D_BLOCK, ROWS) * scale).to(qkv.dtype.element_ty)


@gluon.jit
def _clear_rows(rows, n_rows, D_BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Zeros from row `n_rows` on: a neighbour's values have weight 0, but 0 * NaN is NaN."""
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    m_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))[:, None] < n_rows
    rows.store(gl.where(m_row, rows.load(DIMS), 0.0))


@gluon.jit
def mma_partition(
    tiles, n_tiles, qkv, cos, sin, axis_index, out, scale_log2e, q0_tiles, q1_tiles, rings,
    barriers, H: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """One warpgroup: softmax(rope(Q) rope(K)^T * scale) V for its 64 query rows."""
    k0_ring, k1_ring, v0_ring, v1_ring = rings
    k_ready, k_empty, v_ready, v_empty, turns = barriers
    dtype: gl.constexpr = qkv.dtype.element_ty
    # accumulators of the scores, and of the output's main part and tail; P as their left operand
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    O1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    P0: gl.constexpr = gl.DotOperandLayout(0, O0, 2)
    P1: gl.constexpr = gl.DotOperandLayout(0, O1, 2)
    i_head, q_begin, q_end, k_begin, k_end = _tile_of_program(tiles, n_tiles)
    row_begin = (q_begin + I_GROUP * ROWS).to(gl.int64)
    n_rows = q_end - q_begin - I_GROUP * ROWS
    n_key_tiles = gl.cdiv(k_end - k_begin, BN)
    gdc_wait()
    gdc_launch_dependents()
    if n_key_tiles > 0:
        q0 = q0_tiles.index(I_GROUP)
        q1 = q1_tiles.index(I_GROUP)
        q0.store(
            _rotated_queries(
                qkv, cos, sin, axis_index, row_begin, n_rows, i_head * D, scale_log2e, 0, D0, D,
                3 * H * D, ROWS,
            )
        )  # fmt: skip
        q1.store(
            _rotated_queries(
                qkv, cos, sin, axis_index, row_begin, n_rows, i_head * D, scale_log2e, D0, D1, D,
                3 * H * D, ROWS,
            )
        )  # fmt: skip
        fence_for_wgmma()
        o_k = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
        zeros = gl.zeros([ROWS, BN], gl.float32, S)
        acc0 = gl.zeros([ROWS, D0], gl.float32, O0)
        acc1 = gl.zeros([ROWS, D1], gl.float32, O1)

        mbarrier.wait(k_ready.index(0), 0)
        s = warpgroup_mma(q0, k0_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma(q1, k1_ring.index(0).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        if n_key_tiles == 1:
            s = gl.where(o_k[None, :] < k_end - k_begin, s, -float("inf"))
        m = gl.max(s, 1)
        p = gl.exp2(s - m[:, None])
        l = gl.sum(p, 1)
        p = p.to(dtype)
        mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES, pred=n_key_tiles > 1)

        for i in range(1, n_key_tiles):
            stage = i % STAGES
            stage_before = (i - 1) % STAGES
            # scores of this tile, then the values of the one before: both in progress at once, and
            # in turns with the other warpgroup, whose softmax runs meanwhile
            # (the second waits for the first to have had its turn; the first begins without)
            mbarrier.wait(turns.index(I_GROUP), (i - 1 & 1) ^ (1 - I_GROUP))
            s = warpgroup_mma(
                q0, k0_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            s = warpgroup_mma(q1, k1_ring.index(stage).permute((1, 0)), s, is_async=True)
            mbarrier.wait(v_ready.index(stage_before), (i - 1) // STAGES & 1)
            p0 = gl.convert_layout(p, P0)
            p1 = gl.convert_layout(p, P1)
            acc0 = warpgroup_mma(p0, v0_ring.index(stage_before), acc0, is_async=True)
            acc1 = warpgroup_mma(p1, v1_ring.index(stage_before), acc1, is_async=True)
            mbarrier.arrive(turns.index(1 - I_GROUP), count=1)
            s = warpgroup_mma_wait(num_outstanding=2, deps=(s,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if i == n_key_tiles - 1:
                s = gl.where(o_k[None, :] < k_end - k_begin - i * BN, s, -float("inf"))
            m_new = gl.maximum(m, gl.max(s, 1))
            p_new = gl.exp2(s - m_new[:, None])
            rescale = gl.exp2(m - m_new)
            l = l * rescale + gl.sum(p_new, 1)
            m = m_new
            # A wait here keeps the assembler from moving the next one up, before the softmax.
            mbarrier.wait(
                k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < n_key_tiles
            )
            # P as well: its registers are read until then and must not be reused before
            acc0, acc1, p0, p1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1, p0, p1))
            mbarrier.arrive(v_empty.index(stage_before), count=1)
            acc0 = acc0 * gl.convert_layout(rescale, gl.SliceLayout(1, O0))[:, None]
            acc1 = acc1 * gl.convert_layout(rescale, gl.SliceLayout(1, O1))[:, None]
            p = p_new.to(dtype)

        stage = (n_key_tiles - 1) % STAGES
        mbarrier.wait(v_ready.index(stage), (n_key_tiles - 1) // STAGES & 1)
        n_last = k_end - k_begin - (n_key_tiles - 1) * BN
        v0 = v0_ring.index(stage)
        v1 = v1_ring.index(stage)
        if n_last < BN:
            # both warpgroups write the same values, so neither waits for the other
            _clear_rows(v0, n_last, D0, BN)
            _clear_rows(v1, n_last, D1, BN)
            fence_for_wgmma()
        p0 = gl.convert_layout(p, P0)
        p1 = gl.convert_layout(p, P1)
        acc0 = warpgroup_mma(p0, v0, acc0, is_async=True)
        acc1 = warpgroup_mma(p1, v1, acc1, is_async=True)
        acc0, acc1, p0, p1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1, p0, p1))

        p_out = out + row_begin * (H * D) + i_head * D
        scale0 = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O0))
        scale1 = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O1))
        o_row0 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O0))[:, None]
        o_row1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O1))[:, None]
        o_dim0 = gl.arange(0, D0, layout=gl.SliceLayout(0, O0))[None, :]
        o_dim1 = D0 + gl.arange(0, D1, layout=gl.SliceLayout(0, O1))[None, :]
        y0 = (acc0 * scale0[:, None]).to(dtype)
        y1 = (acc1 * scale1[:, None]).to(dtype)
        gl.store(p_out + o_row0 * (H * D) + o_dim0, y0, mask=o_row0 < n_rows)
        gl.store(p_out + o_row1 * (H * D) + o_dim1, y1, mask=o_row1 < n_rows)


@gluon.jit(do_not_specialize=["n_tiles"])
def _full_attention(
    tiles, n_tiles, qkv, cos, sin, axis_index, k0, k1, v0, v1, out, scale_log2e,
    H: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One query tile of one head; tiles of a head run side by side and share its keys in L2."""
    dtype: gl.constexpr = qkv.dtype.element_ty
    Q0: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D0], dtype)
    Q1: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D1], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q0_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, D0], Q0)
    q1_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, D1], Q1)
    k0_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D0], k0.layout)
    k1_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], k1.layout)
    v0_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D0], v0.layout)
    v1_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], v1.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    rings = (k0_ring, k1_ring, v0_ring, v1_ring)
    barriers = (k_ready, k_empty, v_ready, v_empty, turns)
    operands = (k0, k1, v0, v1)
    gl.warp_specialize([
        (mma_partition, (tiles, n_tiles, qkv, cos, sin, axis_index, out, scale_log2e, q0_tiles,
                         q1_tiles, rings, barriers, H, D, D0, D1, BN, STAGES, ROWS, 0)),
        (mma_partition, (tiles, n_tiles, qkv, cos, sin, axis_index, out, scale_log2e, q0_tiles,
                         q1_tiles, rings, barriers, H, D, D0, D1, BN, STAGES, ROWS, 1)),
        (load_partition, (tiles, n_tiles, operands, rings, barriers, H, D, D0, BN, STAGES)),
    ], [4, 1], [232, 40])  # fmt: skip
    hold_barriers(barriers)


@gluon.jit
def _store_rows(
    p_out, y, n_rows, D_BLOCK: gl.constexpr, ROW_STRIDE: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))[:, None]
    o_dim = gl.arange(0, D_BLOCK, layout=gl.SliceLayout(0, DIMS))[None, :]
    gl.store(p_out + o_row * ROW_STRIDE + o_dim, y, mask=o_row < n_rows)


@gluon.jit
def _window_attention(
    tiles, rows0, rows1, cos, sin, axis_index, out, scale_log2e,
    H: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One window of one head. Its keys are its query rows. Heads vary fastest, as in memory.

    Q, K and V load together while the angles load. The rotated rows go back to the same memory.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    O1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    DIMS0: gl.constexpr = _dims_layout(D0)
    DIMS1: gl.constexpr = _dims_layout(D1)
    i_head = gl.program_id(0) % H
    p_tile = tiles + (gl.program_id(0) // H).to(gl.int64) * 4
    main = gl.allocate_shared_memory(dtype, [3, ROWS, D0], rows0.layout)
    tail = gl.allocate_shared_memory(dtype, [3, ROWS, D1], rows1.layout)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    q_begin = gl.load(p_tile)
    n_rows = gl.load(p_tile + 1) - q_begin
    row_begin = q_begin.to(gl.int64)
    if n_rows > 0:  # else a padding tile
        # The previous kernel writes only Q, K and V; tiles and angles are older.
        c0, s0 = _angles(cos, sin, axis_index, row_begin, n_rows, 0, D0, D, ROWS)
        c1, s1 = _angles(cos, sin, axis_index, row_begin, n_rows, D0, D1, D, ROWS)
        gdc_wait()
        gdc_launch_dependents()
        for i in gl.static_range(3):
            mbarrier.expect(ready.index(i), ROWS * D * 2)
            column = (i * H + i_head) * D
            tma.async_copy_global_to_shared(rows0, [q_begin, column], ready.index(i), main.index(i))
            tma.async_copy_global_to_shared(
                rows1, [q_begin, column + D0], ready.index(i), tail.index(i)
            )
        q0, k0, v0 = main.index(0), main.index(1), main.index(2)
        q1, k1, v1 = tail.index(0), tail.index(1), tail.index(2)
        mbarrier.wait(ready.index(0), 0)
        q0.store((_rotated(q0.load(DIMS0), c0, s0, D0, ROWS) * scale_log2e).to(dtype))
        q1.store((_rotated(q1.load(DIMS1), c1, s1, D1, ROWS) * scale_log2e).to(dtype))
        mbarrier.wait(ready.index(1), 0)
        k0.store(_rotated(k0.load(DIMS0), c0, s0, D0, ROWS).to(dtype))
        k1.store(_rotated(k1.load(DIMS1), c1, s1, D1, ROWS).to(dtype))
        fence_for_wgmma()

        zeros = gl.zeros([ROWS, ROWS], gl.float32, S)
        s = warpgroup_mma(q0, k0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
        o_k = gl.arange(0, ROWS, layout=gl.SliceLayout(0, S))
        s = gl.where(o_k[None, :] < n_rows, s, -float("inf"))
        p = gl.exp2(s - gl.max(s, 1)[:, None])
        scale = 1.0 / gl.sum(p, 1)
        p = p.to(dtype)

        mbarrier.wait(ready.index(2), 0)
        if n_rows < ROWS:
            _clear_rows(v0, n_rows, D0, ROWS)
            _clear_rows(v1, n_rows, D1, ROWS)
            fence_for_wgmma()
        p0 = gl.convert_layout(p, gl.DotOperandLayout(0, O0, 2))
        p1 = gl.convert_layout(p, gl.DotOperandLayout(0, O1, 2))
        acc0 = gl.zeros([ROWS, D0], gl.float32, O0)
        acc1 = gl.zeros([ROWS, D1], gl.float32, O1)
        acc0 = warpgroup_mma(p0, v0, acc0, use_acc=False, is_async=True)
        acc1 = warpgroup_mma(p1, v1, acc1, use_acc=False, is_async=True)
        acc0, acc1, p0, p1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1, p0, p1))

        # through Q's place, so that a thread writes 16 bytes at a time
        q0.store((acc0 * gl.convert_layout(scale, gl.SliceLayout(1, O0))[:, None]).to(dtype))
        q1.store((acc1 * gl.convert_layout(scale, gl.SliceLayout(1, O1))[:, None]).to(dtype))
        p_out = out + row_begin * (H * D) + i_head * D
        _store_rows(p_out, q0.load(DIMS0), n_rows, D0, H * D, ROWS)
        _store_rows(p_out + D0, q1.load(DIMS1), n_rows, D1, H * D, ROWS)
    hold_barriers((ready,))


def supports(qkv: torch.Tensor, is_axial: bool, adjacent_pairs: bool) -> bool:
    """Whether this module supports the tower's call: bf16, head dim 80, Hopper."""
    return (
        qkv.dtype == torch.bfloat16
        and qkv.shape[3] == MAIN + TAIL
        and is_axial
        and adjacent_pairs
        and is_hopper(qkv.device)
    )


def full_attention(
    qkv: torch.Tensor,
    k_rotated: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    axis_index: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    scale_log2e: float,
    k_rows: int = K_ROWS,
    num_stages: int = NUM_STAGES,
) -> None:
    """Fill `out` (N, H, D): `attention`'s frame kind, K rotated beforehand.

    Other `k_rows` and `num_stages` than the reviewed ones are for benchmarks and tests.
    """
    N, _, H, D = qkv.shape
    keys, values = k_rotated.view(N, H * D), qkv.view(N, 3 * H * D)
    with torch.cuda.device(qkv.device):
        _full_attention[(len(tiles) * H,)](
            tiles, len(tiles), qkv, cos, sin, axis_index, descriptor(keys, [k_rows, MAIN]),
            descriptor(keys, [k_rows, TAIL]), descriptor(values, [k_rows, MAIN]),
            descriptor(values, [k_rows, TAIL]), out, scale_log2e, H=H, D=D, D0=MAIN, D1=TAIL,
            BN=k_rows, STAGES=num_stages, ROWS=Q_ROWS // 2, num_warps=4, launch_pdl=True,
        )  # fmt: skip


def window_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    axis_index: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    scale_log2e: float,
) -> None:
    """Fill `out` (N, H, D): `attention`'s window kind, for segments of at most W_ROWS rows.

    The previous kernel may write `qkv`, but no other argument: those are read before it has ended.
    At least one tile must have rows.
    """
    N, _, H, D = qkv.shape
    rows = qkv.view(N, 3 * H * D)
    with torch.cuda.device(qkv.device):
        _window_attention[(len(tiles) * H,)](
            tiles, descriptor(rows, [W_ROWS, MAIN]), descriptor(rows, [W_ROWS, TAIL]), cos, sin,
            axis_index, out, scale_log2e, H=H, D=D, D0=MAIN, D1=TAIL, ROWS=W_ROWS, num_warps=4,
            launch_pdl=True,
        )  # fmt: skip
