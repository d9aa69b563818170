"""Build the package's own tower for tests, lay out grids, and trace the oracle's stages."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.compare import stages as trace
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.tolerance import relative_error
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower
from qwen_vit.weight_format import Quantization

CPU = torch.device("cpu")
GridTuple = tuple[int, int, int]  # (t, h, w) in patches
# Merged sides of 0, 1, 2 and 3 mod 4, a strip, one merged token, and a clip.
MIXED: list[GridTuple] = [(1, 10, 14), (1, 2, 2), (3, 6, 4), (1, 2, 30), (1, 16, 8)]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs an NVIDIA GPU. `-m gpu` selects the test, and pytest skips it without
    a GPU."""
    no_gpu = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="needs an NVIDIA GPU")(test))


def as_grids(grids: Iterable[Any]) -> tuple[Grid, ...]:
    return tuple(grid if isinstance(grid, Grid) else Grid(*map(int, grid)) for grid in grids)


def build_tower(
    folder_or_tensors: Path | str | Mapping[str, Tensor],
    config: VisionConfig | None = None,
    image_config: ImageConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = CPU,
    quantization: Quantization | None = None,
) -> VisionTower:
    """Return the tower of a folder, or of tensors by their names without prefix, without random
    values."""
    if isinstance(folder_or_tensors, Mapping):
        tensors = folder_or_tensors
        image_config = image_config or ImageConfig.from_json({})
    else:
        checkpoint = load_checkpoint(folder_or_tensors)
        tensors = checkpoint.tensors
        config, image_config = checkpoint.config, checkpoint.image_config
    assert config is not None
    state = convert(tensors, config, image_config, dtype, quantization=quantization)
    with torch.device("meta"):
        tower = VisionTower(config, dtype, quantization)
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.to(device).eval()


def layout_for(
    grids: Iterable[Any],
    config: VisionConfig,
    device: torch.device | str = CPU,
    dtype: torch.dtype = torch.float32,
    n_rows: int | None = None,
) -> Layout:
    """Return a layout, with defaults for a CPU and grids of any kind."""
    return trace.layout_for(as_grids(grids), config, torch.device(device), dtype, n_rows)


def tower_trace(
    tower: VisionTower,
    patches: Tensor,
    grids: Iterable[Any],
    *,
    n_rows: int | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Run the tower and return its stages like the oracle, without the padding rows."""
    weight = tower.patch_embed.weight
    if layout is None:
        layout = layout_for(grids, tower.config, weight.device, weight.dtype, n_rows)
    return trace.trace_tower(tower, patches, layout)


def per_image(merged: Tensor, grids: Iterable[Any], merge_unit: int = 4) -> tuple[Tensor, ...]:
    """Return a batch's merged tokens, image by image."""
    return merged.split([grid.n_tokens(merge_unit) for grid in as_grids(grids)])


def assert_no_worse_than(
    ours: Tensor, stock: Tensor, oracle: Tensor, *, factor: float, floor: float = 0.0
) -> None:
    """Check that our relative error against the oracle is at most `factor` times the error of a
    stock path. `floor` is an error that is always allowed, because no factor allows one rounding if
    the stock path is exact by chance. The function always prints the errors.
    """
    our_error, stock_error = relative_error(ours, oracle), relative_error(stock, oracle)
    allowed = max(factor * stock_error, floor)
    line = f"ours {our_error:.2e}, stock {stock_error:.2e}, allowed {allowed:.2e}"
    print(line)
    if not our_error <= allowed:
        raise AssertionError(line)


def random_rows(n: int, seed: int, width: int = 1176) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def random_pixels(n: int, seed: int, width: int = 588) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, width), generator=generator, dtype=torch.uint8)


def n_patches(grids: Sequence[Any]) -> int:
    return sum(grid.n_patches for grid in as_grids(grids))


def random_grids(generator: random.Random, patches: int, side: int = 11) -> list[GridTuple]:
    """Return stills and clips with merged sides of 1 to `side`, with at least `patches` patches."""
    grids: list[GridTuple] = []
    while n_patches(grids) < patches:
        t = generator.choice((1, 1, 1, 2, 3))
        grids.append((t, 2 * generator.randint(1, side), 2 * generator.randint(1, side)))
    return grids
