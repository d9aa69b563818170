"""Test that writers reject invalid features before they write."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.feature_files import writer as writer_module
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import ImageFeatures
from tests.support.feature_file_cases import failed
from tests.support.features import METADATA, features_of

# Refusals before anything is written

NAN = ImageFeatures("bad.jpg", torch.tensor([[1.0, float("nan")]]), (1, 2, 2))
INFINITE = ImageFeatures("bad.jpg", torch.tensor([[float("-inf"), 1.0]]), (1, 2, 2))
bad_features: Any = ImageFeatures  # with arguments of other types
REFUSED: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "duplicate ids": (
        features_of("a", "b", "a"),
        METADATA,
        ("two images have the id 'a'. Give them different ids",),
    ),
    "NaN": (
        [NAN],
        METADATA,
        ("'bad.jpg' (1 of 1 image) contain NaN or infinity", 'try dtype="float32"'),
    ),
    "infinity": (
        [*features_of("a", width=2), INFINITE],
        METADATA,
        ("'bad.jpg' (1 of 2 images) contain NaN or infinity",),
    ),
    "all failed": ([failed("a"), failed("b")], METADATA, ("no image", "2 images failed")),
    "nothing": ([], METADATA, ("features is empty. Pass at least one image.",)),
    "two widths": (
        [*features_of("a"), *features_of("b", width=4)],
        METADATA,
        ("shapes (n, 4), (n, 6) do not fit into one file. Write one file for each",),
    ),
    "one axis": (
        [ImageFeatures("bad", torch.ones(4), (1, 2, 2))],
        METADATA,
        ("'bad' are torch.float32 of the shape (4,). Expected floating-point rows (n, width).",),
    ),
    "three axes": (
        [ImageFeatures("bad", torch.ones(1, 1, 4), (1, 2, 2))],
        METADATA,
        ("of the shape (1, 1, 4)",),
    ),
    "integers": (
        [*features_of("a"), ImageFeatures("bad", torch.ones(1, 6, dtype=torch.int32), (1, 2, 2))],
        METADATA,
        ("'bad' are torch.int32",),
    ),
    "an empty grid": (
        [ImageFeatures("bad", torch.ones(1, 6), (0, 0, 0))],
        METADATA,
        ("'bad' has 1 rows for a grid of (0, 0, 0). Expected a whole number of patches",),
    ),
    "NaN in the metadata": (features_of("a"), {"x": float("nan")}, ("be written as JSON (",)),
    "no JSON": (
        features_of("a"),
        {"x": object},
        ("its metadata cannot be written as JSON (", "Pass VisionEncoder.metadata()."),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_invalid_features_are_refused_before_a_write(path: Path, reason: str) -> None:
    write_features(path, features_of("old"), METADATA)
    before = path.read_bytes()
    features, metadata, words = REFUSED[reason]
    with pytest.raises(ExportError) as caught:
        write_features(path, features, metadata)
    assert caught.value.name == str(path)
    assert caught.value.remedy
    for word in (f"{path}: ", *words):
        assert word in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_header_above_the_limit_of_readers_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_HEADER_BYTES", 2_000)
    write_features(path, features_of("a"), METADATA)
    with pytest.raises(ExportError, match=r"its header would have \d+ bytes.*fewer images"):
        write_features(path, features_of("n" * 2_000), METADATA)
    assert load_features(path).ids == ["a"]


# Atomic


def test_merged_and_patch_features_do_not_share_a_file(tmp_path: Path) -> None:
    merged = ImageFeatures("a.jpg", torch.zeros(4, 8), (1, 4, 4))
    patch = ImageFeatures("b.jpg", torch.zeros(16, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r".a.jpg. has 4 and .b\.jpg. has 1"):
        write_features(tmp_path / "f.safetensors", [merged, patch], {})
    for features, expected in ((merged, 4), (patch, 1)):
        path = write_features(tmp_path / f"{expected}.safetensors", [features], {})
        assert load_features(path).metadata["patches_per_row"] == expected


def test_rows_that_do_not_fit_their_grid_are_refused(tmp_path: Path) -> None:
    wrong = ImageFeatures("a.jpg", torch.zeros(5, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r".a\.jpg. has 5 rows for a grid of"):
        write_features(tmp_path / "f.safetensors", [wrong], {})


@pytest.mark.parametrize(
    ("features", "metadata", "message"),
    [
        (None, {}, "features is None. Expected a list of ImageFeatures"),
        ([torch.zeros(1, 4)], {}, r"features contains tensor.*\(Tensor\)\. Expected ImageFeatures"),
        (
            torch.zeros(1, 4),
            {},
            r"features is tensor.*\(Tensor\)\. Expected a list of ImageFeatures",
        ),
        (
            [bad_features(7, torch.zeros(1, 4), (1, 2, 2))],
            {},
            "the id 7 and the grid_thw .1, 2, 2",
        ),
        (
            [bad_features("a", torch.zeros(1, 4), (2, 2))],
            {},
            "the grid_thw .2, 2.\\. Expected text",
        ),
        (
            [bad_features("a", torch.zeros(1, 4), torch.tensor([1, 2, 2]))],
            {},
            "the grid_thw tensor.* Expected text and three whole numbers",
        ),
        ([bad_features("a", torch.zeros(1, 4), None)], {}, "the grid_thw None. Expected text"),
        (
            [ImageFeatures("a", torch.zeros(1, 4), (1, 2, 2))],
            None,
            "metadata is None. Expected a mapping. Pass encoder.metadata",
        ),
    ],
)
def test_values_that_are_not_features_are_refused(
    tmp_path: Path, features: Any, metadata: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        write_features(tmp_path / "a.safetensors", features, metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "embeds", [torch.zeros(1, 4).numpy(), torch.zeros(1, 4).to_sparse(), [[0.0] * 4]]
)
def test_embeddings_that_are_not_a_dense_tensor_are_refused(tmp_path: Path, embeds: Any) -> None:
    features = [ImageFeatures("a", embeds, (1, 2, 2))]
    with pytest.raises(ExportError, match=r"embeddings of 'a' .*\. Expected a dense torch"):
        write_features(tmp_path / "a.safetensors", features, {})


def test_a_path_that_readers_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not UTF-8\. Expected a path that safetensors can"):
        write_features(
            f"{tmp_path}/caf\udce9", [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))], {}
        )
    assert not list(tmp_path.iterdir())
