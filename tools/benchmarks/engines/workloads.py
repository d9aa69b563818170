"""Define the benchmarks' inputs: grids for towers, and images for whole requests."""

import random
from collections.abc import Mapping
from functools import cache

import numpy as np
from PIL import Image

from qwen_vit.config import Grid
from qwen_vit.workloads import WORKLOADS

# The article's sizes, and a mix of sizes that fits one batch of an engine.
TOWER_WORKLOADS: Mapping[str, tuple[Grid, ...]] = {
    **{name: grids for name, grids in WORKLOADS.items() if name != "256 mixed"},
    "16 mixed": WORKLOADS["256 mixed"][:16],
}
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
NEW_TOKENS = 8
N_REQUESTS = 128


def n_tokens(grids: tuple[Grid, ...]) -> int:
    """Return the number of merged tokens of a workload."""
    return sum(grid.n_tokens(4) for grid in grids)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Return an image with edges and gradients, different for each seed."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@cache
def request_sizes() -> tuple[tuple[int, int], ...]:
    """Return the requests' widths and heights: multiples of 28, so that no processor resizes."""
    chance = random.Random(7)
    return tuple(
        (28 * chance.randint(8, 36), 28 * chance.randint(8, 36)) for _ in range(N_REQUESTS)
    )
