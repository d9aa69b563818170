"""Compare the package's tower with transformers' tower and the float64 oracle, stage by stage."""

import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.config import VisionConfig
from qwen_vit.model import VisionTower
from tests.support.checkpoints import SMALL, peaked_tensors
from tests.support.goldens import (
    MEAN,
    STD,
    TINY_FOLDER,
    assert_stages_close,
    fp32_budget,
    tiny_tower,
)
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.oracle import Trace, pixel_rows, read_checkpoint, relative_error, vision_oracle
from tests.support.towers import (
    MIXED,
    GridTuple,
    as_grids,
    build_tower,
    gpu,
    layout_for,
    n_patches,
    per_image,
    random_grids,
    random_pixels,
    random_rows,
    tower_trace,
)


@cache
def tiny() -> tuple[dict[str, Tensor], VisionConfig]:
    return read_checkpoint(TINY_FOLDER)[0], load_checkpoint(TINY_FOLDER).config


@cache
def tiny_theirs() -> torch.nn.Module:
    return hf_tower(*tiny())


def new_seed() -> int:
    """Return a new seed for every run, which pytest prints if a test fails."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return seed


def printed_grids(seed: int, patches: int) -> list[GridTuple]:
    grids = random_grids(random.Random(seed), patches)
    print(grids)
    return grids


def assert_agrees_with_transformers(
    tower: VisionTower,
    theirs: torch.nn.Module,
    tensors: dict[str, Tensor],
    config: VisionConfig,
    grids: list[GridTuple],
    *,
    rows: Tensor,
    pixels: Tensor | None = None,
) -> None:
    """Every stage must be within 1e-5, or within twice transformers' own fp32 error if that is
    larger."""
    ours = tower_trace(tower, rows if pixels is None else pixels, grids)
    expected = hf_trace(theirs, rows, grids)
    oracle = vision_oracle(tensors, config, rows, grids)
    budget = {stage: fp32_budget(expected[stage], oracle[stage]) for stage in expected}
    assert ours.keys() == expected.keys()
    assert_stages_close(ours, expected, budget)


@pytest.mark.parametrize("run", range(2))
def test_the_tiny_tower_agrees_with_transformers_at_every_stage(run: int) -> None:
    seed = new_seed()
    grids = printed_grids(seed, 500)
    rows = random_rows(n_patches(grids), seed)
    tensors, config = tiny()
    assert_agrees_with_transformers(tiny_tower(), tiny_theirs(), tensors, config, grids, rows=rows)


def test_uint8_pixels_agree_with_transformers_at_every_stage() -> None:
    seed = new_seed()
    grids = [(1, h, w) for _, h, w in printed_grids(seed, 300)]
    pixels = random_pixels(n_patches(grids), seed)
    tensors, config = tiny()
    assert_agrees_with_transformers(
        tiny_tower(), tiny_theirs(), tensors, config, grids,
        rows=pixel_rows(pixels, MEAN, STD), pixels=pixels,
    )  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "window56": {"window_px": 56, "intermediate_size": 13},
    "window84": {"window_px": 84, "hidden_size": 80, "num_heads": 1, "intermediate_size": 171},
    "window168-is-frame-kind": {"window_px": 168, "hidden_size": 96, "num_heads": 4},
    "window224": {"window_px": 224, "hidden_size": 48, "num_heads": 3, "intermediate_size": 129},
    "no-full-block": {"fullatt_block_indexes": (), "depth": 2},
    "all-full-blocks": {"fullatt_block_indexes": (0, 1), "depth": 2, "intermediate_size": 128},
    "depth1": {"fullatt_block_indexes": (), "depth": 1, "out_hidden_size": 8},
    "head-dim-8": {"hidden_size": 40, "num_heads": 5, "intermediate_size": 1},
    "head-dim-72": {"hidden_size": 144, "num_heads": 2},
    "theta500": {"rope_theta": 500.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_random_small_tower_agrees_with_transformers(name: str) -> None:
    config = replace(SMALL, **CONFIGS[name])
    seed = new_seed()
    tensors = peaked_tensors(config, seed)
    grids = printed_grids(seed, 200)
    rows = random_rows(n_patches(grids), seed)
    assert_agrees_with_transformers(
        build_tower(tensors, config), hf_tower(tensors, config), tensors, config, grids, rows=rows
    )


def test_a_random_architecture_agrees_with_transformers() -> None:
    """Each run draws another architecture, and pytest prints the seed of a failure."""
    seed = new_seed()
    generator = random.Random(seed)
    heads, depth = generator.randint(1, 4), generator.randint(2, 4)
    config = replace(
        SMALL,
        depth=depth,
        num_heads=heads,
        hidden_size=heads * 8 * generator.randint(1, 12),
        intermediate_size=generator.randint(1, 300),
        out_hidden_size=8 * generator.randint(1, 12),
        window_px=28 * generator.randint(1, 9),
        fullatt_block_indexes=tuple(i for i in range(depth) if generator.random() < 0.4),
    )
    print(config)
    tensors = peaked_tensors(config, seed)
    grids = printed_grids(seed, 200)
    rows = random_rows(n_patches(grids), seed)
    assert_agrees_with_transformers(
        build_tower(tensors, config), hf_tower(tensors, config), tensors, config, grids, rows=rows
    )


@torch.no_grad()
def test_an_embedding_alone_differs_from_a_batch_by_rounding_only() -> None:
    """The error is at most transformers' own fp32 error, because the BLAS decides the order of
    sums."""
    tower = tiny_tower()
    rows = random_rows(n_patches(MIXED), 0)
    oracle = vision_oracle(*tiny(), rows, MIXED)["merger"]
    allowed = relative_error(hf_trace(tiny_theirs(), rows, MIXED)["merger"], oracle)
    batch = per_image(tower_trace(tower, rows, MIXED)["merger"], MIXED)
    start = 0
    for grid, together in zip(MIXED, batch, strict=True):
        own = rows[start : start + n_patches([grid])]
        start += len(own)
        error = relative_error(tower(own, layout_for([grid], tower.config)), together)
        print(f"{grid}: {error:.1e} of {allowed:.1e}")
        assert error <= allowed


@pytest.mark.parametrize("padding", [4, 260])
def test_padding_rows_change_nothing(padding: int) -> None:
    rows = random_rows(n_patches(MIXED), 0)
    plain = tower_trace(tiny_tower(), rows, MIXED)
    filled = tower_trace(tiny_tower(), rows, MIXED, n_rows=len(rows) + padding)
    for stage, before in plain.items():
        assert relative_error(filled[stage], before) < 1e-6


def raster_of(x: Tensor, grids: list[GridTuple]) -> Tensor:
    """Convert grid order to raster order, image by image."""
    images = []
    for part, (t, h, w) in zip(x.split([n_patches([g]) for g in grids]), grids, strict=True):
        cells = part.view(t, h // 2, w // 2, 2, 2, -1).transpose(2, 3)
        images.append(cells.reshape(t * h * w, -1))
    return torch.cat(images)


@torch.no_grad()
def test_patch_output_is_transformers_last_hidden_state_in_raster_order() -> None:
    rows = random_rows(n_patches(MIXED), 1)
    theirs = tiny_theirs()(rows, grid_thw=torch.tensor(MIXED)).last_hidden_state
    order, _ = get_vision_window_index(torch.tensor(MIXED), 2, 112, 14)
    in_grid_order = torch.empty_like(theirs).view(-1, 4, theirs.shape[1])
    in_grid_order[order] = theirs.view_as(in_grid_order)
    expected = raster_of(in_grid_order.view_as(theirs), MIXED)
    tower = tiny_tower()
    ours = tower(rows, layout_for(MIXED, tower.config), output="patch")
    assert ours.shape == (len(rows), 160)
    error = relative_error(ours, expected)
    print(f"{error:.1e}")
    assert error < 1e-5


@torch.no_grad()
def test_no_images_give_no_embeddings() -> None:
    tower = tiny_tower()
    layout = layout_for([], tower.config)
    assert tower(torch.empty(0, 588, dtype=torch.uint8), layout).shape == (0, 192)
    assert tower(torch.empty(0, 1176), layout, output="patch").shape == (0, 160)


def test_patches_see_their_window_in_window_blocks_and_their_frame_in_full_ones() -> None:
    """A tower of depth 2 with full blocks [7, 15, 23, 31] once passed every test of another
    project without running full attention at all."""
    config = replace(SMALL, depth=3, fullatt_block_indexes=(1,), hidden_size=80)
    tower = build_tower(peaked_tensors(config, 0), config)
    grids = [(1, 4, 4), (2, 12, 20), (1, 8, 8)]
    rows = random_rows(n_patches(grids), 0)
    before = tower_trace(tower, rows, grids)
    rows[16] += 1.0  # the clip's first patch, in grid order and in window order
    after = tower_trace(tower, rows, grids)

    def changed(stage: str) -> list[int]:
        return (before[stage] != after[stage]).any(1).nonzero().flatten().tolist()

    window, frame = list(range(16, 16 + 64)), list(range(16, 16 + 240))
    assert changed("patch_embed") == [16]
    assert changed("block.0") == window
    assert changed("block.1") == frame  # neither the clip's second frame nor another image
    assert changed("block.2") == frame
    assert changed("merger") == list(range(4, 64))


@pytest.mark.parametrize("index", [1, 3])
def test_each_full_block_of_the_tiny_tower_differs_from_a_window_block(index: int) -> None:
    tower = build_tower(TINY_FOLDER)
    rows = random_rows(192, 0)
    right = tower_trace(tower, rows, [(1, 12, 16)])
    others = tuple(i for i in tower.config.fullatt_block_indexes if i != index)
    tower.config = replace(tower.config, fullatt_block_indexes=others)
    wrong = tower_trace(tower, rows, [(1, 12, 16)])
    assert relative_error(wrong[f"block.{index - 1}"], right[f"block.{index - 1}"]) == 0.0
    assert relative_error(wrong[f"block.{index}"], right[f"block.{index}"]) > 1e-3


@torch.no_grad()
def test_positions_beyond_the_first_table_are_rotated_right() -> None:
    """The strip has more patches than the first table of angles has rows."""
    config = replace(SMALL, depth=1, fullatt_block_indexes=())
    tensors, grids = peaked_tensors(config, 0), [(1, 2, 4200)]
    rows = random_rows(8400, 0)
    tower = build_tower(tensors, config)
    tower(rows[:4], layout_for([(1, 2, 2)], config))  # creates a small table first
    oracle = vision_oracle(tensors, config, rows, grids)
    assert relative_error(tower_trace(tower, rows, grids)["merger"], oracle["merger"]) < 1e-5


# On a GPU ---------------------------------------------------------------------------------------

CUDA = torch.device("cuda")
SEEDS = range(8)
LARGE: list[GridTuple] = [(1, 32, 32), (1, 46, 74), (2, 6, 10), (1, 2, 2), (1, 26, 30)]


@cache
def tiny_on_gpu(dtype: torch.dtype) -> VisionTower:
    return build_tower(TINY_FOLDER, dtype=dtype, device=CUDA)


def stage_errors(trace: Trace, oracle: Trace) -> dict[str, float]:
    return {stage: relative_error(trace[stage], oracle[stage]) for stage in oracle}


@gpu
@pytest.mark.parametrize("kind", ["rows", "pixels"])
def test_bf16_on_a_gpu_is_as_near_to_the_truth_as_transformers(kind: str) -> None:
    """Each stage must be within 1.01 times Hugging Face's error in every run, and not larger in the
    geometric mean."""
    tensors, config = tiny()
    theirs = hf_tower(tensors, config, dtype=torch.bfloat16, device=CUDA)
    logs: dict[str, list[float]] = {}
    for seed in SEEDS:
        grids = LARGE if kind == "rows" else [(1, h, w) for _, h, w in LARGE]
        n = n_patches(grids)
        patches = random_rows(n, seed) if kind == "rows" else random_pixels(n, seed)
        rows = patches if kind == "rows" else pixel_rows(patches, MEAN, STD)
        oracle = vision_oracle(tensors, config, rows, grids, device=CUDA)
        ours = stage_errors(tower_trace(tiny_on_gpu(torch.bfloat16), patches, grids), oracle)
        stock = stage_errors(hf_trace(theirs, rows, grids), oracle)
        for stage in oracle:
            logs.setdefault(stage, []).append(math.log(ours[stage] / stock[stage]))
    for stage, ratios in logs.items():
        mean, largest = math.exp(sum(ratios) / len(ratios)), math.exp(max(ratios))
        print(f"{stage:<12} geometric mean {mean:.4f}, largest {largest:.4f}")
    every = [ratio for ratios in logs.values() for ratio in ratios]
    assert math.exp(max(every)) <= 1.01
    assert math.exp(sum(every) / len(every)) <= 1.00


@gpu
def test_fp32_on_a_gpu_agrees_with_transformers() -> None:
    tensors, config = tiny()
    rows = random_rows(n_patches(LARGE), 0)
    oracle = vision_oracle(tensors, config, rows, LARGE, device=CUDA)
    theirs = hf_trace(tiny_theirs(), rows, LARGE)
    budget = {stage: fp32_budget(theirs[stage], oracle[stage].cpu()) for stage in oracle}
    assert_stages_close(tower_trace(tiny_on_gpu(torch.float32), rows, LARGE), theirs, budget)


@gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output", ["merged", "patch"])
def test_an_embedding_on_a_gpu_has_the_same_bits_in_any_batch(
    dtype: torch.dtype, output: Any
) -> None:
    """Test images alone, in any batch, in any order and with padding rows, with 50 random batches
    of each kind."""
    tower = tiny_on_gpu(dtype)
    sizes: list[GridTuple] = [(1, 2, 2), (1, 32, 32), (1, 46, 74), (1, 96, 96), (3, 6, 10)]
    sizes += [(1, 2, 60), (1, 58, 2), (1, 14, 22), (1, 8, 8), (1, 30, 18)]
    pixels = [random_pixels(n_patches([grid]), seed).to(CUDA) for seed, grid in enumerate(sizes)]
    alone = [
        tower(p, layout_for([grid], tower.config, CUDA, dtype), output=output)
        for p, grid in zip(pixels, sizes, strict=True)
    ]
    unit = 4 if output == "merged" else 1
    generator = random.Random(0)
    for _ in range(50):
        chosen = generator.choices(range(len(sizes)), k=generator.randint(1, 8))
        grids = [sizes[i] for i in chosen]
        n_rows = n_patches(grids) + 4 * generator.choice((0, 1, 37, 500))
        layout = layout_for(grids, tower.config, CUDA, dtype, n_rows)
        batch = tower(torch.cat([pixels[i] for i in chosen]), layout, output=output)
        parts = batch.split([grid.n_tokens(unit) for grid in as_grids(grids)])
        for i, part in zip(chosen, parts, strict=True):
            assert torch.equal(part, alone[i]), f"{sizes[i]} in {grids} of {n_rows} rows"
