"""Compute window and full attention on Hopper, and overlap the loads with computation.

In the window kernel, the tensor memory accelerator (TMA) loads Q, K and V of a head while the
angles load. The kernel applies RoPE to Q and K in registers, and writes them back to the same
shared memory, from which the tensor cores read them.

In the full kernel, a program has three partitions. The load partition, one warp, fetches tiles of K
and V into a ring of shared memory. `attention.rotated_keys` has applied RoPE to K beforehand. Each
of the two MMA partitions is a warpgroup, and computes the attention of 64 query rows. It applies
RoPE to Q in registers as Q loads, and multiplies Q by the next tile's keys before it needs the
scores. The two MMA partitions alternate: one computes its softmax while the other uses the tensor
cores.

Names follow Gluon's tutorials. `descs` are TMA descriptors. `buffers` are rings of shared memory
with STAGES slots. `barriers` are mbarriers. The MMA partitions wait for a slot's data on its
`ready` barrier. The load partition waits on its `empty` barrier until both MMA partitions have read
the slot. Each pass over the ring flips a barrier's phase.

Both kernels use programmatic dependent launch: they may start before the previous kernel has ended,
and let the next kernel start early. Each waits for the previous kernel before it reads that
kernel's output.

The kernels are written in Gluon, Triton's lower level, because Triton cannot express this overlap.
They support bf16 and head dim 80, which every published tower has. In all other cases, the Triton
kernels run.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwen_vit.kernels.hopper import (
    copy_to_shared,
    descriptor,
    fence_for_wgmma,
    hold_barriers,
    is_hopper,
)
from qwen_vit.kernels.launch import LAUNCH

__all__ = ["Q_ROWS", "W_ROWS", "full_attention", "supports", "window_attention"]

Q_ROWS = 128  # query rows of a tile: 64 for each of two warpgroups
K_ROWS = 128
NUM_STAGES = 3
W_ROWS = 64  # of a window at most
MAIN, TAIL = 64, 16  # head dim 80, cut into widths that matrix instructions support


@gluon.jit
def _tile_of_program(tiles, n_tiles):
    """Return a program's head, query row range and key row range. A padding tile has no rows."""
    i_program = gl.program_id(0)
    p_tile = tiles + (i_program % n_tiles).to(gl.int64) * 4
    return (
        i_program // n_tiles, gl.load(p_tile), gl.load(p_tile + 1), gl.load(p_tile + 2),
        gl.load(p_tile + 3),
    )  # fmt: skip


@gluon.jit
def _load_partition(tiles, n_tiles, descs, buffers, barriers, H: gl.constexpr):
    """Load K, then V, of each tile of keys in order, with one warp."""
    k0_desc, k1_desc, v0_desc, v1_desc = descs
    k0_ring, k1_ring, v0_ring, v1_ring = buffers  # [STAGES, BN, D0], [STAGES, BN, D1], twice
    k_ready, k_empty, v_ready, v_empty, _ = barriers
    STAGES: gl.constexpr = k0_ring.shape[0]
    BN: gl.constexpr = k0_ring.shape[1]
    D0: gl.constexpr = k0_ring.shape[2]
    D: gl.constexpr = D0 + k1_ring.shape[2]
    i_head, _, _, k_begin, k_end = _tile_of_program(tiles, n_tiles)
    k_column = i_head * D
    v_column = (2 * H + i_head) * D
    gdc_wait()  # wait for the previous kernel, which writes K and V
    for i in range(gl.cdiv(k_end - k_begin, BN)):
        stage = i % STAGES
        phase = (i // STAGES & 1) ^ 1  # an empty ring counts as read: the first pass never waits
        row = k_begin + i * BN
        # until both MMA partitions have read the K that this slot held
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), BN * D * 2)
        copy_to_shared(k0_desc, [row, k_column], k_ready.index(stage), k0_ring.index(stage))
        copy_to_shared(k1_desc, [row, k_column + D0], k_ready.index(stage), k1_ring.index(stage))
        # until both MMA partitions have read the V that this slot held
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), BN * D * 2)
        copy_to_shared(v0_desc, [row, v_column], v_ready.index(stage), v0_ring.index(stage))
        copy_to_shared(v1_desc, [row, v_column + D0], v_ready.index(stage), v1_ring.index(stage))


