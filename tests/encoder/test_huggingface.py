"""Test that features equal Hugging Face's features, and do not depend on other images."""

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.encoder import VisionEncoder
from qwen_vit.images.patches import Patches, patchify
from tests.support import IMAGES
from tests.support.encoders import embeds_of, picture, tiny
from tests.support.goldens import PHOTOGRAPHS, TINY_FOLDER, fp32_budget
from tests.support.huggingface import hf_trace, tiny_hf_tower
from tests.support.oracle import read_checkpoint, relative_error, vision_oracle
from tests.support.towers import random_rows


def processor(max_pixels: int) -> Qwen2VLImageProcessorPil:
    config = load_checkpoint(TINY_FOLDER).image_config
    return Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=max_pixels)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_equal_hugging_faces_processor_and_tower(name: str) -> None:
    # one large image, and two images that are reduced
    limit = 300_000 if name == "astronaut.png" else 120_000
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=limit)
    with Image.open(IMAGES / name) as image:
        inputs = processor(limit)(image.convert("RGB"), return_tensors="pt")
    [grid] = inputs["image_grid_thw"].tolist()
    rows = inputs["pixel_values"].float()
    expected = hf_trace(tiny_hf_tower(), rows, [grid])["merger"]
    tensors, config = read_checkpoint(TINY_FOLDER)
    budget = fp32_budget(expected, vision_oracle(tensors, config, rows, [grid])["merger"])

    [features] = encoder.encode([IMAGES / name])
    by_rows = encoder.encode_patches(inputs["pixel_values"], inputs["image_grid_thw"])
    assert features.grid_thw == tuple(grid)
    for ours in (embeds_of(features), by_rows):
        error = relative_error(ours, expected)
        print(f"{name} {grid}: {error:.2e} of {budget:.1e}")
        assert error <= budget


def test_encode_agrees_with_encode_patches_of_the_same_pixels() -> None:
    images = [picture(56, 84), picture(140, 28, seed=1)]
    parts = [patchify(image, tiny().image_config) for image in images]
    rows = Patches.cat(parts).to_rows(tiny().image_config)
    grids = torch.tensor([[g.t, g.h, g.w] for part in parts for g in part.grids])
    together = tiny().encode_patches(rows, grids)
    ours = torch.cat([embeds_of(features) for features in tiny().encode(images)])
    expected = hf_trace(tiny_hf_tower(), rows, grids.tolist())["merger"]
    assert relative_error(ours, together) <= fp32_budget(expected, together.double())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_one_image_changes_no_other_image(poison: float) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    grids = torch.tensor([[1, 4, 6], [1, 10, 6], [1, 4, 6]])
    pixels = torch.randn(24 + 60 + 24, 1176)
    clean = encoder.encode_patches(pixels, grids)
    pixels[30, 5] = poison
    rows = encoder.encode_patches(pixels, grids)
    assert not rows[6:21].isfinite().all()
    assert torch.equal(rows[:6], clean[:6])
    assert torch.equal(rows[21:], clean[21:])


def test_the_effect_of_a_batch_is_at_most_hugging_faces_error() -> None:
    images = [picture(56, 84), picture(28, 28, 1), picture(196, 140, 2), picture(112, 112, 3)]
    batch = tiny().encode(images)
    backwards = tiny().encode(images[::-1])[::-1]
    tensors, config = read_checkpoint(TINY_FOLDER)
    for image, member, other in zip(images, batch, backwards, strict=True):
        [alone] = tiny().encode([image])
        part = patchify(image, tiny().image_config)
        rows = part.to_rows(tiny().image_config)
        oracle = vision_oracle(tensors, config, rows, part.grids)["merger"]
        allowed = relative_error(hf_trace(tiny_hf_tower(), rows, part.grids)["merger"], oracle)
        for ours in (member, other):
            distance = relative_error(embeds_of(ours), embeds_of(alone))
            print(f"{alone.grid_thw}: {distance:.1e} of {allowed:.1e}")
            assert distance <= allowed


def test_the_frames_of_a_video_do_not_attend_to_one_another() -> None:
    rows = random_rows(3 * 48, seed=0)
    grid = torch.tensor([[3, 6, 8]])
    before = tiny().encode_patches(rows, grid).view(3, 12, -1)
    changed = rows.clone()
    changed[48:96] += 1  # the second frame
    after = tiny().encode_patches(changed, grid).view(3, 12, -1)
    assert not torch.allclose(before[1], after[1], rtol=0.1)
    for frame in (0, 2):
        assert relative_error(after[frame], before[frame]) < 1e-6
