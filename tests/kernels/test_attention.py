"""Compare the attention kernel, interpreted or compiled, with a float64 oracle."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.interpret import interpreted
from qwen_vit.kernels.rope_varlen_attention import (
    fused_rope_varlen_attention,
)
from qwen_vit.layout import SegmentTiling
from tests.support.attention_cases import (
    LENGTHS,
    adjacent,
    attention_oracle,
    axial_tables,
    offsets,
    random_case,
    segments_of,
    stock_attention,
    tower_attention,
)
from tests.support.oracle import relative_error
from tests.support.towers import CPU, assert_no_worse_than
from tests.support.triton_interpreter import RUNS_HERE as TRITON_INTERPRETS
from tests.support.triton_interpreter import interpreted_by_triton

# a tile without keys must not compute NaN, even in unused rows
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128)
# The kernel adds float32 products in another order than PyTorch. On tiny segments, PyTorch's error
# is a single rounding of 6e-8, so the floor allows a few roundings.
FP32_FACTOR, FP32_FLOOR = 3.0, 3e-7


def compiled_attention_interpreted(
    qkv: Tensor,
    rotary: RotaryTable,
    lengths: Sequence[int],
    kind: str,
    adjacent_pairs: bool,
    rows: int = 64,
    *,
    by_triton: bool = False,
) -> Tensor:
    """Run the GPU configuration step by step: split head dims, tiles of one size, indexed angles,
    and K rotated beforehand or one key tile. Unwritten rows are NaN."""
    N, _, H, D = qkv.shape
    run = interpreted_by_triton if by_triton else interpreted
    # lanes must take the same branches, as the heads of one tile do
    lanes = {} if by_triton else {"lanes": H}
    segments = segments_of(lengths, SegmentTiling(rows))
    d_main = 1 << (D.bit_length() - 1)
    d_tail = 0 if d_main == D else max(16, triton.next_power_of_2(D - d_main))
    tables = kernels._tables(rotary)
    shared = {"AXIAL": rotary.index is not None, "ADJACENT": adjacent_pairs, **lanes}
    out = torch.full((N, H, D), float("nan"))
    k_rotated = torch.full((N, H, D), float("nan"))
    if kind == "full":
        run(kernels._rotate_keys)(
            (triton.cdiv(N, 64) * H,), qkv, k_rotated, *tables, N,
            H=H, D=D, D_PADDED=triton.next_power_of_2(D), BN=64, **shared,
        )  # fmt: skip
    shared |= {"H": H, "D": D, "D0": d_main, "D1": d_tail, "BM": rows}
    grid, scale = (len(segments.tiles) * H,), D**-0.5 * kernels.LOG2_E
    if kind == "window":
        run(kernels._window_attention)(grid, qkv, *tables, segments.tiles, out, scale, **shared)
    else:
        run(kernels._full_attention)(
            grid, qkv, k_rotated, *tables, segments.tiles, out, scale, BN=rows, **shared
        )
    return out


@pytest.mark.parametrize("name", ["windows", "one-long"])
def test_indexed_angles_equal_angles_of_each_token(name: str) -> None:
    tables, cos, sin = axial_tables(sum(LENGTHS[name]), 80, 3)
    expanded = tables.per_token()
    assert expanded.index is None
    torch.testing.assert_close(expanded.cos, cos)
    torch.testing.assert_close(expanded.sin, sin)
    assert expanded.per_token() is expanded


def nan_filled(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(*args, **kwargs).fill_(float("nan"))


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_kernel_is_as_exact_as_pytorch(head_dim: int, name: str) -> None:
    n_heads = 1 + (HEAD_DIMS.index(head_dim) + len(name)) % 3
    case = random_case(LENGTHS[name], head_dim, n_heads)
    ours, stock = fused_rope_varlen_attention(*case), stock_attention(*case)
    assert_no_worse_than(ours, stock, attention_oracle(*case), factor=FP32_FACTOR, floor=FP32_FLOOR)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 5])
def test_every_head_count_works(n_heads: int) -> None:
    case = random_case([33, 7, 64], 16, n_heads)
    assert relative_error(fused_rope_varlen_attention(*case), attention_oracle(*case)) < 1e-6


@pytest.mark.parametrize("name", ["windows", "one-long", "tiny-segments"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_adjacent_pairs_give_the_results_of_halves(head_dim: int, name: str) -> None:
    qkv, cos, sin, cu_seqlens = random_case(LENGTHS[name], head_dim, 1)
    ours = tower_attention(qkv, cos, sin, LENGTHS[name])
    oracle = attention_oracle(qkv, cos, sin, cu_seqlens)
    stock = stock_attention(qkv, cos, sin, cu_seqlens)
    assert_no_worse_than(ours, stock, oracle, factor=FP32_FACTOR, floor=FP32_FLOOR)


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_axial_tables_have_the_row_before_the_column(head_dim: int, adjacent_pairs: bool) -> None:
    lengths = [70, 3, 40]
    qkv, _, _, cu_seqlens = random_case(lengths, head_dim, 2)
    tables, cos, sin = axial_tables(len(qkv), head_dim)
    segments = segments_of(lengths, kernels.tiling(CPU, qkv.dtype, "full"))
    ours = attention(
        adjacent(qkv) if adjacent_pairs else qkv,
        tables,
        segments,
        kind="full",
        adjacent_pairs=adjacent_pairs,
    )
    assert relative_error(ours, attention_oracle(qkv, cos, sin, cu_seqlens)) < 1e-6


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 128])
def test_the_gpu_configuration_equals_the_oracle(
    head_dim: int, kind: str, adjacent_pairs: bool
) -> None:
    """Only this configuration has the key loop, its peeled last tile and the rotated K."""
    lengths = [64, 12, 4, 36, 64] if kind == "window" else [150, 4, 33, 64, 128, 1, 65]
    qkv, _, _, cu_seqlens = random_case(lengths, head_dim, 2)
    tables, cos, sin = axial_tables(len(qkv), head_dim)
    x = adjacent(qkv) if adjacent_pairs else qkv
    oracle = attention_oracle(qkv, cos, sin, cu_seqlens)
    stock = stock_attention(qkv, cos, sin, cu_seqlens)
    for by_triton in [False, True][: 1 + TRITON_INTERPRETS]:
        ours = compiled_attention_interpreted(
            x, tables, lengths, kind, adjacent_pairs, by_triton=by_triton
        )
        assert_no_worse_than(ours, stock, oracle, factor=FP32_FACTOR, floor=FP32_FLOOR)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_the_size_of_a_tile_changes_no_result(rows: int) -> None:
    lengths = [150, 4, 33]
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 1)
    ours = compiled_attention_interpreted(qkv, RotaryTable(cos, sin), lengths, "full", False, rows)
    assert relative_error(ours, attention_oracle(qkv, cos, sin, cu_seqlens)) < 1e-6


@pytest.mark.parametrize("lengths", [[5, 64, 1100, 3], [1, 1, 1], [1024], [70]])
def test_only_rows_of_segments_are_written(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, cos, sin, cu_seqlens = random_case([*lengths, 37], 40, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", nan_filled)
        out = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens[:-1])
    assert out[: sum(lengths)].isfinite().all()
    assert out[sum(lengths) :].isnan().all()  # the kernel does not write rows after the last offset


@pytest.mark.parametrize("perturbed", [0, 2, 5])
def test_perturbing_one_segment_leaves_the_others_unchanged(perturbed: int) -> None:
    lengths = [64, 3, 1100, 64, 17, 64]
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 2)
    before = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    start, end = cu_seqlens[perturbed : perturbed + 2].tolist()
    qkv[start:end] = qkv[start:end] * 3 + 1
    after = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    changed = (before != after).flatten(1).all(1)
    assert changed[start:end].all()
    unchanged = (before == after).flatten(1).all(1)
    assert unchanged[:start].all()
    assert unchanged[end:].all()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("lengths", "poisoned", "part", "poison"),
    [
        *itertools.product([[64, 3, 17]], [0, 1], "qkv", [NAN, INF, -INF]),
        ([9, 1100], 1, "q", NAN),  # several tiles of keys
        ([9, 1100], 1, "v", INF),
    ],
)
def test_nan_in_one_segment_changes_no_other_segment(
    lengths: list[int], poisoned: int, part: str, poison: float
) -> None:
    """Segments of one length run together as lanes, and no lane may read another lane's values."""
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 2)
    before = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    start, end = cu_seqlens[poisoned : poisoned + 2].tolist()
    qkv[(start + end) // 2, "qkv".index(part), 0, 70] = poison
    after = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    assert not after[start:end, 0].isfinite().all()  # NaN is in its own segment and head
    assert torch.equal(after[:, 1], before[:, 1])  # not in the other head
    assert torch.equal(after[:start], before[:start])
    assert torch.equal(after[end:], before[end:])


def test_equal_keys_give_the_mean_of_the_values() -> None:
    qkv, cos, sin, cu_seqlens = random_case([63, 1100], 80, 2)
    qkv[:, 1] = 0.0  # a rotation keeps zero keys equal
    out = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    means = torch.cat([v.mean(0, keepdim=True).expand_as(v) for v in qkv[:, 2].split([63, 1100])])
    assert relative_error(out, means) < 1e-5  # a mean of 1,100 values of 1.5 is near 0


@pytest.mark.parametrize("length", [63, 1100])
def test_scores_of_ten_thousand_do_not_overflow(length: int) -> None:
    case = random_case([length, 5], 80, 2)
    case[0][:, :2] *= 40
    q, k, _ = case[0].unbind(1)
    assert (torch.einsum("qhd,khd->hqk", q, k).abs().max() * 80**-0.5) > 1e4
    ours, stock = fused_rope_varlen_attention(*case), stock_attention(*case)
    oracle = attention_oracle(*case)
    assert_no_worse_than(ours, stock, oracle, factor=FP32_FACTOR, floor=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_that_are_all_huge_or_all_tiny_give_a_softmax(sign: float) -> None:
    """Without subtraction of the maximum, 2**score is infinite or zero everywhere. float32 rounds a
    score to score * 2**-24, and the dot product adds an equal error, in an order that depends on
    the machine. A weight is 2**score, so its relative error is this error times ln 2.
    """
    qkv, _, _, cu_seqlens = random_case([70, 9], 64, 1)
    qkv[:, 0], qkv[:, 1] = 4.0, sign * 4.0
    score = 64 * 4.0 * 4.0 * 64**-0.5 / math.log(2)
    assert score > 128  # 2**128 is infinite in float32
    cos, sin = torch.ones(79, 32), torch.zeros(79, 32)
    out = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    error = relative_error(out, attention_oracle(qkv, cos, sin, cu_seqlens))
    assert error < 2 * score * 2**-24


def test_segments_with_identical_tokens_give_identical_results() -> None:
    """Attention over all copies together would give the same softmax average, unless one copy
    differs. The middle copy therefore differs."""
    qkv, cos, sin, _ = random_case([50], 80, 2)
    other, *_ = random_case([50], 80, 2, seed=1)
    batch = torch.cat([qkv, other, qkv])
    out = fused_rope_varlen_attention(
        batch, cos.repeat(3, 1), sin.repeat(3, 1), offsets([50, 50, 50])
    )
    alone = fused_rope_varlen_attention(qkv, cos, sin, offsets([50]))
    assert relative_error(out[:50], alone) < 1e-6
    assert relative_error(out[100:], alone) < 1e-6