@gluon.constexpr_function
def _dims_layout(width):
    """Return a layout for rows of `width` dims, with 16 bytes and both dims of a pair in each
    thread."""
    lanes = width // 8  # threads that share a row
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def _pairs_layout(width):
    """Return the layout of the rotary pairs, for the rows and threads of `_dims_layout`."""
    lanes = width // 8
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _angles(
    rope, row_begin, n_rows,
    D_BEGIN: gl.constexpr, D_BLOCK: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Load cosines and sines for dims D_BEGIN to D_BEGIN + D_BLOCK: [ROWS, D_BLOCK / 2]."""
    cos, sin, axis_index = rope
    A: gl.constexpr = D // 4  # angles of one axis
    PAIRS: gl.constexpr = _pairs_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PAIRS))  # [ROWS]
    o_pair = D_BEGIN // 2 + gl.arange(0, D_BLOCK // 2, layout=gl.SliceLayout(0, PAIRS))
    m_pair = (o_row[:, None] < n_rows) & (o_pair[None, :] < 2 * A)  # [ROWS, D_BLOCK / 2]
    p_axis = axis_index + (row_begin + o_row[:, None].to(gl.int64)) * 2 + (o_pair // A)[None, :]
    o_angle = gl.load(p_axis, mask=m_pair, other=0) * A + (o_pair % A)[None, :]
    b_cos = gl.load(cos + o_angle, mask=m_pair, other=0.0)  # [ROWS, D_BLOCK / 2]
    b_sin = gl.load(sin + o_angle, mask=m_pair, other=0.0)  # [ROWS, D_BLOCK / 2]
    return b_cos, b_sin


@gluon.jit
def _rotated(b_x, angles, D_BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Apply RoPE in fp32 to rows with adjacent rotary pairs: [ROWS, D_BLOCK]."""
    b_cos, b_sin = angles
    PAIRS: gl.constexpr = _pairs_layout(D_BLOCK)
    b_first, b_second = b_x.to(gl.float32).reshape((ROWS, D_BLOCK // 2, 2)).split()
    b_first = gl.convert_layout(b_first, PAIRS)  # [ROWS, D_BLOCK / 2]
    b_second = gl.convert_layout(b_second, PAIRS)  # [ROWS, D_BLOCK / 2]
    return gl.join(b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin).reshape(
        (ROWS, D_BLOCK)
    )


@gluon.jit
def _rotated_queries(
    qkv, rope, row_begin, n_rows, column, scale,
    D_BEGIN: gl.constexpr, D_BLOCK: gl.constexpr, D: gl.constexpr, ROW_STRIDE: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))  # [ROWS]
    o_dim = gl.arange(0, D_BLOCK, layout=gl.SliceLayout(0, DIMS))  # [D_BLOCK]
    # [ROWS, 1]
    p_row = qkv + (row_begin + o_row[:, None].to(gl.int64)) * ROW_STRIDE + column + D_BEGIN
    # [ROWS, D_BLOCK]
    b_x = gl.load(p_row + o_dim[None, :], mask=o_row[:, None] < n_rows, other=0.0)
    angles = _angles(rope, row_begin, n_rows, D_BEGIN, D_BLOCK, D, ROWS)
    return (_rotated(b_x, angles, D_BLOCK, ROWS) * scale).to(qkv.dtype.element_ty)


@gluon.jit
def _clear_rows(rows, n_rows, D_BLOCK: gl.constexpr, ROWS: gl.constexpr):
    """Set the rows of V from `n_rows` on to zero: their weight is 0, but 0 * NaN is NaN."""
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    m_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))[:, None] < n_rows  # [ROWS, 1]
    rows.store(gl.where(m_row, rows.load(DIMS), 0.0))


