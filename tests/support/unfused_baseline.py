"""Provide our tower with a separate RoPE kernel and a library's attention, to measure the gain of
fusion."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qwen_vit.kernels.attention import (
    ROTATION_ROWS,
    RotaryTable,
    _angles,
    _rotated,
)
from qwen_vit.kernels.interpret import interpreted
from qwen_vit.kernels.linear import ResidualStream
from qwen_vit.layout import Segments
from qwen_vit.model import VisionTower

# (q, k, v, cu_seqlens, longest segment) -> (N, H, D), all of (N, H, D)
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@triton.jit
def _rotate_queries_and_keys(
    qkv, rotated, cos, sin, axis_index, n_rows,
    H: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return the rotated Q and K of every row and head: (N, 2, H, D)."""
    i_head = tl.program_id(0) % (2 * H)
    row_begin = (tl.program_id(0) // (2 * H) * BN).to(tl.int64)
    o_row = tl.arange(0, BN)
    m_row = o_row < n_rows - row_begin
    o_dim = tl.arange(0, D_PADDED)
    rope = (cos, sin, axis_index)
    angles = _angles(rope, row_begin, m_row, 0, D_PADDED, D, BN, True, True)
    base = qkv + row_begin * (3 * H * D) + i_head * D
    x = _rotated(base, m_row, angles, 0, D_PADDED, D, BN, 3 * H * D, True)
    p_out = rotated + row_begin * (2 * H * D) + (o_row[:, None] * (2 * H) + i_head) * D
    m_out = m_row[:, None] & (o_dim < D)[None, :]
    tl.store(p_out + o_dim[None, :], x.to(rotated.dtype.element_ty), mask=m_out)


def rotated(qkv: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotate Q and K of (N, 3, H, D) with adjacent pairs, by the fused kernel's own rotation."""
    N, _, H, D = qkv.shape
    out = torch.empty((N, 2, H, D), dtype=qkv.dtype, device=qkv.device)
    grid = (triton.cdiv(N, ROTATION_ROWS) * 2 * H,)
    arguments = qkv, out, rotary.cos, rotary.sin, rotary.index, N
    constants = {"H": H, "D": D, "D_PADDED": triton.next_power_of_2(D), "BN": ROTATION_ROWS}
    if qkv.device.type == "cpu":
        interpreted(_rotate_queries_and_keys)(grid, *arguments, **constants, lanes=2 * H)
    else:
        with torch.cuda.device(qkv.device):
            _rotate_queries_and_keys[grid](*arguments, **constants)
    return out


class UnfusedAttention(nn.Module):
    """Replace `model.Attention` by two kernels."""

    def __init__(self, fused: Any, attend: VarlenAttention, longest: int) -> None:
        super().__init__()
        self.fused, self.attend, self.longest = fused, attend, longest

    def forward(
        self, x: ResidualStream, rotary: RotaryTable, segments: Segments, kind: str
    ) -> ResidualStream:
        N, C = x.values.shape
        qkv = self.fused.qkv(x).view(N, 3, self.fused.n_heads, -1)
        q, k = rotated(qkv, rotary).unbind(1)
        out = self.attend(q, k, qkv[:, 2], segments.cu_seqlens, self.longest)
        return self.fused.proj(out.reshape(N, C), x)


def unfused_tower(tower: VisionTower, attend: VarlenAttention, longest_frame: int) -> VisionTower:
    """Return the same tower on the same weights, with `attend` as its attention."""
    config, dtype = tower.config, tower.merger.norm_weight.dtype
    with torch.device("meta"):
        other = VisionTower(config, dtype)
    other.load_state_dict(tower.state_dict(), strict=True, assign=True)
    window = (config.window_px // config.patch_px) ** 2
    for index, block in enumerate(other.blocks):
        is_full = index in config.fullatt_block_indexes
        block.attn = UnfusedAttention(block.attn, attend, longest_frame if is_full else window)
    return other.eval()
