"""Test that batches of over 2^31 values and 65,535 windows have the bits of their halves."""

import pytest
import torch

from qwen_vit.config import Grid
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.model import VisionTower
from tests.support.attention_cases import random_case
from tests.support.towers import gpu
from tests.support.wide_tower import CONFIG, CUDA, embeddings, published_width

INT32_VALUES = 2**31  # the range of 32-bit offsets
GRID_LIMIT = 65_535  # the limit of programs on the second and third axis of a launch


def assert_equals_its_halves(tower: VisionTower, grid: Grid, count: int) -> None:
    device = next(tower.parameters()).device
    shape = (count * grid.n_patches, 588)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    expected = embeddings(tower, pixels, [grid] * count)
    assert expected.isfinite().all()
    images = count // 2
    for part, n, values in zip(
        pixels.split([images * grid.n_patches, (count - images) * grid.n_patches]),
        (images, count - images),
        expected.split([images * grid.n_patches // 4, (count - images) * grid.n_patches // 4]),
        strict=True,
    ):
        assert torch.equal(embeddings(tower, part.clone(), [grid] * n), values)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_projection_of_more_than_2_to_the_31_values_equals_its_halves(dtype: torch.dtype) -> None:
    grid, count = Grid(1, 64, 64), 140
    assert count * grid.n_patches * 3 * CONFIG.hidden_size > INT32_VALUES
    assert_equals_its_halves(published_width(dtype), grid, count)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_windows_and_frames_than_the_grid_limit_equal_their_halves(dtype: torch.dtype) -> None:
    count = 70_000
    assert count > GRID_LIMIT >= count // 2
    assert_equals_its_halves(published_width(dtype), Grid(1, 2, 2), count)


@gpu
def test_the_attention_kernel_works_above_both_limits() -> None:
    count, length, heads, head_dim = 70_000, 8, 16, 80
    N = count * length
    qkv = torch.randn(N, 3, heads, head_dim, device=CUDA, dtype=torch.bfloat16)
    assert qkv.numel() > INT32_VALUES
    assert count > GRID_LIMIT
    _, cos, sin, edges = random_case([length] * count, head_dim, 0, device=CUDA)
    expected = fused_rope_varlen_attention(qkv, cos, sin, edges)
    middle = count // 2
    for segments in (slice(0, middle), slice(middle, count)):
        rows = slice(segments.start * length, segments.stop * length)
        part = edges[segments.start : segments.stop + 1] - edges[segments.start]
        arguments = (qkv[rows].clone(), cos[rows].clone(), sin[rows].clone(), part)
        assert torch.equal(fused_rope_varlen_attention(*arguments), expected[rows])
