"""Test cosine similarities of images and of their parts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import similarity
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support.features import METADATA, features_of
from tests.support.oracle import relative_error


def vectors(count: int, width: int = 6, seed: int = 0) -> list[ImageFeatures]:
    made = torch.Generator().manual_seed(seed)
    return [
        ImageFeatures(f"{i}.jpg", torch.randn(1, width, generator=made), (1, 2, 2), output="mean")
        for i in range(count)
    ]


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.double(), b.double()
    return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)[None, :])


def rows_of(features: Any) -> torch.Tensor:
    return torch.cat([each.embeds for each in features])


def test_images_are_compared_by_their_vectors(tmp_path: Path) -> None:
    a, b = vectors(5), vectors(3, seed=1)
    ours = similarity(a, b)
    assert (ours.shape, ours.dtype) == ((5, 3), torch.float32)
    assert relative_error(ours, cosines(rows_of(a), rows_of(b))) < 1e-6
    stored = load_features(write_features(tmp_path / "a", a, METADATA))
    assert torch.equal(similarity(stored, b), ours)
    assert torch.equal(similarity(stored[[3, 1]], b), ours[[3, 1]])
    assert torch.equal(similarity(rows_of(a).numpy(), b), ours)
    assert torch.equal(similarity(iter(a), iter(b)), ours)


def test_one_argument_is_compared_with_itself() -> None:
    a = vectors(4)
    ours = similarity(a)
    assert torch.equal(ours, similarity(a, a))
    assert torch.allclose(ours.diagonal(), torch.ones(4))
    assert float(ours.max()) <= 1.0
    assert torch.allclose(ours, ours.T)


def test_the_parts_of_two_images_are_compared_row_by_row() -> None:
    one, other = features_of("a", "b", "c")[1:]
    ours = similarity(one, other)
    assert ours.shape == (2, 3)
    assert relative_error(ours, cosines(one.embeds, other.embeds)) < 1e-6
    assert torch.equal(similarity([one], other), ours)
    assert torch.equal(similarity(one.embeds[1][None], other), ours[1:])


def test_any_dtype_and_scale_is_compared_in_float32() -> None:
    a = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for scale in (1e-38, 1e30):
        assert relative_error(similarity(a * scale, a), cosines(a, a)) < 1e-5
    half = a.bfloat16()
    assert relative_error(similarity(half), cosines(half, half)) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(a), similarity(a, a))
        assert relative_error(similarity(a), cosines(a, a)) < 1e-6


def test_a_row_of_zeros_has_similarity_zero() -> None:
    assert similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0, 0], [0, 1]]


MANY = features_of("a", "b")
NAN = torch.tensor([[1.0, float("nan")]])
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "dense images": (
        MANY,
        None,
        ArgumentError,
        r"a contains 2 images, and one of the images has 2 rows\. Exp",
    ),
    "dense b": (vectors(1), MANY, ArgumentError, r"b contains 2 images"),
    "none": ([], None, ArgumentError, r"a contains no image\. Pass at least one"),
    "widths": (
        vectors(2),
        vectors(2, 5),
        ArgumentError,
        "a has rows of 6 values, and b has rows of 5 values",
    ),
    "outputs": (
        vectors(2),
        [replace(vectors(1)[0], output="merged")],
        ArgumentError,
        "a contains mean features, and b contains merged features. Expected features of one",
    ),
    "outputs in b": (
        vectors(1),
        [*vectors(1), replace(vectors(1)[0], output="merged")],
        ArgumentError,
        "b contains mean features, and merged features",
    ),
    "widths in a": ([*vectors(1), *vectors(1, 5)], None, ArgumentError, r"shapes \(5,\), \(6,\)"),
    "failed": (
        [*vectors(1), FailedImage("x.jpg", ImageError("ends early", name="x.jpg"))],
        None,
        ExportError,
        r"x\.jpg: this image failed: ends early\. Omit the image",
    ),
    "NaN": (NAN, None, ArgumentError, r"a contains NaN or infinity\. Expected finite"),
    "infinity": (NAN.nan_to_num(nan=float("inf")), None, ArgumentError, "NaN or infinity"),
    "integers": (
        torch.ones(2, 2, dtype=torch.int64),
        None,
        ArgumentError,
        "a has the dtype torch.int64",
    ),
    "a vector": (torch.ones(3), None, ArgumentError, r"shape \(3,\).* v as v\[None\]"),
    "a map": (torch.ones(1, 2, 2, 3), None, ArgumentError, r"shape \(1, 2, 2, 3\)"),
    "a path": ("cat.jpg", None, ArgumentError, r"a is 'cat.jpg'\. Expected a list"),
    "a number": (3, None, ArgumentError, r"a is 3 \(int\)"),
    "None in b": (vectors(1), [None], ArgumentError, "b contains None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_without_a_cosine_are_refused(case: str) -> None:
    a, b, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        similarity(a, b)


def test_the_public_name_is_the_function_after_an_import_of_the_module() -> None:
    import qwen_vit
    import qwen_vit.cosine

    assert qwen_vit.similarity is qwen_vit.cosine.similarity
