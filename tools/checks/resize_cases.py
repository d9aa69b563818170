"""Make random pictures and Pillow's resized ones, in processes that never see a GPU."""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["KINDS", "ResizeCase", "make_cases"]

PIXEL_BYTES = 4
LONG_SIDES = (12_000, 60)
# kind -> its share of the cases, in percent
KINDS = {
    "any": 50, "grow": 12, "shrink by 40": 10, "one pixel": 10, "one pass": 12,
    "12000 x 60": 1, "60 x 12000": 1, "photograph": 4,
}  # fmt: skip
CONTENTS = ("noise", "edges", "palette", "gradient", "flat")


@dataclass(frozen=True, slots=True)
class ResizeCase:
    """Hold one picture and Pillow's result, as 4 bytes per pixel."""

    kind: str
    content: str
    old: tuple[int, int]  # width, height
    new: tuple[int, int]
    pixels: bytes
    resized: bytes


def make_cases(seed: int, count: int) -> list[ResizeCase]:
    """Return `count` cases of one seed."""
    chance = random.Random(seed)
    return [_make_case(chance) for _ in range(count)]


def _make_case(chance: random.Random) -> ResizeCase:
    [kind] = chance.choices(list(KINDS), list(KINDS.values()))
    content = chance.choice(CONTENTS)
    old, new = _sizes(kind, chance)
    picture = Image.fromarray(_content(content, old, chance))
    resized = picture.resize(new, Image.Resampling.BICUBIC)
    return ResizeCase(
        kind, content, old, new, picture.tobytes("raw", "RGBX"), resized.tobytes("raw", "RGBX")
    )


def _side(chance: random.Random, most: int) -> int:
    """Return a side from 1 to `most`, with equal chances for each power of two."""
    return max(1, round(math.exp(math.log(most) * chance.random())))


def _sizes(kind: str, chance: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    any_size = _side(chance, 700), _side(chance, 700)
    if kind == "grow":
        old = _side(chance, 60), _side(chance, 60)
        return old, (old[0] * chance.randint(1, 12) + 1, old[1] * chance.randint(1, 12) + 1)
    if kind == "shrink by 40":
        new = chance.randint(1, 24), chance.randint(1, 24)
        return (new[0] * 40 + chance.randint(0, 9), new[1] * 40 + chance.randint(0, 9)), new
    if kind == "one pixel":
        return chance.choice([((1, 1), any_size), (any_size, (1, 1)), (any_size, (1, any_size[1]))])
    if kind == "one pass":
        other = _side(chance, 700)
        new = chance.choice([(any_size[0], other), (other, any_size[1])])
        return any_size, new
    if kind == "12000 x 60":
        return LONG_SIDES, (_side(chance, 900), _side(chance, 300))
    if kind == "60 x 12000":
        return LONG_SIDES[::-1], (_side(chance, 300), _side(chance, 900))
    if kind == "photograph":
        scale = chance.uniform(0.3, 1.1)
        old = chance.randint(300, 1400), chance.randint(300, 1400)
        new = max(28, round(old[0] * scale / 28) * 28), max(28, round(old[1] * scale / 28) * 28)
        return old, new
    return any_size, (_side(chance, 700), _side(chance, 700))


def _content(content: str, size: tuple[int, int], chance: random.Random) -> NDArray[np.uint8]:
    width, height = size
    made = np.random.default_rng(chance.getrandbits(32))
    if content == "flat":
        return np.full((height, width, 3), made.integers(0, 256, 3), np.uint8)
    if content == "gradient":
        rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
        total = rows[:, None, None] * made.random(3) + columns[None, :, None] * made.random(3)
        gradient: NDArray[np.uint8] = (total % 256).astype(np.uint8)
        return gradient
    if content == "palette":  # areas of few colours with hard edges
        colours = made.choice([0, 1, 127, 254, 255], (6, 3)).astype(np.uint8)
        cell = chance.randint(1, 9)
        cells = made.integers(0, 6, (height // cell + 1, width // cell + 1), np.uint8)
        indices = cells.repeat(cell, 0).repeat(cell, 1)[:height, :width]
        return np.take(colours, indices, axis=0)
    noise = made.integers(0, 256, (height, width, 3), np.uint8)
    return noise if content == "noise" else (noise > 127).astype(np.uint8) * np.uint8(255)
