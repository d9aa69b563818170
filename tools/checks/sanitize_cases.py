"""Draw the random attentions and small towers that `tools.checks.sanitize` runs."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_vit.config import VisionConfig
from qwen_vit.device import FP8_CAPABILITY
from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels import plain_kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.model import VisionTower, plan_layout
from qwen_vit.weight_format import Quantization
from tests.support.attention_cases import adjacent, axial_tables, random_case, segments_of
from tests.support.checkpoints import SMALL, random_tensors
from tests.support.towers import as_grids, build_tower, n_patches, random_pixels, random_rows

__all__ = ["TAIL_ROWS", "random_attention", "random_tower"]

TAIL_ROWS = 5  # rows after the last segment, which the public function does not write
BF16, FP32 = torch.bfloat16, torch.float32
# (function, head dim, dtype). For 80 in bf16, Hopper has separate kernels.
ATTENTIONS = (
    ("window", 80, BF16),
    ("full", 80, BF16),
    ("window-triton", 80, BF16),
    ("full-triton", 80, BF16),
    ("public", 80, BF16),
    ("window", 64, BF16),
    ("full", 64, BF16),
    ("window", 80, FP32),
    ("full", 80, FP32),
    ("public", 128, FP32),
)
HEADS = 2
NARROW = replace(
    SMALL, depth=2, hidden_size=160, intermediate_size=140, num_heads=2, fullatt_block_indexes=(1,)
)
# Its GEMMs have complete tiles of Hopper's kernels.
PUBLISHED_WIDTH = replace(
    NARROW, hidden_size=1280, intermediate_size=640, num_heads=16, out_hidden_size=256
)


class TowerCase(NamedTuple):
    """Describe a small tower to run."""

    name: str
    config: VisionConfig
    dtype: torch.dtype
    quantization: Quantization | None = None
    is_plain: bool = False  # run the plain kernels also on Hopper


TOWERS = (
    TowerCase("published width", PUBLISHED_WIDTH, BF16),
    TowerCase("narrow", NARROW, BF16),
    TowerCase("narrow", NARROW, FP32),
)
FP8_TOWERS = (
    TowerCase("fp8", PUBLISHED_WIDTH, BF16, "fp8"),
    TowerCase("fp8, plain kernels", PUBLISHED_WIDTH, BF16, "fp8", is_plain=True),
)


def on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype. On a CPU the kernels compute only in float32."""
    return FP32 if device.type == "cpu" else dtype


def name_of(*parts: object) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts)


def random_attention(
    case: int, device: torch.device
) -> tuple[str, int, Callable[[], Tensor]]:  # fmt: skip
    """Return (name, values that the call does not write, a call) of one layout."""
    what, head_dim, dtype = ATTENTIONS[case % len(ATTENTIONS)]
    dtype = on(device, dtype)
    generator = random.Random(case)
    kind = what.removesuffix("-triton")
    longest = 64 if kind == "window" else generator.choice((9, 150, 700))
    lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 6))]
    tail = TAIL_ROWS if what == "public" else 0
    qkv, cos, sin, edges = random_case(
        [*lengths, *[tail] * (tail > 0)], head_dim, HEADS, seed=case, device=device, dtype=dtype
    )
    name = name_of(what, head_dim, dtype)
    if what == "public":
        edges = edges[:-1].clone()
        call = lambda: fused_rope_varlen_attention(qkv, cos, sin, edges)  # noqa: E731
        return name, tail * HEADS * head_dim, call
    tables, _, _ = axial_tables(len(qkv), head_dim, case)
    assert tables.index is not None
    rotary = RotaryTable(tables.cos.to(device), tables.sin.to(device), tables.index.to(device))
    segments = segments_of(lengths, kernels.tiling(device, dtype, kind), device)
    pairs = adjacent(qkv)
    tiles = kernels.TILES[kind, dtype.itemsize * 8] if what != kind else None
    return (
        name,
        0,
        lambda: attention(pairs, rotary, segments, kind=kind, adjacent_pairs=True, tiles=tiles),
    )


@cache
def towers_on(device: torch.device) -> tuple[TowerCase, ...]:
    """Return the towers that the device can run."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return TOWERS + FP8_TOWERS * has_fp8


@cache
def tower_of(case: TowerCase, device: torch.device) -> VisionTower:
    return build_tower(
        random_tensors(case.config), case.config, dtype=on(device, case.dtype), device=device,
        quantization=case.quantization,
    )  # fmt: skip


def random_tower(
    case: int, device: torch.device
) -> tuple[str, int, Callable[[], Tensor]]:  # fmt: skip
    """Return a random tower call, like `random_attention`, with pixels or float rows, stills or
    clips, and with or without padding."""
    chosen = towers_on(device)[case % len(towers_on(device))]
    dtype = on(device, chosen.dtype)
    generator = random.Random(case)
    grids = as_grids(
        (1 if case % 2 else generator.choice((1, 2)), 2 * generator.randint(1, 9),
         2 * generator.randint(1, 9)) for _ in range(generator.randint(1, 3))
    )  # fmt: skip
    n = n_patches(grids)
    layout = plan_layout(
        grids, chosen.config, device, dtype, n + 4 * generator.choice((0, 0, 1, 20))
    )
    patches = (random_pixels(n, case) if case % 2 else random_rows(n, case)).to(device)
    tower, on_device = tower_of(chosen, device), layout.to(device)

    def call() -> Tensor:
        with torch.no_grad(), plain_kernels() if chosen.is_plain else nullcontext():
            tokens: Tensor = tower(patches, on_device)
        return tokens

    return name_of("tower,", chosen.name, dtype), 0, call
