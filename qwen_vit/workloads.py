"""List the benchmark's workloads by name, as grids, without importing torch."""

import random
from collections.abc import Mapping

from qwen_vit.config import Grid

__all__ = ["WORKLOADS"]


def _square(side_px: int, count: int = 1) -> tuple[Grid, ...]:
    return (Grid(1, side_px // 14, side_px // 14),) * count


def _stream(count: int) -> tuple[Grid, ...]:
    """Return the grids of images whose sides are random, from 224 to 1344 px, with a fixed seed."""
    chance = random.Random(0)
    return tuple(
        Grid(1, 2 * chance.randint(8, 48), 2 * chance.randint(8, 48)) for _ in range(count)
    )


WORKLOADS: Mapping[str, tuple[Grid, ...]] = {
    "1 x 448^2": _square(448),
    "1 x 672^2": _square(672),
    "1 x 896^2": _square(896),
    "1 x 1344^2": _square(1344),
    "32 x 448^2": _square(448, 32),
    "4 x 1344^2": _square(1344, 4),
    "256 mixed": _stream(256),
}