@gluon.jit
def _mma_partition(
    tiles, n_tiles, qkv, rope, out, scale_log2e, q_buffers, buffers, barriers,
    H: gl.constexpr, I_GROUP: gl.constexpr,
):  # fmt: skip
    """Compute softmax(rope(Q) rope(K)^T * scale) V for one warpgroup's 64 query rows."""
    q0_buffers, q1_buffers = q_buffers  # [2, ROWS, D0], [2, ROWS, D1]
    k0_ring, k1_ring, v0_ring, v1_ring = buffers  # [STAGES, BN, D0], [STAGES, BN, D1], twice
    k_ready, k_empty, v_ready, v_empty, turns = barriers
    STAGES: gl.constexpr = k0_ring.shape[0]
    BN: gl.constexpr = k0_ring.shape[1]
    ROWS: gl.constexpr = q0_buffers.shape[1]
    D0: gl.constexpr = q0_buffers.shape[2]
    D1: gl.constexpr = q1_buffers.shape[2]
    D: gl.constexpr = D0 + D1
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
    gdc_wait()  # wait for the previous kernel, which writes Q
    gdc_launch_dependents()
    if n_key_tiles > 0:
        q0 = q0_buffers.index(I_GROUP)  # [ROWS, D0]
        q1 = q1_buffers.index(I_GROUP)  # [ROWS, D1]
        q0.store(
            _rotated_queries(
                qkv, rope, row_begin, n_rows, i_head * D, scale_log2e, 0, D0, D, 3 * H * D, ROWS
            )
        )
        q1.store(
            _rotated_queries(
                qkv, rope, row_begin, n_rows, i_head * D, scale_log2e, D0, D1, D, 3 * H * D, ROWS
            )
        )
        fence_for_wgmma()
        o_k = gl.arange(0, BN, layout=gl.SliceLayout(0, S))  # [BN]
        zeros = gl.zeros([ROWS, BN], gl.float32, S)  # [ROWS, BN]
        acc0 = gl.zeros([ROWS, D0], gl.float32, O0)  # [ROWS, D0]
        acc1 = gl.zeros([ROWS, D1], gl.float32, O1)  # [ROWS, D1]

        mbarrier.wait(k_ready.index(0), 0)  # until the first tile of K has arrived
        b_scores = warpgroup_mma(
            q0, k0_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True
        )  # [ROWS, BN]
        b_scores = warpgroup_mma(q1, k1_ring.index(0).permute((1, 0)), b_scores, is_async=True)
        b_scores = warpgroup_mma_wait(num_outstanding=0, deps=(b_scores,))
        mbarrier.arrive(k_empty.index(0), count=1)  # this partition has read the first tile of K
        if n_key_tiles == 1:
            b_scores = gl.where(o_k[None, :] < k_end - k_begin, b_scores, -float("inf"))
        m = gl.max(b_scores, 1)  # [ROWS]
        b_p = gl.exp2(b_scores - m[:, None])  # [ROWS, BN]
        l = gl.sum(b_p, 1)  # [ROWS]
        b_p = b_p.to(dtype)
        # until the second tile of K has arrived, if there is one
        mbarrier.wait(k_ready.index(1 % STAGES), 1 // STAGES, pred=n_key_tiles > 1)

        for i in range(1, n_key_tiles):
            stage = i % STAGES
            stage_before = (i - 1) % STAGES
            # The products for this tile's scores and the previous tile's values run at the same
            # time. The partitions alternate: one multiplies while the other computes its softmax.
            # This wait ends when the other has started its matrix instructions. The first partition
            # begins without this wait.
            mbarrier.wait(turns.index(I_GROUP), (i - 1 & 1) ^ (1 - I_GROUP))
            b_scores = warpgroup_mma(
                q0, k0_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
            )  # [ROWS, BN]
            b_scores = warpgroup_mma(
                q1, k1_ring.index(stage).permute((1, 0)), b_scores, is_async=True
            )
            # until the tile of V that belongs to P has arrived
            mbarrier.wait(v_ready.index(stage_before), (i - 1) // STAGES & 1)
            b_p0 = gl.convert_layout(b_p, P0)  # [ROWS, BN]
            b_p1 = gl.convert_layout(b_p, P1)  # [ROWS, BN]
            acc0 = warpgroup_mma(b_p0, v0_ring.index(stage_before), acc0, is_async=True)
            acc1 = warpgroup_mma(b_p1, v1_ring.index(stage_before), acc1, is_async=True)
            mbarrier.arrive(turns.index(1 - I_GROUP), count=1)  # the other may start
            # until the scores are complete; the two products with V may still run
            b_scores = warpgroup_mma_wait(num_outstanding=2, deps=(b_scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)  # this partition has read this tile of K
            if i == n_key_tiles - 1:
                b_scores = gl.where(
                    o_k[None, :] < k_end - k_begin - i * BN, b_scores, -float("inf")
                )
            m_new = gl.maximum(m, gl.max(b_scores, 1))  # [ROWS]
            b_p_new = gl.exp2(b_scores - m_new[:, None])  # [ROWS, BN]
            rescale = gl.exp2(m - m_new)  # [ROWS]
            l = l * rescale + gl.sum(b_p_new, 1)
            m = m_new
            # Until the next tile of K has arrived, if there is one. At this place, the wait keeps
            # the assembler from moving the next wait before the softmax.
            mbarrier.wait(
                k_ready.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < n_key_tiles
            )
            # until the products with V have ended. They read P's registers, which must not be
            # reused before that
            acc0, acc1, b_p0, b_p1 = warpgroup_mma_wait(
                num_outstanding=0, deps=(acc0, acc1, b_p0, b_p1)
            )
            # this partition has read the tile of V before
            mbarrier.arrive(v_empty.index(stage_before), count=1)
            acc0 = acc0 * gl.convert_layout(rescale, gl.SliceLayout(1, O0))[:, None]
            acc1 = acc1 * gl.convert_layout(rescale, gl.SliceLayout(1, O1))[:, None]
            b_p = b_p_new.to(dtype)

        stage = (n_key_tiles - 1) % STAGES
        mbarrier.wait(v_ready.index(stage), (n_key_tiles - 1) // STAGES & 1)  # until the last V
        n_last = k_end - k_begin - (n_key_tiles - 1) * BN
        v0 = v0_ring.index(stage)  # [BN, D0]
        v1 = v1_ring.index(stage)  # [BN, D1]
        if n_last < BN:
            # both partitions write the same values, so neither waits for the other
            _clear_rows(v0, n_last, D0, BN)
            _clear_rows(v1, n_last, D1, BN)
            fence_for_wgmma()
        b_p0 = gl.convert_layout(b_p, P0)  # [ROWS, BN]
        b_p1 = gl.convert_layout(b_p, P1)  # [ROWS, BN]
        acc0 = warpgroup_mma(b_p0, v0, acc0, is_async=True)
        acc1 = warpgroup_mma(b_p1, v1, acc1, is_async=True)
        acc0, acc1, b_p0, b_p1 = warpgroup_mma_wait(
            num_outstanding=0, deps=(acc0, acc1, b_p0, b_p1)
        )

        p_out = out + row_begin * (H * D) + i_head * D
        scale0 = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O0))  # [ROWS]
        scale1 = gl.convert_layout(1.0 / l, gl.SliceLayout(1, O1))  # [ROWS]
        o_row0 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O0))[:, None]  # [ROWS, 1]
        o_row1 = gl.arange(0, ROWS, layout=gl.SliceLayout(1, O1))[:, None]  # [ROWS, 1]
        o_dim0 = gl.arange(0, D0, layout=gl.SliceLayout(0, O0))[None, :]  # [1, D0]
        o_dim1 = D0 + gl.arange(0, D1, layout=gl.SliceLayout(0, O1))[None, :]  # [1, D1]
        b_out0 = (acc0 * scale0[:, None]).to(dtype)  # [ROWS, D0]
        b_out1 = (acc1 * scale1[:, None]).to(dtype)  # [ROWS, D1]
        gl.store(p_out + o_row0 * (H * D) + o_dim0, b_out0, mask=o_row0 < n_rows)
        gl.store(p_out + o_row1 * (H * D) + o_dim1, b_out1, mask=o_row1 < n_rows)


