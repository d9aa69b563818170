"""Compute cosine similarities between images, or between parts of images."""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ArgumentError, ExportError, plural, with_options
from qwen_vit.features import TRY_FLOAT32, AnyFeatures, FailedImage, check_features
from qwen_vit.kernels.pooling import unit_rows

__all__ = ["similarity"]

Rows: TypeAlias = AnyFeatures | Tensor | NDArray[Any]


def similarity(a: Rows, b: Rows | None = None) -> Tensor:
    """Return the cosine similarity of every row of `a` to every row of `b`, or of `a` if `b` is
    None.

    >>> from qwen_vit import VisionEncoder
    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> images = ["tests/photographs/rocket.jpg", "tests/photographs/chelsea.png"]
    >>> similarity(encoder.encode(images, output="mean")).shape
    torch.Size([2, 2])
    >>> rocket = encoder.encode(images[0])
    >>> similarity(rocket.map[0, 7, 11][None], rocket).view(15, 23).shape
    torch.Size([15, 23])

    Args:
        a: the features of one image, or a list or feature file of several images with one row each
            (`output="mean"`). You may also pass rows (N, D), such as `features.layers[7]`.
        b: features or rows to compare with `a`. None compares `a` with itself.

    Returns:
        A float32 tensor (rows of a, rows of b) from -1 to 1, on the device of `a`. A row of zeros
        has the cosine similarity 0 with every row.

    Raises:
        ArgumentError: An argument is neither features nor floating-point rows (N, D), contains no
            image, or contains NaN or infinity. The outputs or the widths differ, or one of several
            images does not have exactly one row.
        ExportError: One of the images failed.
    """
    left, output = _unit_rows("a", a)
    right, other = (left, output) if b is None else _unit_rows("b", b)
    right = right.to(left.device)
    if None not in (output, other) and output != other:
        raise _other_output(f"a contains {output} features, and b contains {other} features")
    if left.shape[1] != right.shape[1]:
        raise ArgumentError(
            f"a has rows of {left.shape[1]} values, and b has rows of {right.shape[1]} values",
            expected="the same width",
            remedy="compare features of one model and output",
        )
    with torch.autocast(left.device.type, enabled=False):
        return (left @ right.T).clamp_(-1.0, 1.0)


def _other_output(fact: str) -> ArgumentError:
    return ArgumentError(
        fact,
        expected="features of one output",
        remedy="encode all images with one output, or pass rows, such as features.embeds",
    )


def _unit_rows(name: str, given: Rows) -> tuple[Tensor, str | None]:
    """Return the rows with unit length, and the output of features, or None for other rows."""
    rows, output = _rows(name, given)
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ArgumentError(
            f"{name} has the dtype {rows.dtype} and the shape {tuple(rows.shape)}",
            expected="floating-point rows (N, D)",
            remedy="pass a vector v as v[None], and convert integers to float32",
        )
    if not all_finite(rows):
        raise ArgumentError(
            f"{name} contains NaN or infinity",
            expected="finite numbers",
            remedy=TRY_FLOAT32,
        )
    return unit_rows(rows.detach().float()), output


def _rows(name: str, given: Rows) -> tuple[Tensor, str | None]:
    if isinstance(given, Tensor):
        return given, None
    if isinstance(given, np.ndarray):
        return torch.from_numpy(given), None
    images: list[Tensor] = []
    output = None
    for image in check_features(given, name):
        if isinstance(image, FailedImage):
            raise ExportError(
                f"this image failed: {image.error.fact}", name=image.id, remedy="omit the image"
            )
        images.append(image.embeds)
        if output not in (None, image.output):
            raise _other_output(f"{name} contains {output} features, and {image.output} features")
        output = image.output
    if not images:
        raise ArgumentError(f"{name} contains no image", remedy="pass at least one image")
    if len(images) == 1:
        return images[0], output
    many = next((rows for rows in images if len(rows) != 1), None)
    if many is not None:
        raise ArgumentError(
            f"{name} contains {plural(len(images), 'image')}, and one of the images has "
            f"{len(many)} rows",
            expected="one row per image, or a single image",
            remedy=with_options(
                "encode them with {}, or compare one image at a time", ("output", "mean")
            ),
        )
    shapes = {tuple(rows.shape[1:]) for rows in images}
    if len(shapes) > 1:
        raise ArgumentError(
            f"{name} contains rows of the shapes {', '.join(map(str, sorted(shapes)))}",
            expected="one shape",
            remedy="compare features of one model and output",
        )
    device = images[0].device
    return torch.cat([rows.to(device) for rows in images]), output
