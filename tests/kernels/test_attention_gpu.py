"""Test the attention on a GPU: error against PyTorch, equal bits, large offsets."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit.errors import ArgumentError
from qwen_vit.kernels import IS_KNOWN_GLUON, plain_kernels
from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.rope_varlen_attention import (
    fused_rope_varlen_attention,
)
from tests.support.attention_cases import (
    LENGTHS,
    assert_device_table_equals_hosts,
    attention_oracle,
    axial_tables,
    random_case,
    segments_of,
    stock_attention,
    tower_attention,
)
from tests.support.oracle import relative_error
from tests.support.towers import gpu

# a tile without keys must not compute NaN, even in unused rows
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


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
def test_the_tower_calls_hoppers_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests once passed angles in another format, and therefore tested only the Triton
    kernel."""
    if torch.cuda.get_device_capability() != (9, 0) or not IS_KNOWN_GLUON:
        pytest.skip("not a Hopper, or a Triton whose Gluon is not known")
    from qwen_vit.kernels import attention_hopper

    called, name = [], f"{kind}_attention"
    own = getattr(attention_hopper, name)

    def watched(*given: Any) -> None:
        called.append(1)
        own(*given)

    monkeypatch.setattr(attention_hopper, name, watched)
    case = random_case([64, 12], 80, 16, device=CUDA, dtype=torch.bfloat16)
    with plain_kernels():
        tower_attention(*case[:3], [64, 12], kind)
    assert not called
    tower_attention(*case[:3], [64, 12], kind)
    assert called


@gpu
@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_bf16_on_a_gpu_is_as_exact_as_pytorch(head_dim: int, kind: str) -> None:
    """Over all lengths, the largest error is at most 1.25 times and the mean at most 1.05 times
    PyTorch's error. The test compares the largest error over all layouts, because one layout gives
    only one sample.
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
def test_fp32_on_a_gpu_does_not_use_tf32(head_dim: int, kind: str, name: str) -> None:
    """TF32 would have an error of 1e-3."""
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
def test_the_tile_table_of_a_gpu_equals_the_hosts(name: str) -> None:
    for rows in (32, 64, 128):
        assert_device_table_equals_hosts(GPU_LENGTHS[name], rows, CUDA)


def on_gpu(tables: RotaryTable, rows: slice = slice(None)) -> RotaryTable:
    assert tables.index is not None
    return RotaryTable(tables.cos.to(CUDA), tables.sin.to(CUDA), tables.index[rows].to(CUDA))


@gpu
@pytest.mark.parametrize(("kind", "lengths"), [("window", [12, 64, 36]), ("full", [60, 700, 9])])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_in_one_segment_changes_no_other_segment_of_the_tower(
    kind: str, lengths: list[int], poisoned: int
) -> None:
    """Tiles extend beyond their segment, and 0 * NaN is NaN. The test uses axial tables, as in the
    tower."""
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
def test_both_window_kernels_give_the_same_bits() -> None:
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
def test_rows_above_the_range_of_int32_offsets_are_correct(kind: str) -> None:
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
