"""Test an encoder with threads: batches within a budget, equal features, errors in their places."""

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit import batching
from qwen_vit.batching import BatchEncoder, pack
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support import IMAGES
from tests.support.export_stress import tiny_png
from tests.support.pipelines import encoder, load_threads, mixed
from tests.support.towers import gpu

# Packing


@given(st.lists(st.integers(1, 120), max_size=80), st.integers(1, 100))
def test_every_image_is_in_one_batch_and_batches_keep_the_budget(
    sizes: list[int], budget: int
) -> None:
    batches = pack(sizes, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[index] for index in batch) <= budget
        assert [sizes[i] for i in batch] == sorted((sizes[i] for i in batch), reverse=True)
    full = [sum(sizes[index] for index in batch) for batch in batches]
    # first fit leaves at most one batch less than half full
    assert sum(2 * size <= budget for size in full) <= 1


# The encoder


def test_the_features_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 300)
    simple = encoder().encode(mixed(18), on_error="skip", decode_threads=1)
    assert sum(isinstance(each, FailedImage) for each in simple) >= 3
    ahead = encoder().encode(mixed(18), on_error="skip", decode_threads=4)
    for one, other in zip(simple, ahead, strict=True):
        assert (one.id, one.size_px, str(one.error)) == (other.id, other.size_px, str(other.error))
        if isinstance(one, FailedImage):
            assert isinstance(other, FailedImage)
            continue
        assert isinstance(other, ImageFeatures)
        assert (one.grid_thw, one.notes) == (other.grid_thw, other.notes)
        assert torch.equal(one.embeds, other.embeds)


def test_an_array_is_encoded_with_its_values_at_the_call() -> None:
    def frames() -> Iterator[np.ndarray]:
        buffer = np.empty((56, 56, 3), np.uint8)
        for value in range(6):
            buffer[:] = 40 * value
            yield buffer

    own_encoder = encoder()
    single = [
        own_encoder.encode([np.full((56, 56, 3), 40 * v, np.uint8)])[0].embeds for v in range(6)
    ]
    together = own_encoder.encode_iter(frames(), decode_threads=3)
    for features, expected in zip(together, single, strict=True):
        assert (features.embeds - expected).abs().max() < 1e-4
    assert not torch.allclose(single[0], single[1], atol=1e-2)


def test_the_error_of_the_first_failed_image_is_raised(tmp_path: Path) -> None:
    (tmp_path / "late.png").write_bytes(b"")
    images: list[Any] = [
        IMAGES / "rocket.jpg",
        b"first",
        tmp_path / "late.png",
        np.zeros((2, 2, 5)),
    ]
    for threads in (1, 4):
        with pytest.raises(ImageError, match="image 1: a text file, not an image"):
            encoder().encode(images, decode_threads=threads)
    for threads in (1, 4):
        with pytest.raises(ImageError, match=r"image 0: its shape is \(2, 2, 5\)"):
            encoder().encode(images[::-1], decode_threads=threads)
    assert load_threads() == 0


def test_a_failed_array_is_released() -> None:
    """The error's traceback once referred to the image in a cycle, which only the garbage collector
    breaks."""
    gc.collect()
    gc.disable()
    try:
        array = np.full((40, 40, 3), np.nan, np.float32)
        kept = weakref.ref(array)
        [failed] = encoder().encode([array], on_error="skip", decode_threads=2)
        del array
        assert isinstance(failed, FailedImage)
        assert kept() is None
    finally:
        gc.enable()


def test_a_stopped_export_encodes_no_more_images(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(8):
        good = number < 2
        (tmp_path / f"p/{number}.png").write_bytes(tiny_png(number) if good else b"no image")
    encoded: list[int] = []

    class Watched(VisionEncoder):
        __slots__ = ()

        def forward(self, patches: Any, *more: Any) -> Any:
            encoded.append(len(patches))
            return super().forward(patches, *more)

    watched = Watched.from_pretrained("tiny", device="cpu")
    options = ExportOptions(max_failures=3)
    with pytest.raises(ExportError, match="stopped after 3 consecutive failures"):
        export_features(watched, [str(tmp_path / "p")], tmp_path / "out", options)
    assert encoded == []


@pytest.mark.parametrize("threads", [1, 4])
def test_images_before_a_failed_image_are_returned(threads: int) -> None:
    """The images wait for the following images of the same batch."""

    three = [IMAGES / "chelsea.png"] * 3

    def images() -> Iterator[Any]:
        yield from three
        raise KeyError("mine")

    cases: list[tuple[Any, type[Exception]]] = [
        ([*three, b"no image"], ImageError),
        (images(), KeyError),
    ]
    for failing, error in cases:
        given: list[Any] = []
        with pytest.raises(error):
            given.extend(encoder().encode_iter(failing, decode_threads=threads))
        assert len(given) == 3


def test_closing_a_stream_ends_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 100)
    results = encoder().encode_iter([IMAGES / "chelsea.png"] * 50, decode_threads=2)
    next(results)
    assert load_threads() == 2
    results.close()  # type: ignore[attr-defined]
    assert load_threads() == 0
    for _ in encoder().encode_iter([IMAGES / "chelsea.png"] * 50, decode_threads=2):
        break
    gc.collect()
    assert load_threads() == 0


