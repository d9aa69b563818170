"""Test that `encode_iter` reads images batch by batch, and keeps no encoded image."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen_vit import batching
from qwen_vit.images import patches as patches_module
from qwen_vit.images.patches import Patches
from tests.support.encoders import embeds_of, picture, small


def test_encode_iter_takes_images_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 images of 48 patches fit into a budget of 200. The encoder reads the fifth image to find
    that it does not fit."""
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 200)
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for seed in range(14):
            taken += 1
            yield picture(84, 112, seed)

    results = small().encode_iter(source(), decode_threads=1)
    assert taken == 0
    for index, features in enumerate(results):
        assert embeds_of(features).shape == (12, 192)
        assert taken == min(14, index // 4 * 4 + 5)
    assert index == 13


def test_encode_iter_holds_no_image_it_has_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 200)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    watched = patches_module.Patches.cat
    largest = 0

    def counting(parts: Any, **options: Any) -> Patches:
        nonlocal largest
        joined = watched(parts, **options)
        alive.add(joined.pixels)
        largest = max(largest, len(alive))
        return joined

    monkeypatch.setattr(Patches, "cat", counting)
    assert len(list(small().encode_iter(picture(84, 112, seed) for seed in range(20)))) == 20
    assert largest <= 2