@gluon.jit(do_not_specialize=["n_tiles"])
def _full_attention(
    tiles, n_tiles, qkv, cos, sin, axis_index, k0, k1, v0, v1, out, scale_log2e,
    H: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Attend for a query tile of one head. A head's tiles run together and share keys in L2."""
    dtype: gl.constexpr = qkv.dtype.element_ty
    Q0: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D0], dtype)
    Q1: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D1], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q0_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, D0], Q0)
    q1_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, D1], Q1)
    k0_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D0], k0.layout)
    k1_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], k1.layout)
    v0_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D0], v0.layout)
    v1_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, D1], v1.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)  # the other partition arrives here
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)  # the load partition arrives, with bytes
        mbarrier.init(k_empty.index(stage), count=2)  # both MMA partitions arrive
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    descs = (k0, k1, v0, v1)
    q_buffers = (q0_buffers, q1_buffers)
    buffers = (k0_ring, k1_ring, v0_ring, v1_ring)
    barriers = (k_ready, k_empty, v_ready, v_empty, turns)
    rope = (cos, sin, axis_index)
    gl.warp_specialize([
        (_mma_partition, (tiles, n_tiles, qkv, rope, out, scale_log2e, q_buffers, buffers, barriers,
                          H, 0)),
        (_mma_partition, (tiles, n_tiles, qkv, rope, out, scale_log2e, q_buffers, buffers, barriers,
                          H, 1)),
        (_load_partition, (tiles, n_tiles, descs, buffers, barriers, H)),
    ], [4, 1], [232, 40])  # fmt: skip
    hold_barriers(barriers)


