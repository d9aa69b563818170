"""Test that the GPU resizes decoded pictures like the CPU, and the CPU if GPU memory is short."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import batching
from qwen_vit import encoder as encoder_module
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.features import FailedImage
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.images.picture import Picture
from tests.support.encoders import tiny
from tests.support.images import noise
from tests.support.towers import gpu

SIZES = [(60, 100), (56, 84), (130, 40)]


def resized_here(
    parts: Sequence[Patches | Picture], device: torch.device, *, pinned_rows: int
) -> Patches:
    """Resize a picture with the CPU code, like the GPU."""
    return Patches.cat(part.patchify() if isinstance(part, Picture) else part for part in parts)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the loader return pictures. Returns a list of the number of pictures in each batch."""
    batches: list[int] = []

    def resize(parts: Sequence[Any], *args: Any, **options: Any) -> Patches:
        batches.append(sum(isinstance(part, Picture) for part in parts))
        return resized_here(parts, *args, **options)

    monkeypatch.setattr(encoder_module, "resizes_on", lambda device: True)
    monkeypatch.setattr(batching, "patches_on_gpu", resize)
    return batches


def images() -> list[Image.Image]:
    return [Image.fromarray(noise(h, w, seed=w)) for h, w in SIZES]


def test_pictures_and_patches_have_the_same_features(as_on_gpu: list[int]) -> None:
    mixed: list[Any] = images()
    expected = tiny().encode([patchify(image, tiny().image_config) for image in mixed])
    assert as_on_gpu == []  # nothing to resize
    mixed[1] = patchify(mixed[1], tiny().image_config)
    found = tiny().encode(mixed)
    assert as_on_gpu == [2]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.embeds, theirs.embeds)
    assert [each.size_px for each in found] == [SIZES[0], (0, 0), SIZES[2]]


def test_a_generator_may_reuse_its_image_and_listed_images_do_not_change(
    as_on_gpu: list[int],
) -> None:
    """A generator may return the same image object with new pixels each time."""
    expected = tiny().encode(images()[:2])
    canvas = Image.new("RGB", SIZES[0][::-1])

    def drawn() -> Iterator[Image.Image]:
        for image in images():
            canvas.paste(image.resize(canvas.size), (0, 0))
            yield canvas

    [first, *_] = tiny().encode(drawn())
    assert torch.equal(first.embeds, expected[0].embeds)
    given = images()
    before = [np.asarray(each).copy() for each in given]
    tiny().encode(given)
    for image, pixels in zip(given, before, strict=True):
        assert np.array_equal(np.asarray(image), pixels)


def modes(folder: Path) -> list[Image.Image]:
    """Return images that need a conversion or a rotation, and an image that is not loaded yet."""
    image = Image.fromarray(noise(60, 100, seed=5))
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # a quarter turn
    image.save(folder / "lazy.png")
    converted = [image.convert(mode) for mode in ("L", "LA", "RGBA", "P", "CMYK", "1")]
    return [*converted, turned, Image.open(folder / "lazy.png")]


def test_every_image_mode_is_resized_as_a_picture(as_on_gpu: list[int], tmp_path: Path) -> None:
    loaded = [load_image(image).picture for image in modes(tmp_path)]
    expected = tiny().encode([patchify(each, tiny().image_config) for each in loaded])
    found = tiny().encode(modes(tmp_path))
    assert as_on_gpu == [len(found)]
    assert found[6].size_px == (100, 60)  # turned
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.embeds, theirs.embeds)


def out_of_memory(*_: Any, **__: Any) -> Patches:
    raise torch.cuda.OutOfMemoryError("no room")


def test_a_picture_without_gpu_memory_is_resized_on_the_cpu(
    as_on_gpu: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tiny().encode(images())
    monkeypatch.setattr(batching, "patches_on_gpu", out_of_memory)
    with caplog.at_level(logging.WARNING, "qwen_vit"):
        found = tiny().encode(images())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.embeds, theirs.embeds)  # the batches differ
    assert sum("the CPU resizes " in message for message in caplog.messages) == len(SIZES)


def test_a_picture_without_gpu_and_cpu_memory_is_an_error(
    as_on_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(picture: Picture) -> Patches:
        raise ImageError("does not fit into memory when resized", name="x", code="memory")

    monkeypatch.setattr(batching, "patches_on_gpu", out_of_memory)
    monkeypatch.setattr(Picture, "patchify", no_memory)
    [failed] = tiny().encode(images()[:1], on_error="skip")
    assert isinstance(failed, FailedImage)
    assert failed.code == "memory"
    with pytest.raises(ImageError):
        tiny().encode(images()[:1])


def test_a_single_image_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    [image] = images()[:1]
    for given in (image, [image], np.asarray(image), patchify(image, tiny().image_config)):
        tiny().encode(given)
    with pytest.raises(AssertionError, match="a thread"):
        tiny().encode([image, image])


@gpu
def test_a_picture_larger_than_the_free_gpu_memory_is_encoded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda", max_pixels=200_000)
    image = Image.fromarray(np.tile(noise(500, 700), (20, 10, 1)))  # 280 MB
    expected = encoder.encode(patchify(image, encoder.image_config))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 200 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with caplog.at_level(logging.WARNING, "qwen_vit"):
            found = encoder.encode(image)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "the CPU resizes " in caplog.text
    assert torch.equal(found.embeds, expected.embeds)
