"""Test dense features of chosen blocks: their block, their order, and unchanged other bits."""

from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.compare.oracle import Trace
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.patches import patchify
from tests.support.encoders import picture, tiny
from tests.support.oracle import relative_error
from tests.support.towers import CPU, gpu, layout_for, tower_trace

SIZES = ((56, 84), (140, 112), (28, 28), (252, 84))  # sizes with partial windows at each edge


def pictures() -> list[Any]:
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


def traced(image: Any) -> tuple[Trace, torch.Tensor]:
    """Return each block's output from a hook, in window order, and the row-major place of each
    row."""
    patches = patchify(image, tiny().image_config)
    [grid] = patches.grids
    layout = layout_for([grid], tiny().config, CPU)
    trace = tower_trace(tiny().tower, patches.pixels, [grid])
    return trace, (layout.positions[:, 0] * grid.w + layout.positions[:, 1]).long()


@pytest.mark.parametrize("layers", [(0,), (4,), (3, 1), range(5)])
def test_layers_are_the_residual_stream_behind_their_blocks_row_by_row(layers: Any) -> None:
    for image in pictures():
        ours = tiny().encode(image, layers=layers)
        trace, place = traced(image)
        assert list(ours.layers) == sorted(layers)
        for block, rows in ours.layers.items():
            expected = torch.empty_like(rows)
            expected[place] = trace[f"block.{block}"]
            assert torch.equal(rows, expected)
            assert rows.shape == (ours.grid_thw[1] * ours.grid_thw[2], 160)


@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_layers_change_no_bit_of_the_embeddings(output: Any) -> None:
    plain = tiny().encode(pictures(), output=output)
    with_layers = tiny().encode(pictures(), output=output, layers=(0, 2, 4))
    for ours, expected in zip(with_layers, plain, strict=True):
        assert torch.equal(ours.embeds, expected.embeds)
        assert not expected.layers


def test_behind_the_last_block_they_are_the_patch_output() -> None:
    last = tiny().config.depth - 1
    for ours in tiny().encode(pictures(), output="patch", layers=[last]):
        assert torch.equal(ours.layers[last], ours.embeds)


def test_each_image_has_separate_memory_and_its_own_rows() -> None:
    together = tiny().encode(pictures(), layers=(1, 3))
    for ours, image in zip(together, pictures(), strict=True):
        alone = tiny().encode(image, layers=(1, 3))
        for block in (1, 3):
            rows = ours.layers[block]
            assert rows.untyped_storage().nbytes() == rows.numel() * 4
            assert relative_error(rows, alone.layers[block]) < 1e-5


def test_failed_images_do_not_affect_the_layers_of_others() -> None:
    images: list[Any] = [picture(56, 56), b"no image", picture(56, 84, 1)]
    first, failed, last = tiny().encode(images, layers=(2,), on_error="skip")
    assert isinstance(failed, FailedImage)
    for ours, n_patches in ((first, 16), (last, 24)):
        assert isinstance(ours, ImageFeatures)
        assert ours.layers[2].shape == (n_patches, 160)


def test_a_batch_out_of_memory_is_halved_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [tiny().encode(image, layers=(0, 4)) for image in pictures()]
    forward, sizes = VisionEncoder.forward, []

    def limited(self: VisionEncoder, patches: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(len(patches))
        rows = forward(self, patches, *more)
        if len(patches) > 120:  # fails after some layers have results
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rows

    monkeypatch.setattr(VisionEncoder, "forward", limited)
    for ours, other in zip(tiny().encode(pictures(), layers=(0, 4)), expected, strict=True):
        assert relative_error(ours.embeds, other.embeds) < 1e-5
        for block in (0, 4):
            assert relative_error(ours.layers[block], other.layers[block]) < 1e-5
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((-1,), r"layers contains -1\. Expected integers from 0 to 4, each once"),
        ((5,), "layers contains 5"),
        ((10**30,), "layers contains 10000"),
        ((1, 3, 1), "layers contains 1 twice"),
        ((True,), "layers contains True"),
        ((1.0,), "layers contains 1.0"),
        (("1",), "layers contains '1'"),
        ((None,), "layers contains None"),
        ("13", "layers is '13'"),
        (b"\x01", "layers is b"),
        (3, r"layers is 3\. Expected a list of blocks such as \[1\]"),
        (None, "layers is None"),
    ],
)
def test_missing_blocks_are_refused_before_any_image(layers: Any, words: str) -> None:
    for call in (tiny().encode, tiny().encode_iter):
        with pytest.raises(ArgumentError, match=words):
            call(["no-such-file.jpg"], layers=layers)


@pytest.mark.parametrize("layers", [[3, 1], {1, 3}, np.array([1, 3]), iter((1, 3)), range(1, 4, 2)])
def test_blocks_may_be_given_in_any_iterable(layers: Any) -> None:
    assert list(tiny().encode(picture(28, 28), layers=layers).layers) == [1, 3]


@gpu
@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_on_a_gpu_layers_change_no_bit_and_have_the_same_bits_in_any_batch(output: Any) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda")
    images = [picture(28 * (1 + i % 5), 28 * (2 + i % 7), i) for i in range(20)]
    plain = encoder.encode(images, output=output)  # runs graphs where possible
    together = encoder.encode(images, output=output, layers=(0, 2, 4))
    for ours, expected, image in zip(together, plain, images, strict=True):
        assert torch.equal(ours.embeds, expected.embeds)
        alone = encoder.encode(image, output=output, layers=(0, 2, 4))
        for block in (0, 2, 4):
            assert torch.equal(ours.layers[block], alone.layers[block])
            assert ours.layers[block].dtype == torch.bfloat16
