"""Test that `encode` skips a bad image with its code, or raises the error."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit import batching
from qwen_vit.common.prefetch import AHEAD_JOBS
from qwen_vit.errors import ImageError
from qwen_vit.features import FailedImage
from qwen_vit.images.image import ImageLimits
from tests.support import IMAGES
from tests.support.encoders import embeds_of, picture, small

# Images that cannot be encoded


def bad_images(folder: Path) -> dict[str, Any]:
    """Return the rows of common user mistakes, by error code."""
    photograph = (IMAGES / "chelsea.png").read_bytes()
    jpeg = (IMAGES / "rocket.jpg").read_bytes()
    os.mkfifo(folder / "fifo")
    (folder / "page.jpg").write_text("<!doctype html><p>not found")
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "empty.png").touch()
    floats = np.zeros((28, 28, 3), np.float32)
    return {
        "truncated": photograph[: len(photograph) // 2],
        "truncated ": jpeg[: len(jpeg) // 2],
        "empty-file": folder / "empty.png",
        "not-an-image": folder / "page.jpg",
        "not-an-image ": folder / "pointer.jpg",
        "format": b"%PDF-1.7 and so on, long enough",
        "ratio": np.zeros((10, 2010, 3), np.uint8),
        "zero-side": np.zeros((0, 28, 3), np.uint8),
        "too-many-pixels": np.zeros((1000, 1001, 3), np.uint8),
        "file-too-large": bytes(2_000_000),
        "array-not-finite": np.full((28, 28, 3), np.nan, np.float32),
        "array-range": floats + 2,
        "array-dtype": np.zeros((28, 28, 3), np.uint16),
        "array-dtype ": np.zeros((28, 28, 3), bool),
        "array-channels": np.zeros((28, 28, 2), np.uint8),
        "array-layout": np.zeros((3, 28, 3), np.uint8),
        "array-shape": np.zeros((2, 28, 28, 3), np.uint8),
        "url": "https://example.org/cat.jpg",
        "missing": folder / "gone.jpg",
        "directory": folder,
        "not-a-file": folder / "fifo",
        "source-type": None,
        "mode": Image.new("F", (28, 28)),
    }


LIMITS = ImageLimits(max_pixels=1_000_000, max_file_bytes=1_999_999)


def test_each_bad_image_is_skipped_with_its_code(tmp_path: Path) -> None:
    bad = bad_images(tmp_path)
    good = picture(28, 28)
    images = [image for each in bad.values() for image in (each, good)]
    results = small().encode(images, on_error="skip", limits=LIMITS)
    assert len(results) == len(images)
    for code, features in zip(bad, results[0::2], strict=True):
        assert isinstance(features, FailedImage)
        assert features.code == code.strip(), features.message
        assert features.error.name == features.id
        assert features.id in features.message
        assert " at 0x" not in str(features.error)
    for features in results[1::2]:
        assert embeds_of(features).shape == (4, 192)


@pytest.mark.parametrize("code", ["truncated", "missing", "array-range", "ratio"])
def test_a_bad_image_raises_by_default(tmp_path: Path, code: str) -> None:
    image = bad_images(tmp_path)[code]
    with pytest.raises(ImageError) as caught:
        small().encode([picture(28, 28), image])
    assert caught.value.code == code


def test_the_error_of_a_skipped_image_does_not_hold_its_file(tmp_path: Path) -> None:
    """An exception's traceback keeps every frame's locals, which include the file's bytes."""
    [features] = small().encode([b"not an image"], on_error="skip")
    assert isinstance(features, FailedImage)
    assert features.error.__traceback__ is None
    assert features.error.__context__ is None


# Streaming


def test_many_failed_images_are_streamed() -> None:
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        while True:  # endless, so only a stream returns results
            taken += 1
            yield b""

    results = small().encode_iter(source(), on_error="skip")
    assert next(results).error is not None
    assert taken <= batching.IMAGES_IN_A_WINDOW + AHEAD_JOBS + 1
