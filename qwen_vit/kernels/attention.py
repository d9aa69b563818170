"""The one attention: a variable-length Triton flash attention with 2D RoPE in registers.

One kernel, two kinds. In a *window* all keys fit one tile: Q and K are rotated while they load, and
the softmax needs no running maximum. Over a whole *frame* the keys are many tiles. Q is rotated
while it loads and stays in registers. K is rotated once beforehand: inside the key loop the work
would repeat for every query tile, and on Hopper the assembler would serialise the matrix
instructions.

The kernel reads Q, K and V in place from the fused QKV projection. The head dim is cut into a main
part, a power of two, and a tail (80 = 64 + 16), so that no multiply-add is spent on padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qwen_vit.kernels import IS_KNOWN_GLUON
from qwen_vit.kernels.interpret import interpreted
from qwen_vit.layout import Segments, SegmentTiling

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import attention_hopper

__all__ = ["HEAD_DIMS", "RotaryTable", "attention", "tiling"]

LOG2_E = 1.4426950408889634  # exp(x) == exp2(x * LOG2_E), and the GPU has exp2


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines, and each token's index into them.

    Axial: (positions, R / 2) per axis; pair j of a token reads row `index[token, 0]` for the first
    R / 2 pairs (the patch row) and `index[token, 1]` for the others (the patch column).
    Per token: (N, R), with `index` None.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    index: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """One reviewed row: the shape of a tile, and how the compiler schedules it."""

    q_rows: int
    k_rows: int
    num_warps: int
    num_stages: int


# (kind, bits per element) -> tile. Measured on an H200; see docs/decisions.
TILES = {
    ("window", 16): AttentionTile(q_rows=64, k_rows=64, num_warps=4, num_stages=1),
    ("window", 32): AttentionTile(q_rows=64, k_rows=64, num_warps=8, num_stages=1),
    ("full", 16): AttentionTile(q_rows=128, k_rows=64, num_warps=4, num_stages=3),
    ("full", 32): AttentionTile(q_rows=32, k_rows=32, num_warps=4, num_stages=1),
}
INTERPRETED_ROWS = 1024  # in the interpreter a program costs milliseconds, however small its tile
ROTATION_ROWS = 64
# The limits of head dims. On a GPU the matrix instructions set the least, and the tiles that fit
# every GPU from capability 8.0 on set the most. In the interpreter a tile has at most 2^20
# elements.
HEAD_DIMS = {"cuda": (16, 128), "cpu": (2, 1024)}


@triton.jit
def _angles(
    cos, sin, axis_index, row_begin, m_row,
    D_BEGIN: tl.constexpr, D_BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Cosines and sines for ROWS rows from `row_begin`, as `_rotated_tile` multiplies them."""
    R: tl.constexpr = D // 2
    o_row = tl.arange(0, ROWS)
    if ADJACENT:  # [ROWS, D_BLOCK / 2]: one angle for both dims of a pair
        o_pair = D_BEGIN // 2 + tl.arange(0, D_BLOCK // 2)
        m_pair = o_pair < R
    else:  # [ROWS, D_BLOCK]
        o_dim = D_BEGIN + tl.arange(0, D_BLOCK)
        o_pair = o_dim % R
        m_pair = o_dim < D
    m_tile = m_row[:, None]
    if D_BEGIN + D_BLOCK > D:
        m_tile = m_tile & m_pair[None, :]
    if AXIAL:
        A: tl.constexpr = R // 2
        p_axis = axis_index + row_begin * 2 + o_row[:, None] * 2 + (o_pair // A)[None, :]
        o_angle = tl.load(p_axis, mask=m_tile, other=0) * A + (o_pair % A)[None, :]
    else:
        cos += row_begin * R
        sin += row_begin * R
        o_angle = o_row[:, None] * R + o_pair[None, :]
    c = tl.load(cos + o_angle, mask=m_tile, other=0.0)
    s = tl.load(sin + o_angle, mask=m_tile, other=0.0)
    if not ADJACENT:
        s = tl.where((o_dim < R)[None, :], -s, s)
    return c, s


@triton.jit
def _rotated_tile(
    base, m_row, c, s,
    D_BEGIN: tl.constexpr, D_BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    """Dims D_BEGIN to D_BEGIN + D_BLOCK of the rows at `base`, rotated, in fp32."""
    o_row = tl.arange(0, ROWS)
    o_dim = D_BEGIN + tl.arange(0, D_BLOCK)
    m_tile = m_row[:, None]
    if D_BEGIN + D_BLOCK > D:
        m_tile = m_tile & (o_dim < D)[None, :]
    p_row = base + o_row[:, None] * ROW_STRIDE
    x = tl.load(p_row + o_dim[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if ADJACENT:  # pair j is dims (2j, 2j + 1): both are in this thread's registers
        first, second = tl.split(tl.reshape(x, (ROWS, D_BLOCK // 2, 2)))
        rotated = tl.join(first * c - second * s, second * c + first * s)
        x = tl.reshape(rotated, (ROWS, D_BLOCK))
    else:  # rotate-half: pair j is dims (j, j + R)
        o_partner = (o_dim + D // 2) % D
        partner = tl.load(p_row + o_partner[None, :], mask=m_tile, other=0.0)
        x = x * c + partner.to(tl.float32) * s
    return x


@triton.jit(do_not_specialize=["n_rows"])
def _rotate_keys(
    qkv, k_rotated, cos, sin, axis_index, n_rows,
    H: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    AXIAL: tl.constexpr, ADJACENT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """K of every row and head, rotated and rounded once: (N, H, D)."""
    i_head = tl.program_id(0) % H
    row_begin = (tl.program_id(0) // H * BN).to(tl.int64)
    o_row = tl.arange(0, BN)
    m_row = o_row < n_rows - row_begin
    o_dim = tl.arange(0, D_PADDED)
    c, s = _angles(
        cos, sin, axis_index, row_begin, m_row, 0, D_PADDED, D, BN, AXIAL, ADJACENT
    )  # fmt: skip
    base = qkv + row_begin * (3 * H * D) + (H + i_head) * D
    k = _rotated_tile(base, m_row, c, s, 0, D_PADDED, D, BN, 3 * H * D, ADJACENT)
    p_k = k_rotated + row_begin * (H * D) + (o_row[:, None] * H + i_head) * D + o_dim[None, :]
    m_k = m_row[:, None] & (o_dim < D)[None, :]
    tl.store(p_k, k.to(k_rotated.dtype.element_ty), mask=m_k)


@triton.jit
def _only_own_values(v, acc, m_same):
    """V without its NaN and infinities; they become NaN in the sums of their own segment's rows."""
    m_bad = v - v != 0  # [BN, D]
    if tl.reduce(tl.reduce(m_bad.to(tl.int32), 1, tl.standard._sum_combine), 0,
                 tl.standard._sum_combine) > 0:  # fmt: skip
        n_bad = tl.dot(m_same.to(tl.float32), m_bad.to(tl.float32))  # [BM, D]
        acc = tl.where(n_bad > 0, float("nan"), acc)
        v = tl.where(m_bad, 0.0, v)
    return v, acc


@triton.jit
def _attend_to_keys(
    q0, q1, m, l, acc0, acc1, c0, s0, c1, s1, seg_q, k_begin, k_end,
    qkv, k_rotated, cos, sin, axis_index, segment_of_row, i_head,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    K_ROTATED: tl.constexpr, ONE_KEY_TILE: tl.constexpr, AXIAL: tl.constexpr,
    ADJACENT: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: scores, running softmax, weighted values."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    ROW_STRIDE: tl.constexpr = 3 * H * D
    DIM_MASK: tl.constexpr = D0 + D1 > D
    o_k = tl.arange(0, BN)
    o_d0 = tl.arange(0, D0)
    m_k = o_k < k_end - k_begin
    k_base = qkv + k_begin * ROW_STRIDE + (H + i_head) * D
    # V first, so that every tile of this step has its own shared memory. If a tail reuses the
    # memory of its main part, ptxas 12.8 builds a wrong address for it (docs/decisions).
    p_v = k_base + H * D + o_k[:, None] * ROW_STRIDE
    if MASK_ROWS:
        v0 = tl.load(p_v + o_d0[None, :], mask=m_k[:, None], other=0.0)
    else:
        v0 = tl.load(p_v + o_d0[None, :])
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_k1 = m_k[:, None] & (o_d1 < D)[None, :]
        if MASK_ROWS or DIM_MASK:
            v1 = tl.load(p_v + o_d1[None, :], mask=m_k1, other=0.0)
        else:
            v1 = tl.load(p_v + o_d1[None, :])

    if K_ROTATED:
        p_k = k_rotated + k_begin * (H * D) + i_head * D + o_k[:, None] * (H * D)
        if MASK_ROWS:
            k0 = tl.load(p_k + o_d0[None, :], mask=m_k[:, None], other=0.0)
        else:
            k0 = tl.load(p_k + o_d0[None, :])
    else:
        if not ONE_KEY_TILE:  # in a window the keys are the query rows, whose angles are loaded
            c0, s0 = _angles(
                cos, sin, axis_index, k_begin, m_k, 0, D0, D, BN, AXIAL, ADJACENT
            )  # fmt: skip
        k0 = _rotated_tile(k_base, m_k, c0, s0, 0, D0, D, BN, ROW_STRIDE, ADJACENT).to(dtype)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BM, BN]
    if D1 > 0:
        if K_ROTATED:
            if MASK_ROWS or DIM_MASK:
                k1 = tl.load(p_k + o_d1[None, :], mask=m_k1, other=0.0)
            else:
                k1 = tl.load(p_k + o_d1[None, :])
        else:
            if not ONE_KEY_TILE:
                c1, s1 = _angles(
                    cos, sin, axis_index, k_begin, m_k, D0, D1, D, BN, AXIAL, ADJACENT
                )  # fmt: skip
            k1 = _rotated_tile(
                k_base, m_k, c1, s1, D0, D1, D, BN, ROW_STRIDE, ADJACENT
            ).to(dtype)  # fmt: skip
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)

    if MASK_SEGMENTS:
        seg_k = tl.load(segment_of_row + k_begin + o_k, mask=m_k, other=-2)
        m_same = seg_q[:, None] == seg_k[None, :]  # [BM, BN]
        s = tl.where(m_same, s, -float("inf"))
        # P is 0 for another segment's keys, but 0 x NaN is NaN: such values must not be summed
        v0, acc0 = _only_own_values(v0, acc0, m_same)
        if D1 > 0:
            v1, acc1 = _only_own_values(v1, acc1, m_same)
    elif MASK_ROWS:
        s = tl.where(m_k[None, :], s, -float("inf"))

    m_new = tl.maximum(m, tl.reduce(s, 1, tl.standard._elementwise_max))
    m_safe = m_new
    if MASK_SEGMENTS:  # a row may have no key in this tile: exp2(-inf - -inf) is NaN
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    l = l * rescale + tl.reduce(p, 1, tl.standard._sum_combine)
    p = p.to(dtype)
    acc0 = tl.dot(p, v0, acc0 * rescale[:, None], input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(p, v1, acc1 * rescale[:, None], input_precision=PRECISION)
    return m_new, l, acc0, acc1


@triton.jit
def _rope_varlen_attention(
    qkv, k_rotated, cos, sin, axis_index, segment_of_row, tiles, out, scale_log2e,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    K_ROTATED: tl.constexpr, ONE_KEY_TILE: tl.constexpr, AXIAL: tl.constexpr,
    ADJACENT: tl.constexpr, MASK_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """softmax(rope(Q) rope(K)^T * scale) V for one query tile of one head.

    qkv (N, 3, H, D); k_rotated (N, H, D), read if K_ROTATED; tiles (T, 4); out (N, H, D). One
    program per (tile, head), head fastest: neighbours share cache lines of a row. Rows are counted
    in int64 up to the start of a tile, and in int32 inside it.
    """
    i_head = tl.program_id(0) % H
    p_tile = tiles + (tl.program_id(0) // H).to(tl.int64) * 4
    q_begin = tl.load(p_tile).to(tl.int64)
    q_end = tl.load(p_tile + 1).to(tl.int64)
    k_begin = tl.load(p_tile + 2).to(tl.int64)
    k_end = tl.load(p_tile + 3).to(tl.int64)
    if q_begin >= q_end:  # a padding tile
        return

    dtype: tl.constexpr = qkv.dtype.element_ty
    ROW_STRIDE: tl.constexpr = 3 * H * D
    o_q = tl.arange(0, BM)
    m_q = o_q < q_end - q_begin

    # Q, rotated and scaled in fp32, then rounded once: [BM, D0] and [BM, D1]
    q_base = qkv + q_begin * ROW_STRIDE + i_head * D
    c0, s0 = _angles(cos, sin, axis_index, q_begin, m_q, 0, D0, D, BM, AXIAL, ADJACENT)
    q0 = _rotated_tile(q_base, m_q, c0, s0, 0, D0, D, BM, ROW_STRIDE, ADJACENT)
    q0 = (q0 * scale_log2e).to(dtype)
    q1, c1, s1 = q0, c0, s0
    if D1 > 0:
        c1, s1 = _angles(cos, sin, axis_index, q_begin, m_q, D0, D1, D, BM, AXIAL, ADJACENT)
        q1 = _rotated_tile(q_base, m_q, c1, s1, D0, D1, D, BM, ROW_STRIDE, ADJACENT)
        q1 = (q1 * scale_log2e).to(dtype)

    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.full([BM], 0.0, tl.float32)
    acc0 = tl.full([BM, D0], 0.0, tl.float32)
    acc1 = tl.full([BM, D1 if D1 > 0 else 16], 0.0, tl.float32)
    seg_q = o_q
    if MASK_SEGMENTS:
        seg_q = tl.load(segment_of_row + q_begin + o_q, mask=m_q, other=-1)

    k_last = k_begin
    if not ONE_KEY_TILE:
        k_last = k_begin + (k_end - k_begin - 1) // BN * BN
        for k_tile in range(k_begin, k_last, BN):  # whole tiles need no mask
            m, l, acc0, acc1 = _attend_to_keys(
                q0, q1, m, l, acc0, acc1, c0, s0, c1, s1, seg_q, k_tile, k_end,
                qkv, k_rotated, cos, sin, axis_index, segment_of_row, i_head,
                H, D, D0, D1, K_ROTATED, ONE_KEY_TILE, AXIAL, ADJACENT, False, MASK_SEGMENTS,
                PRECISION, BN,
            )  # fmt: skip
    m, l, acc0, acc1 = _attend_to_keys(
        q0, q1, m, l, acc0, acc1, c0, s0, c1, s1, seg_q, k_last, k_end,
        qkv, k_rotated, cos, sin, axis_index, segment_of_row, i_head,
        H, D, D0, D1, K_ROTATED, ONE_KEY_TILE, AXIAL, ADJACENT, True, MASK_SEGMENTS,
        PRECISION, BN,
    )  # fmt: skip

    if MASK_SEGMENTS:  # rows from q_end on have no key
        l = tl.where(m_q, l, 1.0)
    scale = (1.0 / l)[:, None]
    o_d0 = tl.arange(0, D0)
    p_out = out + q_begin * (H * D) + (o_q[:, None] * H + i_head) * D
    tl.store(p_out + o_d0[None, :], (acc0 * scale).to(dtype), mask=m_q[:, None])
    if D1 > 0:
        o_d1 = D0 + tl.arange(0, D1)
        m_out = m_q[:, None] & (o_d1 < D)[None, :]
        tl.store(p_out + o_d1[None, :], (acc1 * scale).to(dtype), mask=m_out)


def tiling(device: torch.device, dtype: torch.dtype, kind: str) -> SegmentTiling:
    """How layouts for this device must cut segments of a kind, `window` or `full`."""
    if device.type == "cpu":
        return SegmentTiling(rows=INTERPRETED_ROWS, packs=True)
    return SegmentTiling(rows=TILES[kind, dtype.itemsize * 8].q_rows, packs=False)


def kind_of(segment_rows: int) -> str:
    """`window` if every segment fits one key tile, else `full`.

    The configuration decides, never the data: with a switch by length an image's bits would depend
    on its neighbours.
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
    """Attention within segments, with RoPE applied to Q and K: (N, 3, H, D) -> (N, H, D).

    With `adjacent_pairs`, rotary pair j of Q and K is at dims (2j, 2j + 1) instead of (j, j + D /
    2). Rows that no tile covers are left unwritten. `tiles` is for benchmarks and tests on a GPU:
    it runs the Triton kernel with another tile than the reviewed one, and `segments` must be cut
    for it.
    """
    N, _, H, D = qkv.shape
    out = torch.empty((N, H, D), dtype=qkv.dtype, device=qkv.device)
    if N == 0 or len(segments.tiles) == 0:
        return out
    d_main = 1 << (D.bit_length() - 1)
    d_tail = 0 if d_main == D else max(16, triton.next_power_of_2(D - d_main))
    on_cpu = qkv.device.type == "cpu"
    keys_are_queries = kind == "window"
    if on_cpu:
        ranges = segments.tiles.view(-1, 2, 2)  # begin and end of the query rows, and of the keys
        keys_are_queries = torch.equal(ranges[:, 0], ranges[:, 1])
        longest = int(ranges.diff(dim=2).max())
        rows = min(INTERPRETED_ROWS, max(16, triton.next_power_of_2(longest)))
        used = AttentionTile(rows, rows, num_warps=1, num_stages=1)
    else:
        used = tiles or TILES[kind, qkv.dtype.itemsize * 8]
    rotate_keys_first = kind == "full" and not on_cpu

    is_axial = rotary.index is not None
    index = rotary.cos if rotary.index is None else rotary.index
    k_rotated = qkv
    if rotate_keys_first:
        k_rotated = rotated_keys(qkv, rotary, adjacent_pairs=adjacent_pairs)
    is_for_hopper = IS_KNOWN_GLUON and tiles is None and not on_cpu
    if is_for_hopper and attention_hopper.supports(qkv, is_axial, adjacent_pairs):
        tables = rotary.cos, rotary.sin, index, segments.tiles
        if kind == "window":
            attention_hopper.window_attention(qkv, *tables, out, D**-0.5 * LOG2_E)
        else:
            attention_hopper.full_attention(qkv, k_rotated, *tables, out, D**-0.5 * LOG2_E)
        return out
    _launch(_rope_varlen_attention, qkv.device)(
        (segments.tiles.shape[0] * H,),
        qkv, k_rotated, rotary.cos, rotary.sin, index,
        segments.segment_of_row, segments.tiles, out, D**-0.5 * LOG2_E,
        H=H, D=D, D0=d_main, D1=d_tail,
        K_ROTATED=rotate_keys_first, ONE_KEY_TILE=keys_are_queries, AXIAL=is_axial,
        ADJACENT=adjacent_pairs, MASK_SEGMENTS=on_cpu, PRECISION="ieee", BM=used.q_rows,
        BN=used.k_rows, num_warps=used.num_warps, num_stages=used.num_stages,
    )  # fmt: skip
    return out


def rotated_keys(qkv: torch.Tensor, rotary: RotaryTable, *, adjacent_pairs: bool) -> torch.Tensor:
    """K of every row, rotated and rounded once: (N, 3, H, D) -> (N, H, D)."""
    N, _, H, D = qkv.shape
    k_rotated = torch.empty((N, H, D), dtype=qkv.dtype, device=qkv.device)
    index = rotary.cos if rotary.index is None else rotary.index
    _launch(_rotate_keys, qkv.device)(
        (triton.cdiv(N, ROTATION_ROWS) * H,),
        qkv, k_rotated, rotary.cos, rotary.sin, index, N,
        H=H, D=D, D_PADDED=triton.next_power_of_2(D), AXIAL=rotary.index is not None,
        ADJACENT=adjacent_pairs, BN=ROTATION_ROWS,
    )  # fmt: skip
    return k_rotated


@cache
def _interpreted(kernel: Any) -> Callable[..., None]:
    return interpreted(kernel)


def _launch(kernel: Any, device: torch.device) -> Callable[..., None]:
    """The kernel's launcher: compiled on its tensors' own GPU, or interpreted on a CPU."""
    if device.type == "cpu":
        return _interpreted(kernel)

    def run(grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        with torch.cuda.device(device):
            kernel[grid](*args, **kwargs)

    return run