@gluon.jit
def _store_rows(
    p_out, b_out, n_rows, D_BLOCK: gl.constexpr, ROW_STRIDE: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    DIMS: gl.constexpr = _dims_layout(D_BLOCK)
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, DIMS))[:, None]  # [ROWS, 1]
    o_dim = gl.arange(0, D_BLOCK, layout=gl.SliceLayout(0, DIMS))[None, :]  # [1, D_BLOCK]
    gl.store(p_out + o_row * ROW_STRIDE + o_dim, b_out, mask=o_row < n_rows)


@gluon.jit
def _window_attention(
    tiles, rows0, rows1, cos, sin, axis_index, out, scale_log2e,
    H: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Attend within one window of one head. Heads vary fastest, as in memory."""
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
    # one barrier each for Q, K and V: all threads wait there for the bytes
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(ready.index(i), count=1)
    q_begin = gl.load(p_tile)
    n_rows = gl.load(p_tile + 1) - q_begin
    row_begin = q_begin.to(gl.int64)
    if n_rows > 0:  # else a padding tile
        rope = (cos, sin, axis_index)
        # The previous kernel writes only Q, K and V; tiles and angles are older.
        angles0 = _angles(rope, row_begin, n_rows, 0, D0, D, ROWS)
        angles1 = _angles(rope, row_begin, n_rows, D0, D1, D, ROWS)
        gdc_wait()  # wait for the previous kernel, which writes Q, K and V
        gdc_launch_dependents()
        for i in gl.static_range(3):
            mbarrier.expect(ready.index(i), ROWS * D * 2)
            column = (i * H + i_head) * D
            copy_to_shared(rows0, [q_begin, column], ready.index(i), main.index(i))
            copy_to_shared(rows1, [q_begin, column + D0], ready.index(i), tail.index(i))
        q0, k0, v0 = main.index(0), main.index(1), main.index(2)  # [ROWS, D0] each
        q1, k1, v1 = tail.index(0), tail.index(1), tail.index(2)  # [ROWS, D1] each
        mbarrier.wait(ready.index(0), 0)  # until Q has arrived
        q0.store((_rotated(q0.load(DIMS0), angles0, D0, ROWS) * scale_log2e).to(dtype))
        q1.store((_rotated(q1.load(DIMS1), angles1, D1, ROWS) * scale_log2e).to(dtype))
        mbarrier.wait(ready.index(1), 0)  # until K has arrived
        k0.store(_rotated(k0.load(DIMS0), angles0, D0, ROWS).to(dtype))
        k1.store(_rotated(k1.load(DIMS1), angles1, D1, ROWS).to(dtype))
        fence_for_wgmma()

        zeros = gl.zeros([ROWS, ROWS], gl.float32, S)  # [ROWS, ROWS]
        b_scores = warpgroup_mma(q0, k0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_scores = warpgroup_mma(q1, k1.permute((1, 0)), b_scores, is_async=True)  # [ROWS, ROWS]
        b_scores = warpgroup_mma_wait(num_outstanding=0, deps=(b_scores,))
        o_k = gl.arange(0, ROWS, layout=gl.SliceLayout(0, S))  # [ROWS]
        b_scores = gl.where(o_k[None, :] < n_rows, b_scores, -float("inf"))
        b_p = gl.exp2(b_scores - gl.max(b_scores, 1)[:, None])  # [ROWS, ROWS]
        scale = 1.0 / gl.sum(b_p, 1)  # [ROWS]
        b_p = b_p.to(dtype)

        mbarrier.wait(ready.index(2), 0)  # until V has arrived
        if n_rows < ROWS:
            _clear_rows(v0, n_rows, D0, ROWS)
            _clear_rows(v1, n_rows, D1, ROWS)
            fence_for_wgmma()
        b_p0 = gl.convert_layout(b_p, gl.DotOperandLayout(0, O0, 2))  # [ROWS, ROWS]
        b_p1 = gl.convert_layout(b_p, gl.DotOperandLayout(0, O1, 2))  # [ROWS, ROWS]
        acc0 = gl.zeros([ROWS, D0], gl.float32, O0)  # [ROWS, D0]
        acc1 = gl.zeros([ROWS, D1], gl.float32, O1)  # [ROWS, D1]
        acc0 = warpgroup_mma(b_p0, v0, acc0, use_acc=False, is_async=True)
        acc1 = warpgroup_mma(b_p1, v1, acc1, use_acc=False, is_async=True)
        acc0, acc1, b_p0, b_p1 = warpgroup_mma_wait(
            num_outstanding=0, deps=(acc0, acc1, b_p0, b_p1)
        )

        # store through Q's shared memory, so that a thread writes 16 bytes at a time
        q0.store((acc0 * gl.convert_layout(scale, gl.SliceLayout(1, O0))[:, None]).to(dtype))
        q1.store((acc1 * gl.convert_layout(scale, gl.SliceLayout(1, O1))[:, None]).to(dtype))
        p_out = out + row_begin * (H * D) + i_head * D
        _store_rows(p_out, q0.load(DIMS0), n_rows, D0, H * D, ROWS)
        _store_rows(p_out + D0, q1.load(DIMS1), n_rows, D1, H * D, ROWS)
    hold_barriers((ready,))


def supports(qkv: torch.Tensor, is_axial: bool, adjacent_pairs: bool) -> bool:
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
    """Fill `out` (N, H, D) with full attention. `k_rotated` (N, H, D) are the keys after RoPE.

    Only `tools.tune` changes `k_rows` and `num_stages`.
    """
    N, _, H, D = qkv.shape
    keys, values = k_rotated.view(N, H * D), qkv.view(N, 3 * H * D)
    with torch.cuda.device(qkv.device):
        _full_attention[(len(tiles) * H,)](
            tiles, len(tiles), qkv, cos, sin, axis_index, descriptor(keys, [k_rows, MAIN]),
            descriptor(keys, [k_rows, TAIL]), descriptor(values, [k_rows, MAIN]),
            descriptor(values, [k_rows, TAIL]), out, scale_log2e, H=H, D0=MAIN, D1=TAIL,
            BN=k_rows, STAGES=num_stages, ROWS=Q_ROWS // 2, num_warps=4, launch_pdl=True,
            **LAUNCH,
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
    """Fill `out` (N, H, D) with window attention, for segments of at most W_ROWS rows.

    The previous kernel may write `qkv` but no other argument, because this kernel reads the others
    before the previous kernel has ended. At least one tile must have rows.
    """
    N, _, H, D = qkv.shape
    rows = qkv.view(N, 3 * H * D)
    with torch.cuda.device(qkv.device):
        _window_attention[(len(tiles) * H,)](
            tiles, descriptor(rows, [W_ROWS, MAIN]), descriptor(rows, [W_ROWS, TAIL]), cos, sin,
            axis_index, out, scale_log2e, H=H, D=D, D0=MAIN, D1=TAIL, ROWS=W_ROWS, num_warps=4,
            launch_pdl=True, **LAUNCH,
        )  # fmt: skip
