"""Check merged rows and grids, which language models take in place of pixels.

transformers, vLLM and SGLang accept merged rows (sum n, D), in the order of the prompt's images. An
image's grid (t, h, w) gives the number of rows, n = t * h * w / 4. None of the three programs
checks this number completely, and vLLM's engine may crash if the number is wrong. Therefore this
module checks it.
"""

import math
from collections.abc import Iterable, Sequence
from operator import index

import torch
from torch import Tensor

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.strict_json import is_number
from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ArgumentError, ExportError, plural
from qwen_vit.features import (
    AnyFeatures,
    FailedImage,
    ImageFeatures,
    VideoFeatures,
    check_features,
)

__all__ = [
    "MERGE_SIZE",
    "check_modalities",
    "count_tokens",
    "rows_and_grids",
    "split_videos",
    "whole_numbers",
]

MERGE_SIZE = 2
AS_FEATURES = "pass the grid_thw of the features"

Found = ImageFeatures | FailedImage
Rows = tuple[list[Tensor], Tensor]  # merged rows per item, and all grids (N, 3)


def rows_and_grids(features: AnyFeatures) -> tuple[list[Tensor], Tensor]:
    """Return each image's merged rows (n, D), and all grids (N, 3) int64.

    >>> rows, grids = rows_and_grids([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> [part.shape for part in rows], grids
    ([torch.Size([6, 8])], tensor([[1, 4, 6]]))
    """
    images = check_features(features)
    if not images:
        raise ArgumentError("features is empty", remedy="pass at least one image")
    embeds = [_merged_rows(image) for image in images]
    good = [image for image in images if isinstance(image, ImageFeatures)]
    kinds = {
        (rows.shape[1], rows.dtype): image.id for rows, image in zip(embeds, images, strict=True)
    }
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise ExportError(
            f"{one!r} has rows of width {first[0]} in {first[1]}, and {other!r} has rows of width "
            f"{second[0]} in {second[1]}",
            expected="one width and one data type",
            remedy="pass features of one model and data type",
        )
    grids = [image.grid_thw for image in good]
    return embeds, torch.tensor(grids, dtype=torch.int64, device="cpu")


def split_videos(
    features: AnyFeatures, videos: AnyFeatures, second_per_grid_ts: Sequence[float] = ()
) -> tuple[list[Found], list[Found], list[float]]:
    """Split features into images, videos and seconds per video.

    If the caller passes `second_per_grid_ts`, these values replace the videos' own values.

    >>> clip = VideoFeatures("a.mp4", torch.ones(6, 8), (1, 4, 6), second_per_grid_t=0.5)
    >>> pictures, clips, seconds = split_videos([clip], [])
    >>> len(pictures), len(clips), seconds
    (0, 1, [0.5])
    """
    given = check_features(features)
    pictures = [each for each in given if not isinstance(each, VideoFeatures)]
    clips = check_features(videos, "videos")
    clips = [each for each in given if isinstance(each, VideoFeatures)] + clips
    seconds = list(second_per_grid_ts)
    if not seconds and all(isinstance(each, VideoFeatures) for each in clips):
        seconds = [each.second_per_grid_t for each in clips if isinstance(each, VideoFeatures)]
    return pictures, clips, seconds


def check_modalities(
    features: AnyFeatures,
    videos: AnyFeatures,
    second_per_grid_ts: Sequence[float],
    width: int | None = None,
) -> tuple[Rows | None, Rows | None]:
    """Return the rows and grids of images and of videos, or None for an empty kind.

    The function rejects input that would stop an engine for all its users.
    """
    pictures, clips = check_features(features), check_features(videos, "videos")
    seconds = list(second_per_grid_ts)
    if len(seconds) != len(clips):
        raise ArgumentError(
            f"second_per_grid_ts has {plural(len(seconds), 'value')} for "
            f"{plural(len(clips), 'video')}",
            expected="one for each video",
            remedy="pass 2 / (frames per second) for each video",
        )
    for value in seconds:
        if not is_number(value) or value <= 0:
            raise ArgumentError(
                f"second_per_grid_ts contains {short_repr(value)}", expected="seconds above 0"
            )
    rows, grids = rows_and_grids([*pictures, *clips])
    if width is not None and rows[0].shape[1] != width:
        raise ExportError(
            f"its features are {rows[0].shape[1]} wide",
            name=[*pictures, *clips][0].id,
            expected=f"{width}, the language model's width",
            remedy="encode the image with the model that the engine serves",
        )
    n = len(pictures)
    for image, (t, _, _) in zip(pictures, grids[:n].tolist(), strict=True):
        if t != 1:
            raise ArgumentError(
                f"its grid has {t} time steps",
                name=image.id,
                expected="an image with one time step",
                remedy="pass a video in videos=, and its seconds in second_per_grid_ts=",
            )
    return (
        (rows[:n], grids[:n]) if pictures else None,
        (rows[n:], grids[n:]) if clips else None,
    )


def _merged_rows(image: ImageFeatures | FailedImage) -> Tensor:
    if isinstance(image, FailedImage):
        raise ExportError(
            f"this image failed: {image.error.fact}", name=image.id, remedy="omit the image"
        )
    expected = count_tokens(image.grid_thw, MERGE_SIZE)
    is_mean = image.output == "mean"
    if image.embeds.dim() != 2 or len(image.embeds) != expected or is_mean:
        raise ExportError(
            f"its features have the shape {tuple(image.embeds.shape)}"
            f"{' and are a mean' if is_mean else ''}",
            name=image.id,
            expected=f"{expected} merged rows for its grid of {image.grid_thw}",
            remedy='encode or export the image again with output="merged", neither "patch" nor '
            '"mean"',
        )
    is_float = image.embeds.is_floating_point()
    if not is_float or not all_finite(image.embeds):
        fact = f"its features are {image.embeds.dtype}"
        raise ExportError(
            f"{fact} with NaN or infinity" if is_float else fact,
            name=image.id,
            expected="finite floating-point numbers",
            remedy="encode or export the image again",
        )
    return image.embeds


def whole_numbers(grid: Iterable[int]) -> tuple[int, ...]:
    """Convert a grid from a tuple, an array or a tensor to integers.

    >>> whole_numbers(torch.tensor([1, 4, 6]))
    (1, 4, 6)
    """
    try:
        return tuple(map(index, grid))
    except TypeError:
        raise ArgumentError(
            f"a grid is {short_repr(grid)}",
            expected="whole numbers: time steps, and height and width in patches",
            remedy=AS_FEATURES,
        ) from None


def count_tokens(grid: tuple[int, ...], merge_size: int) -> int:
    """Count the merged tokens of an image or video, and reject an invalid grid.

    >>> count_tokens((1, 4, 6), merge_size=2)
    6
    """
    is_whole = len(grid) == 3 and min(grid) > 0 and not any(n % merge_size for n in grid[1:])
    if not is_whole:
        raise ArgumentError(
            f"a grid is {grid}",
            expected="time steps, height and width in patches, all above 0, and the latter two "
            f"multiples of {merge_size}",
            remedy=AS_FEATURES,
        )
    return math.prod(grid) // merge_size**2
