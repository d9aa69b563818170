"""Convert uint8 pixels in grid order into the patch embedding's operand in window order."""

import torch
import triton
import triton.language as tl

from qwen_vit.kernels.launch import LAUNCH

__all__ = ["gather_pixels"]

GATHERED_ROWS = 8


@triton.jit(do_not_specialize=["n_rows"])
def _gather_pixels(
    pixels, index, out, n_rows,
    P: tl.constexpr, P_OUT: tl.constexpr, P_BLOCK: tl.constexpr, ZERO: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    m_row = o_row < n_rows
    i_source = tl.load(index + o_row, mask=m_row, other=0).to(tl.int64)  # [BM]
    o_p = tl.arange(0, P_BLOCK)  # [P_BLOCK]
    m_in = m_row[:, None] & (o_p < P)[None, :]  # [BM, P_BLOCK]
    b_x = tl.load(pixels + i_source[:, None] * P + o_p[None, :], mask=m_in).to(tl.float32)
    b_x = tl.where(m_in, b_x - ZERO, 0.0).to(out.dtype.element_ty)  # [BM, P_BLOCK]
    m_out = m_row[:, None] & (o_p < P_OUT)[None, :]  # [BM, P_BLOCK]
    tl.store(out + o_row[:, None] * P_OUT + o_p[None, :], b_x, mask=m_out)


def gather_pixels(
    pixels: torch.Tensor, index: torch.Tensor, *, zero: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Gather rows `index` of uint8 `pixels` (N, P), minus `zero`, zero-padded: (len(index), width).

    Centring makes the operands and the GEMM's rounding errors smaller. Each operand is exact in
    float16, bfloat16 and float32.
    """
    n_rows, P = len(index), pixels.shape[1]
    if pixels.device.type == "cpu":
        out = torch.zeros((n_rows, width), dtype=dtype, device=pixels.device)
        out[:, :P] = pixels[index.long()].to(dtype) - zero
        return out
    out = torch.empty((n_rows, width), dtype=dtype, device=pixels.device)
    if n_rows:
        with torch.cuda.device(pixels.device):
            _gather_pixels[(triton.cdiv(n_rows, GATHERED_ROWS),)](
                pixels, index, out, n_rows, P=P, P_OUT=width,
                P_BLOCK=triton.next_power_of_2(width), ZERO=zero, BM=GATHERED_ROWS, **LAUNCH,
            )  # fmt: skip
    return out
