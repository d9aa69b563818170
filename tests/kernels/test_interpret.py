"""Compare the interpreter of kernels with Triton's interpreter, on a kernel with edge cases."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vit.kernels.interpret import interpreted
from tests.support.triton_interpreter import RUNS_HERE, interpreted_by_triton

ROWS, WIDTH = 10, 6


@triton.jit
def _shifted(b_x, SHIFT: tl.constexpr):
    return b_x * 2.0 + SHIFT


@triton.jit
def _sum_of_steps(
    x, index, ends, out, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Add the tiles of BM rows of `x` that `index` selects, up to the end of program i."""
    end = tl.load(ends + tl.program_id(0)).to(tl.int64)
    if end < 1:
        return
    o_row = tl.arange(0, BM)  # [BM]
    o_column = tl.arange(0, BN)  # [BN]
    m_column = o_column < WIDTH  # [BN]
    total = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
    for i_row in range(0, end, BM):
        m_row = o_row < end - i_row  # [BM]
        b_index = tl.load(index + i_row + o_row, mask=m_row, other=0)  # [BM]
        p_x = x + b_index[:, None] * WIDTH + (o_column % WIDTH)[None, :]  # [BM, BN]
        b_x = tl.load(p_x, mask=m_row[:, None] & m_column[None, :], other=-3.0)
        total = total + _shifted(tl.where(m_row[:, None], b_x, 0.0), 1)
    b_sum = tl.reduce(total, 0, tl.standard._sum_combine)  # [BN]
    b_top = tl.reduce(total, 1, tl.standard._elementwise_max)  # [BM]
    p_out = out + tl.program_id(0) * (BM + BN)
    tl.store(p_out + o_column, b_sum, mask=m_column)
    tl.store(p_out + BN + o_row, b_top)


def run(interpreter: object, ends: list[int], **options: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    index = torch.randperm(ROWS, generator=generator).int()
    out = torch.full((len(ends), 12), float("nan"))
    launcher = interpreter(_sum_of_steps)  # type: ignore[operator]
    launcher(
        (len(ends),), x, index, torch.tensor(ends, dtype=torch.int32), out,
        WIDTH=WIDTH, BM=4, BN=8, **options,
    )  # fmt: skip
    return out


@pytest.mark.skipif(not RUNS_HERE, reason="this Triton's interpreter does not know this NumPy")
@pytest.mark.parametrize(("ends", "lanes"), [([9, 10], 2), ([9, 10], 1), ([3, 8, 0], 1), ([4], 5)])
def test_a_kernel_equals_tritons_interpreter(ends: list[int], lanes: int) -> None:
    expected = run(interpreted_by_triton, ends)
    ours = run(interpreted, ends, lanes=lanes)
    assert expected.isfinite().any()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("ends", [[3, 8], [0, 8]])
def test_programs_that_diverge_are_refused(ends: list[int]) -> None:
    with pytest.raises(NotImplementedError, match="different branches"):
        run(interpreted, ends, lanes=2)


def test_a_loaded_block_is_a_copy() -> None:
    """A block is in registers, so a later store to the loaded memory does not change it."""

    @triton.jit
    def swap(x, BN: tl.constexpr):
        o_x = tl.arange(0, BN)
        b_first, b_second = tl.load(x + o_x), tl.load(x + BN + o_x)
        tl.store(x + o_x, b_second)
        tl.store(x + BN + o_x, b_first)

    x = torch.arange(8.0)
    interpreted(swap)((1,), x, BN=4, lanes=1)
    assert x.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
