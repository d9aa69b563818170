"""Test that the encoder halves a batch if memory runs out, and names an image that is too large."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit import batching
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support.encoders import embeds_of, forget_above, picture, png, small
from tests.support.oracle import relative_error

# Streaming


def test_an_image_larger_than_the_budget_is_encoded_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [picture(84, 112, seed) for seed in range(3)]
    expected = small().encode(images)
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 8)
    for ours, other in zip(small().encode(images), expected, strict=True):
        assert relative_error(embeds_of(ours), embeds_of(other)) < 1e-6


# Out of memory


def test_a_batch_out_of_memory_is_halved_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [picture(56, 56 + 28 * (i % 2), i) for i in range(7)]
    expected = small().encode(images)
    sizes = forget_above(48, monkeypatch)
    results = small().encode(images)
    assert sizes[0] == 4 * 4 * 4 + 3 * 4 * 6
    assert max(sizes[1:]) > 48  # the encoder halved more than once
    assert [features.grid_thw for features in results] == [f.grid_thw for f in expected]
    for ours, other in zip(results, expected, strict=True):
        assert relative_error(embeds_of(ours), embeds_of(other)) < 1e-6


def test_a_batch_is_released_before_its_halves_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test simulates a result that fits into the GPU's memory, while a copy of it does not."""
    results: list[weakref.ref[Tensor]] = []
    kept: list[bool] = []
    forward = VisionEncoder.forward

    def watched(self: VisionEncoder, *arguments: Any) -> Tensor:
        kept.extend(result() is not None for result in results)
        result = forward(self, *arguments)
        results.append(weakref.ref(result))
        return result

    def copies(result: Tensor, rows: list[int]) -> list[Tensor]:
        if len(results) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [part.clone() for part in result.split(rows)]

    monkeypatch.setattr(VisionEncoder, "forward", watched)
    encoder = small()
    monkeypatch.setattr(torch, "split_with_sizes_copy", copies)
    assert len(encoder.encode([picture(56, 56, seed) for seed in range(2)])) == 2
    assert kept[:1] == [False]


def test_one_image_out_of_memory_is_named_and_skipped_or_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(png(picture(84, 112)))
    images: list[Any] = [picture(56, 56), large, picture(56, 56, 1)]
    forget_above(16, monkeypatch)
    results = small().encode(images, on_error="skip")
    assert [type(each) for each in results] == [ImageFeatures, FailedImage, ImageFeatures]
    failed = results[1]
    assert isinstance(failed, FailedImage)
    error = failed.error
    assert (failed.size_px, error.code) == ((84, 112), "out-of-memory")
    for word in (str(large), "48 patches", "cpu", "Lower max_pixels"):
        assert word in str(error)
    with pytest.raises(ImageError, match="do not fit into the memory") as caught:
        small().encode(images)
    assert caught.value.code == "out-of-memory"
