"""Make features by hand, for tests of files."""

import os

import torch

from qwen_vit.features import ImageFeatures

METADATA = {"model": "tiny", "commit": None, "dtype": "float32"}


ODD_IDS = {
    "unicode": "фото/猫 🐈.jpg",
    "newline": "two\nlines\r\t.jpg",
    "bytes": os.fsdecode(b"caf\xe9\xff.jpg"),  # surrogates, which no Unicode text contains
    "255 bytes": "n" * 251 + ".jpg",
    "leading dash": "--out",
    "quotes": '"\\',
    "nul and delete": "a\x00b\x7f",
    "empty": "",
}


def features_of(
    *names: str, dtype: torch.dtype = torch.float32, width: int = 6
) -> list[ImageFeatures]:
    """Return images of 1, 2, 3, ... tokens, each with different values."""
    made = []
    for index, name in enumerate(names, start=1):
        values = torch.randn(index, width, generator=torch.Generator().manual_seed(index))
        made.append(ImageFeatures(name, values.to(dtype), (1, 2, 2 * index)))
    return made


def features_with_grids(
    *grids: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> list[ImageFeatures]:
    """Return a merged image for each grid, with 8 values in a token."""
    return [
        ImageFeatures(str(i), torch.full((t * h * w // 4, 8), i + 0.5, dtype=dtype), (t, h, w))
        for i, (t, h, w) in enumerate(grids)
    ]


def random_features(
    name: str, grid: tuple[int, int, int], seed: int = 0, width: int = 8
) -> ImageFeatures:
    """Return a merged image or video of a grid, with different values."""
    t, h, w = grid
    rows = torch.randn(t * h * w // 4, width, generator=torch.Generator().manual_seed(seed))
    return ImageFeatures(name, rows, grid)
