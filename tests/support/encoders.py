"""Provide the smallest encoders and images for the tests of the encoder."""

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qwen_vit.encoder import VisionEncoder
from qwen_vit.model import VisionTower

SMALL_PIXELS = 28 * 28 * 12  # as many as a fast test wants


@cache
def tiny() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu")


@cache
def small() -> VisionEncoder:
    """Return the same encoder, with images of at most twelve merged tokens."""
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=SMALL_PIXELS)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def embeds_of(features: Any) -> Tensor:
    assert features.error is None
    assert features.embeds is not None
    return features.embeds


def forget_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Simulate a GPU with memory for `limit` patches, and record the requested sizes."""
    sizes: list[int] = []
    forward = VisionTower.forward

    def limited(self: VisionTower, patches: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(patches))
        if len(patches) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, patches, *arguments)

    monkeypatch.setattr(VisionTower, "forward", limited)
    return sizes
