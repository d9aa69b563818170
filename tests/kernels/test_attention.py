"""The attention kernel against a float64 oracle: interpreted on the CPU, compiled on a GPU."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from qwen_vit.errors import ArgumentError
from qwen_vit.kernels import IS_KNOWN_GLUON
from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.rope_varlen_attention import (
    _tile_table_on_device,
    fused_rope_varlen_attention,
)
from qwen_vit.layout import SegmentTiling, tile_table
from tests.support.attention_cases import (
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
from tests.support.towers import CPU, assert_no_worse_than, gpu

# a tile that owns no key must make no NaN, not even one that is thrown away
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128)
LENGTHS = {
    "one-row": [1],
    "63": [63],
    "65": [65],
    "111": [111],
    "1024": [1024],
    "1025": [1025],
    "windows": [64, 64, 32, 16, 64, 8, 4],
    "tiny-segments": [1, 2, 3, 4, 5, 4, 3, 2, 1] * 9,
    "one-long": [5, 1200, 7],
    "long-then-tiny": [1500, *[4] * 30],
}
# Sums of float32 products in another order than PyTorch's. On tiny segments PyTorch's error is a
# single rounding, 6e-8: the floor leaves room for a few.
FP32_FACTOR, FP32_FLOOR = 3.0, 3e-7


def compiled_attention_interpreted(
    qkv: Tensor,
    rotary: RotaryTable,
    lengths: Sequence[int],
    kind: str,
    adjacent_pairs: bool,
    rows: int = 64,
) -> Tensor:
    """The configuration that GPUs run, step by step in the interpreter: no mask over segments,
    and K rotated beforehand or one key tile. Rows that nothing writes are NaN."""
    N, _, H, D = qkv.shape
    segments = segments_of(lengths, SegmentTiling(rows, packs=False))
    d_main = 1 << (D.bit_length() - 1)
    d_tail = 0 if d_main == D else max(16, triton.next_power_of_2(D - d_main))
    index = rotary.cos if rotary.index is None else rotary.index
    shared = {"AXIAL": rotary.index is not None, "ADJACENT": adjacent_pairs}
    out = torch.full((N, H, D), float("nan"))
    k_rotated = torch.full((N, H, D), float("nan"))
    if kind == "full":
        kernels._interpreted(kernels._rotate_keys)(
            (triton.cdiv(N, 64) * H,),
            qkv, k_rotated, rotary.cos, rotary.sin, index, N,
            H=H, D=D, D_PADDED=triton.next_power_of_2(D), BN=64, **shared,
        )  # fmt: skip
    tables = rotary.cos, rotary.sin, index, segments.segment_of_row, segments.tiles
    shared |= {"H": H, "D": D, "D0": d_main, "D1": d_tail, "MASK_SEGMENTS": False, "BM": rows}
    grid, scale = (len(segments.tiles) * H,), D**-0.5 * kernels.LOG2_E
    if kind == "window":
        kernels._interpreted(kernels._window_attention)(grid, qkv, *tables, out, scale, **shared)
    else:
        kernels._interpreted(kernels._full_attention)(
            grid, qkv, k_rotated, *tables, out, scale, BN=rows, **shared
        )
    return out


@pytest.mark.parametrize("name", ["windows", "one-long"])
def test_angles_of_each_token_are_those_behind_the_index(name: str) -> None:
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
def test_adjacent_pairs_give_what_halves_give(head_dim: int, name: str) -> None:
    qkv, cos, sin, cu_seqlens = random_case(LENGTHS[name], head_dim, 1)
    ours = tower_attention(qkv, cos, sin, LENGTHS[name])
    oracle = attention_oracle(qkv, cos, sin, cu_seqlens)
    stock = stock_attention(qkv, cos, sin, cu_seqlens)
    assert_no_worse_than(ours, stock, oracle, factor=FP32_FACTOR, floor=FP32_FLOOR)


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_axial_tables_mean_the_row_then_the_column(head_dim: int, adjacent_pairs: bool) -> None:
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
def test_the_configuration_that_gpus_run_is_right(
    head_dim: int, kind: str, adjacent_pairs: bool
) -> None:
    """The key loop, its peeled last tile and the rotated K exist only there."""
    lengths = [64, 12, 4, 36, 64] if kind == "window" else [150, 4, 33, 64, 128, 1, 65]
    qkv, _, _, cu_seqlens = random_case(lengths, head_dim, 2)
    tables, cos, sin = axial_tables(len(qkv), head_dim)
    x = adjacent(qkv) if adjacent_pairs else qkv
    ours = compiled_attention_interpreted(x, tables, lengths, kind, adjacent_pairs)
    oracle = attention_oracle(qkv, cos, sin, cu_seqlens)
    stock = stock_attention(qkv, cos, sin, cu_seqlens)
    assert_no_worse_than(ours, stock, oracle, factor=FP32_FACTOR, floor=FP32_FLOOR)


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_the_size_of_a_tile_changes_no_result(rows: int) -> None:
    lengths = [150, 4, 33]
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 1)
    ours = compiled_attention_interpreted(qkv, RotaryTable(cos, sin), lengths, "full", False, rows)
    assert relative_error(ours, attention_oracle(qkv, cos, sin, cu_seqlens)) < 1e-6


@pytest.mark.parametrize("lengths", [[5, 64, 1100, 3], [1, 1, 1], [1024], [70]])
def test_every_row_of_a_segment_is_written_and_no_other(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, cos, sin, cu_seqlens = random_case([*lengths, 37], 40, 2)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.torch, "empty", nan_filled)
        out = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens[:-1])
    assert out[: sum(lengths)].isfinite().all()
    assert out[sum(lengths) :].isnan().all()  # documented: rows beyond the last offset


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
def test_a_bad_value_in_one_segment_reaches_no_other(
    lengths: list[int], poisoned: int, part: str, poison: float
) -> None:
    """A tile holds several segments, and 0 x NaN is NaN: a sum must leave such values out."""
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 2)
    before = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    start, end = cu_seqlens[poisoned : poisoned + 2].tolist()
    qkv[(start + end) // 2, "qkv".index(part), 0, 70] = poison
    after = fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens)
    assert not after[start:end, 0].isfinite().all()  # it is seen where it belongs
    assert torch.equal(after[:, 1], before[:, 1])  # the other head
    assert torch.equal(after[:start], before[:start])
    assert torch.equal(after[end:], before[end:])


def test_equal_keys_give_the_mean_of_the_values() -> None:
    qkv, cos, sin, cu_seqlens = random_case([63, 1100], 80, 2)
    qkv[:, 1] = 0.0  # rotation leaves zero keys equal
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
    """Without the maximum taken off, 2**score is infinite or zero everywhere.

    float32 rounds a score to score * 2**-24 and its dot product adds as much again, in an order
    that depends on the machine; a weight is 2**score, so its relative error is that times ln 2.
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
    """Attention over the copies together would give the same softmax average; not with one copy
    changed, so the middle one differs."""
    qkv, cos, sin, _ = random_case([50], 80, 2)
    other, *_ = random_case([50], 80, 2, seed=1)
    batch = torch.cat([qkv, other, qkv])
    out = fused_rope_varlen_attention(
        batch, cos.repeat(3, 1), sin.repeat(3, 1), offsets([50, 50, 50])
    )
    alone = fused_rope_varlen_attention(qkv, cos, sin, offsets([50]))
    assert relative_error(out[:50], alone) < 1e-6
    assert relative_error(out[100:], alone) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_empty_segments_and_both_offset_types_are_taken(dtype: torch.dtype) -> None:
    qkv, cos, sin, _ = random_case([10, 60], 40, 1)
    plain = fused_rope_varlen_attention(qkv, cos, sin, offsets([10, 60]))
    with_empty = torch.tensor([0, 0, 10, 10, 10, 70, 70], dtype=dtype)
    assert torch.equal(fused_rope_varlen_attention(qkv, cos, sin, with_empty), plain)


