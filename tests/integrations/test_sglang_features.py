"""Test features for SGLang's engine: images in one item, and no videos."""

import pytest
import torch

from qwen_vit import ImageFeatures
from qwen_vit.errors import ArgumentError
from qwen_vit.integrations.sglang import to_sglang


def made(t: int, name: str) -> ImageFeatures:
    return ImageFeatures(name, torch.ones(6 * t, 8), (t, 4, 6))


def test_pictures_of_a_request_are_one_item() -> None:
    """SGLang 0.5.23 rejects a request with more than one precomputed item of a kind."""
    [item] = to_sglang(iter([made(1, "a.jpg"), made(1, "b.jpg")]))
    assert item["feature"].shape == (12, 8)
    assert item["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6]]


def test_a_video_is_refused_by_its_name() -> None:
    """SGLang 0.5.23 passes a video's features to its tower, and its scheduler crashes."""
    with pytest.raises(ArgumentError, match=r"clip\.mp4: its grid has 3 time steps"):
        to_sglang([made(1, "a.jpg"), made(3, "clip.mp4")])
