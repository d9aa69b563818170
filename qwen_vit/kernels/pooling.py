"""Average each image's rows and scale vectors to unit length, in float32 and a fixed order.

On a GPU, the order of each sum depends only on the image's own number of rows, so an image's vector
has the same bits alone and in any batch. torch chooses the order of a reduction by the shape of the
whole batch.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from qwen_vit.kernels.launch import LAUNCH

__all__ = ["segment_means", "unit_rows"]

MEAN_ROWS, MEAN_COLUMNS = 16, 128  # of one step of a program


@triton.jit
def _segment_mean(
    rows, offsets, out, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Average a segment. Lane i adds rows i, i + BM, i + 2 BM, ..., and the kernel then adds the
    lanes."""
    i_segment = tl.program_id(0)
    o_d = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    m_d = o_d < D
    begin = tl.load(offsets + i_segment)
    end = tl.load(offsets + i_segment + 1)
    acc = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    for i_row in range(begin, end, BM):
        o_row = i_row + tl.arange(0, BM)  # [BM]
        m_x = (o_row < end)[:, None] & m_d[None, :]  # [BM, BN]
        b_x = tl.load(rows + o_row[:, None].to(tl.int64) * D + o_d[None, :], mask=m_x, other=0.0)
        acc += b_x.to(tl.float32)  # [BM, BN]
    b_mean = tl.div_rn(tl.sum(acc, 0), (end - begin).to(tl.float32))  # [BN]
    tl.store(out + i_segment.to(tl.int64) * D + o_d, b_mean, mask=m_d)


@triton.jit
def _unit_row(x, out, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Scale a row to unit length. First divide it by its largest magnitude, because the squares
    could overflow."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, D_PADDED)  # [D_PADDED]
    m_d = o_d < D
    b_x = tl.load(x + i_row * D + o_d, mask=m_d, other=0.0)  # [D_PADDED]
    peak = tl.max(tl.abs(b_x), 0)
    b_x = tl.div_rn(b_x, tl.where(peak > 0, peak, 1.0))
    total = tl.sum(b_x * b_x, 0)
    b_x = tl.div_rn(b_x, tl.sqrt_rn(tl.where(total > 0, total, 1.0)))
    tl.store(out + i_row * D + o_d, b_x, mask=m_d)


def segment_means(rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the mean of each run of consecutive rows: (N, D) and S lengths > 0 to (S, D) float32.

    >>> segment_means(torch.tensor([[1.0], [3.0], [5.0]]), [2, 1])
    tensor([[2.],
            [5.]])

    The call does not wait for the GPU.
    """
    D = rows.shape[1]
    if rows.device.type == "cpu":  # per segment: torch's order depends on the shape
        means = [part.float().mean(0) for part in rows.split(list(lengths))]
        return torch.stack(means) if means else rows.new_zeros((0, D), dtype=torch.float32)
    out = torch.empty((len(lengths), D), dtype=torch.float32, device=rows.device)
    if lengths:
        ends = [0, *accumulate(lengths)]
        offsets = torch.tensor(ends, dtype=torch.int32, device="cpu", pin_memory=True)
        with torch.cuda.device(rows.device):
            _segment_mean[(len(lengths), triton.cdiv(D, MEAN_COLUMNS))](
                rows.contiguous(), offsets.to(rows.device, non_blocking=True), out, D=D,
                BM=MEAN_ROWS, BN=MEAN_COLUMNS, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return out


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Divide each row (N, D) float32 by its Euclidean length. Rows of zeros do not change.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    N, D = x.shape
    if x.device.type == "cpu":
        peak = x.abs().amax(1, keepdim=True) if D else x.new_ones((N, 1))
        scaled = x / torch.where(peak > 0, peak, 1.0)
        total = scaled.square().sum(1, keepdim=True)
        return scaled / torch.where(total > 0, total, 1.0).sqrt()
    out = torch.empty_like(x)
    if N:
        with torch.cuda.device(x.device):
            _unit_row[(N,)](
                x.contiguous(), out, D=D, D_PADDED=triton.next_power_of_2(D), num_warps=8, **LAUNCH
            )
    return out