def test_patches_of_two_images_are_refused() -> None:
    from qwen_vit.images.patches import Patches, patchify

    own_encoder = encoder()
    one = patchify(np.zeros((56, 56, 3), np.uint8), own_encoder.image_config)
    [features] = own_encoder.encode([one])
    assert features.grid_thw == (1, 4, 4)
    with pytest.raises(ImageError, match="patches of 2 images"):
        own_encoder.encode([Patches.cat([one, one])])


def test_patches_of_another_width_are_single_failures() -> None:
    """The encoder once padded narrower patches with zeros, and wider patches failed the whole
    batch."""
    from qwen_vit.config import Grid
    from qwen_vit.images.patches import Patches, patchify

    own_encoder = encoder()
    good = patchify(np.zeros((56, 56, 3), np.uint8), own_encoder.image_config)
    bad = {
        r"image 1: patches of 192 values\. Expected 588, or 1176 for a video\.": (
            192,
            Grid(1, 4, 4),
        ),
        r"image 2: patches of 294 values\. Expected 588, or 1176 for a video\.": (
            294,
            Grid(1, 4, 4),
        ),
        r"image 3: grid_thw\[0\] is \(1, 3, 5\)\. Expected height and width": (588, Grid(1, 3, 5)),
    }
    patches = [
        Patches(torch.zeros(grid.n_patches, values, dtype=torch.uint8), (grid,))
        for values, grid in bad.values()
    ]
    results = own_encoder.encode([good, *patches, Patches.cat([good, good]), good], on_error="skip")
    kinds = [ImageFeatures, *[FailedImage] * 4, ImageFeatures]
    assert [type(result) for result in results] == kinds
    for message, result in zip([*bad, "image 4: the patches of 2"], results[1:5], strict=True):
        assert re.match(message, str(result.error))
    with pytest.raises(ImageError, match="image 0: patches of 192 values"):
        own_encoder.encode([patches[0]])


def test_images_are_packed_largest_first_and_returned_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encode like a GPU, where an image's bits do not depend on the batch."""
    own_encoder = encoder()
    monkeypatch.setattr(batching, "TOKEN_BUDGET", {"cpu": 100})
    monkeypatch.setattr(batching, "WINDOW", {"cpu": 3})
    monkeypatch.setattr(
        BatchEncoder, "_batches", lambda _, window: pack([each.n_patches for each in window], 100)
    )
    sizes = [(56, 56), (112, 112), (28, 56), (84, 84), (56, 84), (112, 84), (28, 28)]
    images = [np.full((*size, 3), 30 * n, np.uint8) for n, size in enumerate(sizes)]
    batches: list[list[int]] = []
    real = VisionEncoder.forward

    def forward(self: VisionEncoder, patches: Any, grids: Any, *options: Any) -> Any:
        batches.append([grid.n_patches for grid in grids])
        return real(self, patches, grids, *options)

    monkeypatch.setattr(VisionEncoder, "forward", forward)
    together = own_encoder.encode(images)
    # the first window is one batch, and the second window has three batches
    assert batches == [[64, 16], [48, 36, 16], [24, 24]]
    for features, image in zip(together, images, strict=True):
        [alone] = own_encoder.encode([image])
        assert features.grid_thw == alone.grid_thw
        assert (alone.embeds - features.embeds).abs().max() < 1e-4


@gpu
def test_packing_on_a_gpu_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_encoder = VisionEncoder.from_pretrained("tiny", device="cuda", max_pixels=200_704)
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cuda", 2_048)
    images = mixed(60)
    together = own_encoder.encode(images, on_error="skip", decode_threads=8)
    for features, image in zip(together, images, strict=True):
        [alone] = own_encoder.encode([image], on_error="skip", decode_threads=1)
        assert type(features) is type(alone)
        if isinstance(features, ImageFeatures) and isinstance(alone, ImageFeatures):
            assert torch.equal(features.embeds, alone.embeds)