def test_no_rows_give_no_rows() -> None:
    empty = torch.empty(0, 3, 2, 80)
    angles = torch.empty(0, 40)
    out = fused_rope_varlen_attention(empty, angles, angles, torch.tensor([0, 0]))
    assert out.shape == (0, 2, 80)


def test_rows_without_any_segment_are_taken() -> None:
    """Once, the largest of no tiles was asked for: RuntimeError instead of unwritten rows."""
    qkv, cos, sin, _ = random_case([10], 40, 1)
    out = fused_rope_varlen_attention(qkv, cos, sin, torch.tensor([0, 0], dtype=torch.int32))
    assert out.shape == (10, 1, 40)


def test_inputs_that_are_views_are_read_right() -> None:
    qkv, cos, sin, cu_seqlens = random_case([33, 20], 40, 2)
    strided = torch.stack([qkv, qkv * 0], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    wide = torch.cat([cos, sin], dim=1)
    out = fused_rope_varlen_attention(strided, wide[:, :20], wide[:, 20:], cu_seqlens)
    assert torch.equal(out, fused_rope_varlen_attention(qkv, cos, sin, cu_seqlens))


ARGUMENTS = ("qkv", "cos", "sin", "cu_seqlens")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv", torch.zeros(10, 3, 160), r"qkv has shape \(10, 3, 160\)\. Expected \(N, 3, heads"),
        ("qkv", torch.zeros(10, 2, 2, 80), r"qkv has shape \(10, 2, 2, 80\)"),
        ("qkv", torch.zeros(10, 3, 2, 81), r"even head_dim of 2 to 1024\. Reshape"),
        ("qkv", torch.zeros(10, 3, 1, 1026), r"even head_dim of 2 to 1024\. Reshape"),
        ("qkv", np.zeros((10, 3, 2, 80)), r"qkv is a ndarray\. Expected a torch tensor"),
        (
            "qkv",
            torch.zeros(10, 3, 2, 80, device="meta"),
            r"qkv is a meta tensor\. Expected a dense",
        ),
        ("qkv", torch.zeros(10, 3, 0, 80), r"qkv has shape \(10, 3, 0, 80\)"),
        ("qkv", torch.zeros(10, 3, 2, 80).bfloat16(), r"bfloat16 on cpu\. Expected torch.float32"),
        ("qkv", torch.zeros(10, 3, 2, 80).half(), r"float16 on cpu\. Expected torch.float32"),
        ("qkv", torch.zeros(10, 3, 2, 80).double(), r"float64 on cpu\. Expected torch.float32"),
        ("cos", torch.zeros(10, 80), r"cos is .*\(10, 80\)\. Expected torch.float32 .*\(10, 40\)"),
        ("sin", torch.zeros(9, 40), r"sin is .*\(9, 40\)\. Expected .*\(10, 40\)"),
        ("cos", torch.zeros(10, 40).bfloat16(), "cos is torch.bfloat16 .* Expected torch.float32"),
        ("cu_seqlens", [0, 10], r"cu_seqlens is a list\. Expected a torch tensor"),
        ("cu_seqlens", torch.tensor([0.0, 10.0]), "cu_seqlens is torch.float32"),
        ("cu_seqlens", torch.tensor([[0, 10]]), r"cu_seqlens is .*\(1, 2\)"),
        ("cu_seqlens", torch.tensor([0]), r"no segment\. Expected at least \[0, N\]"),
        ("cu_seqlens", torch.tensor([0, 11]), r"from 0 to 11\. Expected .* 0 to 10"),
        ("cu_seqlens", torch.tensor([1, 10]), r"from 1 to 10\. Expected .* 0 to 10"),
        ("cu_seqlens", torch.tensor([0, 7, 5, 10]), "non-decreasing"),
        ("cos", torch.zeros(10, 40, device="meta"), r"cos is a meta tensor\. .*\. Convert or move"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, value: object, message: str) -> None:
    good = dict(zip(ARGUMENTS, random_case([10], 80, 2), strict=True))
    with pytest.raises(ArgumentError, match=message):
        fused_rope_varlen_attention(**(good | {name: value}))


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_tile_table_made_on_the_device_equals_the_hosts(name: str, rows: int) -> None:
    assert_device_table_equals_hosts(LENGTHS[name], rows, CPU)


@pytest.mark.parametrize("lengths", [[0, 0, 64, 0, 129, 0], [0], [128, 128]])
def test_the_tile_table_made_on_the_device_knows_empty_segments(lengths: list[int]) -> None:
    assert_device_table_equals_hosts(lengths, 64, CPU)


def test_edges_beyond_the_rows_lead_nowhere_on_a_gpu() -> None:
    """Their values are never read back, and a tile past the last row would be written there."""
    for wrong in ([0, 200], [0, 1 << 30, 7], [-5, 100], [50, 0, 100], [0, 90, 300, 100]):
        table = _tile_table_on_device(torch.tensor(wrong), 100, SegmentTiling(32, packs=False))
        used = table[table[:, 1] > table[:, 0]]
        assert used.min() >= 0
        assert used.max() <= 100


def assert_device_table_equals_hosts(
    lengths: Sequence[int], rows: int, device: torch.device
) -> None:
    """The same tiles: the host's begin with the longest segment, spare ones of a device are 0."""
    cut = SegmentTiling(rows, packs=False)
    table = _tile_table_on_device(offsets(lengths, device), sum(lengths), cut).cpu()
    used = table[table[:, 1] > table[:, 0]]
    assert torch.equal(table[len(used) :], torch.zeros_like(table[len(used) :]))
    hosts = tile_table(np.array(lengths, np.int32), cut)
    assert sorted(used.tolist()) == sorted(hosts.tolist())


# On a GPU ---------------------------------------------------------------------------------------

CUDA = torch.device("cuda")
GPU_LENGTHS = {
    **LENGTHS,
    "full-1024": [1024],
    "frames": [2310, 4096, 60],
    "many-windows": [64] * 300 + [32, 16, 4] * 20,
}
WINDOW_NAMES = ("one-row", "63", "windows", "tiny-segments", "many-windows")
GPU_CASES = [("full", name) for name in GPU_LENGTHS] + [("window", name) for name in WINDOW_NAMES]


@gpu
@pytest.mark.parametrize("kind", ["window", "full"])
def test_the_towers_call_reaches_hoppers_own_kernel(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once these tests asked for angles in another form, and met the Triton kernel alone."""
    if torch.cuda.get_device_capability() != (9, 0) or not IS_KNOWN_GLUON:
        pytest.skip("not a Hopper, or a Triton whose Gluon is not known")
    from qwen_vit.kernels import attention_hopper

    met, name = [], f"{kind}_attention"
    own = getattr(attention_hopper, name)
    monkeypatch.setattr(attention_hopper, name, lambda *given: (met.append(1), own(*given)))
    case = random_case([64, 12], 80, 16, device=CUDA, dtype=torch.bfloat16)
    tower_attention(*case[:3], [64, 12], kind)
    assert met


@gpu
@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_bf16_on_a_gpu_is_as_exact_as_pytorch(head_dim: int, kind: str) -> None:
    """Largest error at most 1.25 times, mean at most 1.05 times PyTorch's, over all the lengths.

    The largest of one layout is a single draw: it is compared over all of them together.
    """
    errors: dict[str, list[Tensor]] = {"tower": [], "stock": [], "public": []}
    for name in (name for its_kind, name in GPU_CASES if its_kind == kind):
        lengths = GPU_LENGTHS[name]
        case = random_case(lengths, head_dim, 4, device=CUDA, dtype=torch.bfloat16)
        oracle = attention_oracle(*case)
        results = {"stock": stock_attention(*case)}
        results["tower"] = tower_attention(*case[:3], lengths, kind)
        results["public"] = fused_rope_varlen_attention(*case)
        for who, result in results.items():
            errors[who].append((result - oracle).abs().flatten())
    pooled = {who: torch.cat(parts) for who, parts in errors.items()}
    largest = {who: values.max().item() for who, values in pooled.items()}
    mean = {who: values.mean().item() for who, values in pooled.items()}
    for who in ("tower", "public"):
        print(who, f"{largest[who] / largest['stock']:.3f} {mean[who] / mean['stock']:.3f}")
        assert largest[who] <= 1.25 * largest["stock"]
        assert mean[who] <= 1.05 * mean["stock"]


@gpu
@pytest.mark.parametrize(("kind", "name"), GPU_CASES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_fp32_on_a_gpu_is_ieee(head_dim: int, kind: str, name: str) -> None:
    """TF32 would be off by 1e-3."""
    lengths = GPU_LENGTHS[name]
    case = random_case(lengths, head_dim, 2, device=CUDA)
    oracle = attention_oracle(*case)
    assert relative_error(tower_attention(*case[:3], lengths, kind), oracle) < 2e-6
    assert relative_error(fused_rope_varlen_attention(*case), oracle) < 2e-6


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["window", "full"])
def test_a_segment_on_a_gpu_has_the_same_bits_alone_and_in_a_batch(
    kind: str, dtype: torch.dtype
) -> None:
    lengths = [64, 12, 4, 64, 36, 64] if kind == "window" else [1024, 60, 4, 777, 65]
    qkv, cos, sin, cu_seqlens = random_case(lengths, 80, 3, device=CUDA, dtype=dtype)
    batch = tower_attention(qkv, cos, sin, lengths, kind)
    for i, length in enumerate(lengths):
        rows = slice(*cu_seqlens[i : i + 2].tolist())
        alone = tower_attention(qkv[rows], cos[rows], sin[rows], [length], kind)
        assert torch.equal(alone, batch[rows])


@gpu
@pytest.mark.parametrize("kind", ["window", "full"])
def test_a_hundred_runs_on_a_gpu_give_the_same_bits(kind: str) -> None:
    lengths = [64, 12, 60] * 50 if kind == "window" else [1024, 60, 777]
    case = random_case(lengths, 80, 16, device=CUDA, dtype=torch.bfloat16)
    first = tower_attention(*case[:3], lengths, kind)
    for _ in range(100):
        assert torch.equal(tower_attention(*case[:3], lengths, kind), first)


@gpu
@pytest.mark.parametrize("name", GPU_LENGTHS)
def test_the_tile_table_made_on_a_gpu_equals_the_hosts(name: str) -> None:
    for rows in (32, 64, 128):
        assert_device_table_equals_hosts(GPU_LENGTHS[name], rows, CUDA)


def on_gpu(tables: RotaryTable, rows: slice = slice(None)) -> RotaryTable:
    assert tables.index is not None
    return RotaryTable(tables.cos.to(CUDA), tables.sin.to(CUDA), tables.index[rows].to(CUDA))


@gpu
@pytest.mark.parametrize(("kind", "lengths"), [("window", [12, 64, 36]), ("full", [60, 700, 9])])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_a_neighbour_of_nan_reaches_no_other_segment_of_the_tower(
    kind: str, lengths: list[int], poisoned: int
) -> None:
    """Tiles reach beyond their segment, and 0 * NaN is NaN. With axial tables, as in the tower."""
    qkv = torch.randn(sum(lengths), 3, 16, 80, device=CUDA, dtype=torch.bfloat16)
    tables, _, _ = axial_tables(len(qkv), 80)
    edges = [0, *itertools.accumulate(lengths)]
    qkv[edges[poisoned] : edges[poisoned + 1]] = float("nan")
    cut = kernels.tiling(CUDA, qkv.dtype, kind)
    batch = attention(
        qkv, on_gpu(tables), segments_of(lengths, cut, CUDA), kind=kind, adjacent_pairs=True
    )
    for i, length in enumerate(lengths):
        if i == poisoned:
            continue
        rows = slice(edges[i], edges[i + 1])
        alone = attention(
            qkv[rows].clone(), on_gpu(tables, rows), segments_of([length], cut, CUDA),
            kind=kind, adjacent_pairs=True,
        )  # fmt: skip
        assert torch.equal(batch[rows], alone)
        assert alone.isfinite().all()


@gpu
def test_both_kernels_of_the_window_regime_give_the_same_bits() -> None:
    lengths = GPU_LENGTHS["many-windows"]
    qkv = torch.randn(sum(lengths), 3, 16, 80, device=CUDA, dtype=torch.bfloat16)
    rotary = on_gpu(axial_tables(len(qkv), 80)[0])
    segments = segments_of(lengths, kernels.tiling(CUDA, qkv.dtype, "window"), CUDA)
    own, triton = (
        attention(qkv, rotary, segments, kind="window", adjacent_pairs=True, tiles=tiles)
        for tiles in (None, kernels.TILES["window", 16])
    )
    assert torch.equal(own, triton)


@gpu
@pytest.mark.parametrize("kind", ["window", "full"])
def test_rows_beyond_the_reach_of_int32_offsets_are_right(kind: str) -> None:
    """At the published sizes an int32 element offset overflows at row 559,240."""
    n_windows = 8_800
    lengths = [64] * n_windows if kind == "window" else [6_400] * (n_windows // 100)
    n = sum(lengths)
    qkv = torch.randn(n, 3, 16, 80, device=CUDA, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    tables, _, _ = axial_tables(n, 80)
    rotary = on_gpu(tables)
    segments = segments_of(lengths, kernels.tiling(CUDA, qkv.dtype, kind), CUDA)
    batch = attention(qkv, rotary, segments, kind=kind, adjacent_pairs=True)
    last = slice(n - lengths[-1], n)
    alone = attention(
        qkv[last].clone(),
        on_gpu(tables, last),
        segments_of(lengths[-1:], kernels.tiling(CUDA, qkv.dtype, kind), CUDA),
        kind=kind,
        adjacent_pairs=True,
    )
    assert torch.equal(batch[last], alone)


@gpu
def test_a_gpu_refuses_float16() -> None:
    case = random_case([10], 80, 2, device=CUDA, dtype=torch.float16)
    with pytest.raises(ArgumentError, match=r"float16 on cuda:0\. Expected torch.float32 or torch"):
        fused_rope_varlen_attention(*case)
