"""Compute variable-length flash attention with 2D RoPE in registers, with three Triton kernels.

`_window_attention` handles segments whose keys fit one tile, so the keys are the query rows. The
kernel applies RoPE to Q and K, with the same angles, as it loads them.

`_full_attention` handles segments of any length, and loops over tiles of keys. The kernel applies
RoPE to Q as it loads Q, which stays in registers. `_rotate_keys` applies RoPE to K once beforehand.
Inside the key loop, each query tile would repeat that work and, on Hopper, the assembler would
serialise the loop's matrix instructions.

The kernels read Q, K and V in place from the fused QKV projection. On a GPU, they split the head
dim into a main part and a tail, both powers of two (80 = 64 + 16), because padding 80 to 128 would
waste multiply-adds. On Hopper, `attention_hopper` replaces both attention kernels in bf16 for the
published head dim.

The prefixes are `b_` for blocks, `p_` for pointers, `m_` for masks and `o_` for offsets. A comment
gives each block's shape. These tuples group related values: rope = (cos, sin, axis_index),
angles = (b_cos, b_sin), q = (main, tail), v = (main, tail), state = (m, l, acc0, acc1). On a CPU,
and for a head dim that is a power of two, `q` and `v` have no tail.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qwen_vit.kernels import IS_KNOWN_GLUON, TRITON_VERSION, uses_hopper_kernels
from qwen_vit.kernels.interpret import interpreted
from qwen_vit.kernels.launch import LAUNCH
from qwen_vit.layout import Segments, SegmentTiling

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import attention_hopper

__all__ = ["HEAD_DIMS", "RotaryTable", "attention", "tiling"]

LOG2_E = 1.4426950408889634  # exp(x) == exp2(x * LOG2_E), and the GPU has exp2


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Store the RoPE cosines and sines, and each token's index into them.

    An axial table has shape (positions, R / 2). A token's first R / 2 pairs use the table row
    `index[token, 0]`, the patch row. The other pairs use the table row `index[token, 1]`, the patch
    column. A table per token has shape (N, R), and its `index` is None.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    index: torch.Tensor | None = None

    def per_token(self) -> "RotaryTable":
        if self.index is None:
            return self
        rows = self.index.long()
        return RotaryTable(self.cos[rows].flatten(1), self.sin[rows].flatten(1))


@dataclass(frozen=True, slots=True)
class AttentionTile:
    q_rows: int
    k_rows: int
    num_warps: int
    num_stages: int


# 128 query rows on 4 warps fill every register. The code of Triton 3.8 and newer needs more: the
# assembler spills up to 376 bytes, or serialises the matrix instructions (C7512).
FULL_WARPS = 4 if TRITON_VERSION < (3, 8) else 8

# (kind, bits per element) -> tile. Measured on an H200; see docs/decisions.
TILES = {
    ("window", 16): AttentionTile(q_rows=64, k_rows=64, num_warps=4, num_stages=1),
    ("window", 32): AttentionTile(q_rows=64, k_rows=64, num_warps=8, num_stages=1),
    ("full", 16): AttentionTile(q_rows=128, k_rows=64, num_warps=FULL_WARPS, num_stages=3),
    ("full", 32): AttentionTile(q_rows=32, k_rows=32, num_warps=4, num_stages=1),
}
ROTATION_ROWS = 64
# On a CPU a tile has its segment's size, up to these rows and keys. The interpreter groups programs
# up to this number of scores. Measured on 2 cores; see docs/decisions.
CPU_ROWS, CPU_KEYS, CPU_SCORES = 1024, 1024, 1 << 19
# Limits on the head dim. On a GPU, matrix instructions set the minimum. The maximum keeps tiles
# within every GPU of capability >= 8.0. On a CPU, the tests cover this range.
HEAD_DIMS = {"cuda": (16, 128), "cpu": (2, 1024)}


@triton.jit
def _angles(
    rope, row_begin, m_row,
    D_BEGIN: tl.constexpr, D_BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Load cosines and sines of ROWS rows from `row_begin`, in the layout that `_rotated` needs."""
    cos, sin, axis_index = rope
    R: tl.constexpr = D // 2
    o_row = tl.arange(0, ROWS)  # [ROWS]
    if ADJACENT:  # PAIRS = D_BLOCK / 2: one angle for both dims of a pair
        o_pair = D_BEGIN // 2 + tl.arange(0, D_BLOCK // 2)  # [PAIRS]
        m_pair = o_pair < R
    else:  # PAIRS = D_BLOCK
        o_dim = D_BEGIN + tl.arange(0, D_BLOCK)  # [PAIRS]
        o_pair = o_dim % R
        m_pair = o_dim < D
    m_angle = m_row[:, None]  # [ROWS, 1]
    if D_BEGIN + D_BLOCK > D:
        m_angle = m_angle & m_pair[None, :]  # [ROWS, PAIRS]
    if AXIAL:
        A: tl.constexpr = R // 2
        p_axis = axis_index + row_begin * 2 + o_row[:, None] * 2 + (o_pair // A)[None, :]
        b_axis = tl.load(p_axis, mask=m_angle, other=0)  # [ROWS, PAIRS]
        o_angle = b_axis * A + (o_pair % A)[None, :]
    else:
        cos += row_begin * R
        sin += row_begin * R
        o_angle = o_row[:, None] * R + o_pair[None, :]  # [ROWS, PAIRS]
    b_cos = tl.load(cos + o_angle, mask=m_angle, other=0.0)  # [ROWS, PAIRS]
    b_sin = tl.load(sin + o_angle, mask=m_angle, other=0.0)  # [ROWS, PAIRS]
    if not ADJACENT:
        b_sin = tl.where((o_dim < R)[None, :], -b_sin, b_sin)
    return b_cos, b_sin


@triton.jit
def _rotated(
    base, m_row, angles,
    D_BEGIN: tl.constexpr, D_BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Load dims D_BEGIN to D_BEGIN + D_BLOCK of the rows at `base`, and apply RoPE in fp32."""
    b_cos, b_sin = angles
    o_row = tl.arange(0, ROWS)  # [ROWS]
    o_dim = D_BEGIN + tl.arange(0, D_BLOCK)  # [D_BLOCK]
    m_x = m_row[:, None]  # [ROWS, 1]
    if D_BEGIN + D_BLOCK > D:
        m_x = m_x & (o_dim < D)[None, :]  # [ROWS, D_BLOCK]
    p_row = base + o_row[:, None] * ROW_STRIDE  # [ROWS, 1]
    b_x = tl.load(p_row + o_dim[None, :], mask=m_x, other=0.0)  # [ROWS, D_BLOCK]
    b_x = b_x.to(tl.float32)
    if ADJACENT:  # pair j is dims (2j, 2j + 1): both are in this thread's registers
        b_pairs = tl.reshape(b_x, (ROWS, D_BLOCK // 2, 2))
        b_first, b_second = tl.split(b_pairs)  # [ROWS, D_BLOCK / 2] each
        b_pairs = tl.join(
            b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin
        )  # [ROWS, D_BLOCK / 2, 2]
        b_x = tl.reshape(b_pairs, (ROWS, D_BLOCK))
    else:  # rotate-half: pair j is dims (j, j + R)
        o_partner = (o_dim + D // 2) % D
        b_partner = tl.load(p_row + o_partner[None, :], mask=m_x, other=0.0)  # [ROWS, D_BLOCK]
        b_x = b_x * b_cos + b_partner.to(tl.float32) * b_sin
    return b_x


@triton.jit(do_not_specialize=["n_rows"])
def _rotate_keys(
    qkv, k_rotated, cos, sin, axis_index, n_rows,
    H: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0) % H
    row_begin = (tl.program_id(0) // H * BN).to(tl.int64)
    o_row = tl.arange(0, BN)  # [BN]
    m_row = o_row < n_rows - row_begin
    o_dim = tl.arange(0, D_PADDED)  # [D_PADDED]
    rope = (cos, sin, axis_index)
    angles = _angles(rope, row_begin, m_row, 0, D_PADDED, D, BN, AXIAL, ADJACENT)
    base = qkv + row_begin * (3 * H * D) + (H + i_head) * D
    b_k = _rotated(base, m_row, angles, 0, D_PADDED, D, BN, 3 * H * D, ADJACENT)  # [BN, D_PADDED]
    p_k = k_rotated + row_begin * (H * D) + (o_row[:, None] * H + i_head) * D + o_dim[None, :]
    m_k = m_row[:, None] & (o_dim < D)[None, :]  # [BN, D_PADDED]
    tl.store(p_k, b_k.to(k_rotated.dtype.element_ty), mask=m_k)


@triton.jit
def _load(
    p_row, m_row,
    D_BEGIN: tl.constexpr, D_BLOCK: tl.constexpr, D: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load dims D_BEGIN to D_BEGIN + D_BLOCK of the rows at `p_row` [ROWS, 1], 0 where masked."""
    o_dim = D_BEGIN + tl.arange(0, D_BLOCK)  # [D_BLOCK]
    m_x = m_row[:, None]  # [ROWS, 1]
    if D_BEGIN + D_BLOCK > D:
        m_x = m_x & (o_dim < D)[None, :]  # [ROWS, D_BLOCK]
    if MASK_ROWS or D_BEGIN + D_BLOCK > D:
        b_x = tl.load(p_row + o_dim[None, :], mask=m_x, other=0.0)  # [ROWS, D_BLOCK]
    else:
        b_x = tl.load(p_row + o_dim[None, :])  # [ROWS, D_BLOCK]
    return b_x


@triton.jit
def _first_state(BM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Return (m, l, acc0, acc1) before any key: row maxima, sums of weights, weighted values."""
    m = tl.full([BM], -float("inf"), tl.float32)  # [BM]
    l = tl.full([BM], 0.0, tl.float32)  # [BM]
    acc0 = tl.full([BM, D0], 0.0, tl.float32)  # [BM, D0]
    acc1 = tl.full([BM, D1 if D1 > 0 else 16], 0.0, tl.float32)  # [BM, D1]
    return m, l, acc0, acc1


@triton.jit
def _next_state(state, b_scores, v):
    """Return the online softmax's state after one more key tile, whose values are `v`."""
    m, l, acc0, acc1 = state
    m_new = tl.maximum(m, tl.reduce(b_scores, 1, tl.standard._elementwise_max))  # [BM]
    b_p = tl.exp2(b_scores - m_new[:, None])  # [BM, BN]
    rescale = tl.exp2(m - m_new)  # [BM]
    l = l * rescale + tl.reduce(b_p, 1, tl.standard._sum_combine)
    b_p = b_p.to(v[0].dtype)
    acc0 = tl.dot(b_p, v[0], acc0 * rescale[:, None], input_precision="ieee")  # [BM, D0]
    if len(v) > 1:
        acc1 = tl.dot(b_p, v[1], acc1 * rescale[:, None], input_precision="ieee")  # [BM, D1]
    return m_new, l, acc0, acc1


@triton.jit
def _store(
    out, state, q_begin, m_q, i_head,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    _, l, acc0, acc1 = state
    scale = (1.0 / l)[:, None]  # [BM, 1]
    o_d0 = tl.arange(0, D0)  # [D0]
    p_out = out + q_begin * (H * D) + (tl.arange(0, BM)[:, None] * H + i_head) * D  # [BM, 1]
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(p_out + o_d0[None, :], (acc0 * scale).to(dtype), mask=m_q[:, None])
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)  # [D1]
        m_out = m_q[:, None] & (o_d1 < D)[None, :]  # [BM, D1]
        tl.store(p_out + o_d1[None, :], (acc1 * scale).to(dtype), mask=m_out)


@triton.jit
def _ranges_of_program(tiles, H: tl.constexpr):
    """Return where a program's query rows and key rows begin and end. A padding tile has no rows.

    Each (tile, head) has one program. Heads vary fastest, so that neighbouring programs share a
    row's cache lines. A tile's start is int64, and rows inside the tile are int32.
    """
    p_tile = tiles + (tl.program_id(0) // H).to(tl.int64) * 4
    q_begin = tl.load(p_tile).to(tl.int64)
    q_end = tl.load(p_tile + 1).to(tl.int64)
    k_begin = tl.load(p_tile + 2).to(tl.int64)
    k_end = tl.load(p_tile + 3).to(tl.int64)
    return q_begin, q_end, k_begin, k_end


@triton.jit
def _window_attention(
    qkv, cos, sin, axis_index, tiles, out, scale_log2e,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Compute softmax(rope(Q) rope(K)^T * scale) V for a tile's head. Q, K and V come from the same
    rows.

    qkv (N, 3, H, D); tiles (T, 4); out (N, H, D).
    """
    dtype: tl.constexpr = qkv.dtype.element_ty
    ROW_STRIDE: tl.constexpr = 3 * H * D
    i_head = tl.program_id(0) % H
    q_begin, q_end, k_begin, k_end = _ranges_of_program(tiles, H)
    if q_begin >= q_end:  # a padding tile
        return
    o_row = tl.arange(0, BM)  # [BM]
    m_q = o_row < q_end - q_begin
    rope = (cos, sin, axis_index)

    # Q, rotated and scaled in fp32, then rounded once
    q_base = qkv + q_begin * ROW_STRIDE + i_head * D
    angles0 = _angles(rope, q_begin, m_q, 0, D0, D, BM, AXIAL, ADJACENT)
    b_q0 = _rotated(q_base, m_q, angles0, 0, D0, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D0]
    b_q0 = (b_q0 * scale_log2e).to(dtype)
    if D1 > 0:
        angles1 = _angles(rope, q_begin, m_q, D0, D1, D, BM, AXIAL, ADJACENT)
        b_q1 = _rotated(q_base, m_q, angles1, D0, D1, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D1]
        b_q1 = (b_q1 * scale_log2e).to(dtype)
    state = _first_state(BM, D0, D1)

    m_k = o_row < k_end - k_begin
    k_base = qkv + k_begin * ROW_STRIDE + (H + i_head) * D
    # V first, for the reason in `_attend_to_keys`
    p_v = k_base + H * D + o_row[:, None] * ROW_STRIDE  # [BM, 1]
    v = (_load(p_v, m_k, 0, D0, D, True),)  # [BM, D0]
    if D1 > 0:
        v = (v[0], _load(p_v, m_k, D0, D1, D, True))  # type: ignore[assignment]
    b_k0 = _rotated(k_base, m_k, angles0, 0, D0, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D0]
    b_scores = tl.dot(b_q0, tl.trans(b_k0.to(dtype)), input_precision="ieee")  # [BM, BM]
    if D1 > 0:
        b_k1 = _rotated(k_base, m_k, angles1, D0, D1, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D1]
        b_scores = tl.dot(b_q1, tl.trans(b_k1.to(dtype)), b_scores, input_precision="ieee")
    b_scores = tl.where(m_k[None, :], b_scores, -float("inf"))
    state = _next_state(state, b_scores, v)
    _store(out, state, q_begin, m_q, i_head, H, D, D0, D1, BM)


@triton.jit
def _attend_to_keys(
    q, state, keys, k_begin, k_end, i_head,
    H: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Return the state after one more tile of keys. MASK_ROWS ignores keys at rows >= `k_end`."""
    k_rotated, qkv = keys
    D0: tl.constexpr = q[0].shape[1]
    D1: tl.constexpr = q[1].shape[1] if len(q) > 1 else 0
    ROW_STRIDE: tl.constexpr = 3 * H * D
    o_k = tl.arange(0, BN)  # [BN]
    m_k = o_k < k_end - k_begin
    # V first, so that every tile of this step has its own shared memory. If a tail reuses the
    # memory of its main part, ptxas 12.8 builds a wrong address for it (docs/decisions).
    v_base = qkv + k_begin * ROW_STRIDE + (H + i_head) * D + H * D
    p_v = v_base + o_k[:, None] * ROW_STRIDE  # [BN, 1]
    v = (_load(p_v, m_k, 0, D0, D, MASK_ROWS),)  # [BN, D0]
    if len(q) > 1:
        v = (v[0], _load(p_v, m_k, D0, D1, D, MASK_ROWS))  # type: ignore[assignment]
    p_k = k_rotated + k_begin * (H * D) + i_head * D + o_k[:, None] * (H * D)  # [BN, 1]
    b_k0 = _load(p_k, m_k, 0, D0, D, MASK_ROWS)  # [BN, D0]
    b_scores = tl.dot(q[0], tl.trans(b_k0), input_precision="ieee")  # [BM, BN]
    if len(q) > 1:
        b_k1 = _load(p_k, m_k, D0, D1, D, MASK_ROWS)  # [BN, D1]
        b_scores = tl.dot(q[1], tl.trans(b_k1), b_scores, input_precision="ieee")
    if MASK_ROWS:
        b_scores = tl.where(m_k[None, :], b_scores, -float("inf"))
    return _next_state(state, b_scores, v)


@triton.jit
def _full_attention(
    qkv, k_rotated, cos, sin, axis_index, tiles, out, scale_log2e,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute softmax(rope(Q) rope(K)^T * scale) V for a query tile's head, over tiles of keys.

    qkv (N, 3, H, D) gives Q and V; k_rotated (N, H, D); tiles (T, 4); out (N, H, D).
    """
    dtype: tl.constexpr = qkv.dtype.element_ty
    ROW_STRIDE: tl.constexpr = 3 * H * D
    i_head = tl.program_id(0) % H
    q_begin, q_end, k_begin, k_end = _ranges_of_program(tiles, H)
    if q_begin >= q_end:  # a padding tile
        return
    o_q = tl.arange(0, BM)  # [BM]
    m_q = o_q < q_end - q_begin
    rope = (cos, sin, axis_index)

    # Q, rotated and scaled in fp32, then rounded once
    q_base = qkv + q_begin * ROW_STRIDE + i_head * D
    angles = _angles(rope, q_begin, m_q, 0, D0, D, BM, AXIAL, ADJACENT)
    b_q0 = _rotated(q_base, m_q, angles, 0, D0, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D0]
    q = ((b_q0 * scale_log2e).to(dtype),)
    if D1 > 0:
        angles = _angles(rope, q_begin, m_q, D0, D1, D, BM, AXIAL, ADJACENT)
        b_q1 = _rotated(q_base, m_q, angles, D0, D1, D, BM, ROW_STRIDE, ADJACENT)  # [BM, D1]
        q = (q[0], (b_q1 * scale_log2e).to(dtype))  # type: ignore[assignment]
    state = _first_state(BM, D0, D1)

    keys = (k_rotated, qkv)
    k_last = k_begin + (k_end - k_begin - 1) // BN * BN
    for k_tile in range(k_begin, k_last, BN):  # whole tiles need no mask
        state = _attend_to_keys(q, state, keys, k_tile, k_end, i_head, H, D, BN, False)
    state = _attend_to_keys(q, state, keys, k_last, k_end, i_head, H, D, BN, True)
    _store(out, state, q_begin, m_q, i_head, H, D, D0, D1, BM)


def tiling(device: torch.device, dtype: torch.dtype, kind: str) -> SegmentTiling:
    """Return how layouts for this device must cut segments of a kind, `window` or `full`, into
    tiles."""
    if device.type == "cpu":
        return SegmentTiling(rows=CPU_ROWS)
    return SegmentTiling(rows=TILES[kind, dtype.itemsize * 8].q_rows)


def kind_of(segment_rows: int) -> str:
    """Return `window` if segments of at most `segment_rows` rows fit one key tile, else `full`.

    The limit comes from the configuration. If the choice depended on the segments' lengths, an
    image's result would depend on the other images in its batch.
    """
    return "window" if segment_rows <= TILES["window", 16].k_rows else "full"


def attention(
    qkv: torch.Tensor,
    rotary: RotaryTable,
    segments: Segments,
    *,
    kind: str,
    adjacent_pairs: bool,
    tiles: AttentionTile | None = None,
) -> torch.Tensor:
    """Apply RoPE to Q and K, and attend within segments: (N, 3, H, D) to (N, H, D).

    With `adjacent_pairs`, rotary pair j of Q and K is at dims (2j, 2j + 1) instead of (j, j + D /
    2). The kernels do not write rows that no tile covers. Benchmarks and GPU tests use `tiles` to
    run the Triton kernel with a different tile. The caller must then cut `segments` for this tile.
    """
    N, _, H, D = qkv.shape
    out = torch.empty((N, H, D), dtype=qkv.dtype, device=qkv.device)
    if N == 0 or len(segments.tiles) == 0:
        return out
    if qkv.device.type == "cpu":
        _attend_on_cpu(qkv, rotary.per_token(), segments.tiles, out, adjacent_pairs)
        return out
    tables = _tables(rotary)
    scale_log2e = D**-0.5 * LOG2_E
    k_rotated: tuple[torch.Tensor, ...] = ()
    if kind == "full":
        k_rotated = (rotated_keys(qkv, rotary, adjacent_pairs=adjacent_pairs),)
    is_axial = rotary.index is not None
    if (
        uses_hopper_kernels()
        and tiles is None
        and attention_hopper.supports(qkv, is_axial, adjacent_pairs)
    ):
        run: Any = attention_hopper.full_attention
        if kind == "window":
            run = attention_hopper.window_attention
        run(qkv, *k_rotated, *tables, segments.tiles, out, scale_log2e)
        return out
    used = tiles or TILES[kind, qkv.dtype.itemsize * 8]
    d_main = 1 << (D.bit_length() - 1)
    d_tail = 0 if d_main == D else max(16, triton.next_power_of_2(D - d_main))
    options = {
        "H": H, "D": D, "D0": d_main, "D1": d_tail, "AXIAL": is_axial, "ADJACENT": adjacent_pairs,
        "BM": used.q_rows, "num_warps": used.num_warps, "num_stages": used.num_stages,
    }  # fmt: skip
    if kind == "full":
        options["BN"] = used.k_rows
    kernel = _full_attention if kind == "full" else _window_attention
    with torch.cuda.device(qkv.device):
        kernel[(len(segments.tiles) * H,)](
            qkv, *k_rotated, *tables, segments.tiles, out, scale_log2e, **options, **LAUNCH
        )
    return out


def _attend_on_cpu(
    qkv: torch.Tensor,
    rotary: RotaryTable,
    tiles: torch.Tensor,
    out: torch.Tensor,
    adjacent_pairs: bool,
) -> None:
    N, _, H, D = qkv.shape
    tables = _tables(rotary)
    options = {"H": H, "D": D, "AXIAL": False, "ADJACENT": adjacent_pairs}
    sizes = torch.stack((tiles[:, 1] - tiles[:, 0], tiles[:, 3] - tiles[:, 2]), dim=1)
    k_rotated: tuple[torch.Tensor, ...] = ()
    for size in sizes.unique(dim=0):
        q_rows, k_rows = map(int, size)
        of_size = tiles[(sizes == size).all(1)]
        used = options | {"BM": q_rows, "D0": D, "D1": 0}
        if q_rows == k_rows:  # the tile is its whole segment
            _interpreted(_window_attention)(
                (len(of_size) * H,), qkv, *tables, of_size, out, D**-0.5 * LOG2_E, **used,
                lanes=max(1, CPU_SCORES // q_rows**2),
            )  # fmt: skip
            continue
        if not k_rotated:
            k_rotated = (torch.empty((N, H, D), dtype=qkv.dtype, device=qkv.device),)
            _interpreted(_rotate_keys)(
                (H,), qkv, *k_rotated, *tables, N, **options, D_PADDED=D, BN=N, lanes=H
            )
        keys = triton.cdiv(k_rows, triton.cdiv(k_rows, CPU_KEYS))
        _interpreted(_full_attention)(
            (len(of_size) * H,), qkv, *k_rotated, *tables, of_size, out, D**-0.5 * LOG2_E, **used,
            BN=keys, lanes=max(1, CPU_SCORES // (q_rows * keys)),
        )  # fmt: skip


def _tables(rotary: RotaryTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the kernels' RoPE arguments. Without an index, the kernels receive `cos` in its place,
    and do not read it."""
    return rotary.cos, rotary.sin, rotary.cos if rotary.index is None else rotary.index


def rotated_keys(qkv: torch.Tensor, rotary: RotaryTable, *, adjacent_pairs: bool) -> torch.Tensor:
    """Apply RoPE to K of every row on a GPU, and round once: (N, 3, H, D) to (N, H, D)."""
    N, _, H, D = qkv.shape
    k_rotated = torch.empty((N, H, D), dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device(qkv.device):
        _rotate_keys[(triton.cdiv(N, ROTATION_ROWS) * H,)](
            qkv, k_rotated, *_tables(rotary), N, H=H, D=D, D_PADDED=triton.next_power_of_2(D),
            AXIAL=rotary.index is not None, ADJACENT=adjacent_pairs, BN=ROTATION_ROWS,
            **LAUNCH,
        )  # fmt: skip
    return k_rotated


_interpreted = cache(interpreted)
