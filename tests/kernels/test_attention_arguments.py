"""Test the arguments of the attention, and the tile table on the device."""

from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.errors import ArgumentError
from qwen_vit.kernels.rope_varlen_attention import (
    _tile_table_on_device,
    fused_rope_varlen_attention,
)
from qwen_vit.layout import SegmentTiling
from tests.support.attention_cases import (
    LENGTHS,
    assert_device_table_equals_hosts,
    offsets,
    random_case,
)
from tests.support.towers import CPU

# a tile without keys must not compute NaN, even in unused rows
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_empty_segments_and_both_offset_dtypes_are_accepted(dtype: torch.dtype) -> None:
    qkv, cos, sin, _ = random_case([10, 60], 40, 1)
    plain = fused_rope_varlen_attention(qkv, cos, sin, offsets([10, 60]))
    with_empty = torch.tensor([0, 0, 10, 10, 10, 70, 70], dtype=dtype)
    assert torch.equal(fused_rope_varlen_attention(qkv, cos, sin, with_empty), plain)


def test_no_rows_give_no_rows() -> None:
    empty = torch.empty(0, 3, 2, 80)
    angles = torch.empty(0, 40)
    out = fused_rope_varlen_attention(empty, angles, angles, torch.tensor([0, 0]))
    assert out.shape == (0, 2, 80)


def test_rows_without_a_segment_are_accepted() -> None:
    """The maximum of no tiles once raised RuntimeError instead of leaving rows unwritten."""
    qkv, cos, sin, _ = random_case([10], 40, 1)
    out = fused_rope_varlen_attention(qkv, cos, sin, torch.tensor([0, 0], dtype=torch.int32))
    assert out.shape == (10, 1, 40)


def test_views_give_the_results_of_contiguous_inputs() -> None:
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
        ("qkv", np.zeros((10, 3, 2, 80)), r"qkv is array\(.*\(ndarray\)\. Expected a torch"),
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
        ("cu_seqlens", [0, 10], r"cu_seqlens is \[0, 10\] \(list\)\. Expected a torch tensor"),
        ("cu_seqlens", torch.tensor([0.0, 10.0]), "cu_seqlens is torch.float32"),
        ("cu_seqlens", torch.tensor([[0, 10]]), r"cu_seqlens is .*\(1, 2\)"),
        ("cu_seqlens", torch.tensor([0]), r"no segment\. Expected at least \[0, N\]"),
        ("cu_seqlens", torch.tensor([0, 11]), r"from 0 to 11\. Expected .* 0 to 10"),
        ("cu_seqlens", torch.tensor([1, 10]), r"from 1 to 10\. Expected .* 0 to 10"),
        ("cu_seqlens", torch.tensor([0, 7, 5, 10]), "non-decreasing"),
        ("cos", torch.zeros(10, 40, device="meta"), r"cos is a meta tensor\. .*\. Convert or move"),
    ],
)
def test_invalid_arguments_are_refused(name: str, value: object, message: str) -> None:
    good: dict[str, Any] = dict(zip(ARGUMENTS, random_case([10], 80, 2), strict=True))
    with pytest.raises(ArgumentError, match=message):
        fused_rope_varlen_attention(**(good | {name: value}))


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_tile_table_of_the_device_equals_the_hosts(name: str, rows: int) -> None:
    assert_device_table_equals_hosts(LENGTHS[name], rows, CPU)


@pytest.mark.parametrize("lengths", [[0, 0, 64, 0, 129, 0], [0], [128, 128]])
def test_the_tile_table_of_the_device_skips_empty_segments(lengths: list[int]) -> None:
    assert_device_table_equals_hosts(lengths, 64, CPU)


def test_the_tile_table_of_the_device_ends_at_the_last_row() -> None:
    """The host never reads the lengths, and a tile after the last row would write outside the
    result."""
    for wrong in ([0, 200], [0, 1 << 30, 7], [-5, 100], [50, 0, 100], [0, 90, 300, 100]):
        table = _tile_table_on_device(torch.tensor(wrong), 100, SegmentTiling(32))
        used = table[table[:, 1] > table[:, 0]]
        assert used.min() >= 0
        assert used.max() <= 100
