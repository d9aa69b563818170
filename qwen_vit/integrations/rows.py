"""Merged rows and grids, checked: what every language model takes.

transformers, vLLM and SGLang want the same thing: merged rows (sum n, D), image after image in the
prompt's order, with n = t * h * w / 4 rows for the grid (t, h, w) of each image. None of them
checks it well (vLLM's engine may crash on a wrong count), so it is checked here.
"""

import math
from collections.abc import Iterable
from operator import index

import torch
from torch import Tensor

from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.features import FailedImage, ImageFeatures, check_features

__all__ = ["MERGE_SIZE", "count_tokens", "rows_and_grids", "whole_numbers"]

MERGE_SIZE = 2


def rows_and_grids(features: Iterable[ImageFeatures | FailedImage]) -> tuple[list[Tensor], Tensor]:
    """Each image's merged rows, and all grids (N, 3), once every promise about them was checked."""
    images = check_features(features)
    if not images:
        raise ArgumentError("there are no images in it, expected one at least; leave images out")
    embeds = [_merged_rows(image) for image in images]
    good = [image for image in images if isinstance(image, ImageFeatures)]
    kinds = {
        (rows.shape[1], rows.dtype): image.id for rows, image in zip(embeds, images, strict=True)
    }
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise ExportError(
            f"{one!r} has rows of {first[0]} {first[1]} and {other!r} of {second[0]} {second[1]}, "
            "expected the same; take features of one model and data type"
        )
    grids = [image.grid_thw for image in good]
    return embeds, torch.tensor(grids, dtype=torch.int64, device="cpu")


def _merged_rows(image: ImageFeatures | FailedImage) -> Tensor:
    if isinstance(image, FailedImage):
        raise ExportError(f"{image.id!r} has no features ({image.error}); leave it out")
    expected = count_tokens(image.grid_thw, MERGE_SIZE)
    if image.embeds.dim() != 2 or len(image.embeds) != expected:
        raise ExportError(
            f"{image.id!r} has features of shape {tuple(image.embeds.shape)}, expected {expected} "
            f"merged rows for its grid of {image.grid_thw}; a language model takes "
            'output="merged", neither "patch" nor "mean": encode or export again with it'
        )
    if not image.embeds.is_floating_point() or not all_finite(image.embeds):
        raise ExportError(
            f"{image.id!r} has features of {image.embeds.dtype} with NaN, infinity or integers, "
            "expected finite floating-point numbers; encode or export it again"
        )
    return image.embeds


def whole_numbers(grid: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, grid))
    except TypeError:  # 4.7 is no 4
        raise ArgumentError(
            f"a grid is {grid!r}, expected whole numbers of frames, height and width in patches; "
            "pass what came with the features"
        ) from None


def count_tokens(grid: tuple[int, ...], merge_size: int) -> int:
    is_whole = len(grid) == 3 and min(grid) > 0 and not any(n % merge_size for n in grid[1:])
    if not is_whole:
        raise ArgumentError(
            f"a grid is {grid}, expected frames, height and width in patches, the latter two "
            f"multiples of {merge_size}; pass what came with the features"
        )
    return math.prod(grid) // merge_size**2
