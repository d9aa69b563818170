"""Test that weights/tiny is small, in the published format, and makes mistakes visible."""

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

from tests.support import IMAGES
from tests.support.goldens import (
    MEAN,
    PHOTOGRAPHS,
    STD,
    TINY_FOLDER,
    patch_pixels,
    photograph,
)
from tests.support.oracle import pixel_rows, read_checkpoint, vision_oracle

CONFIG = json.loads((TINY_FOLDER / "config.json").read_text())
VISION = CONFIG["vision_config"]


@cache
def peaks(image: str) -> list[torch.Tensor]:
    """Yield the largest softmax weight of every token and head (N, H), block by block."""
    tensors, config = read_checkpoint(TINY_FOLDER)
    pixels, grid = patch_pixels(photograph(IMAGES / image))
    collected: list[torch.Tensor] = []
    vision_oracle(tensors, config, pixel_rows(pixels, MEAN, STD), [grid], peaks=collected)
    return collected


def test_the_weights_are_small_enough_to_ship() -> None:
    assert (TINY_FOLDER / "model.safetensors").stat().st_size <= 6_000_000


def test_the_config_has_the_features_of_published_towers() -> None:
    head_dim = VISION["hidden_size"] / VISION["num_heads"]
    full = VISION["fullatt_block_indexes"]
    assert CONFIG["model_type"] == "qwen2_5_vl"
    assert (head_dim, VISION["patch_size"], VISION["window_size"]) == (80, 14, 112)
    assert VISION["num_heads"] >= 2
    assert VISION["depth"] >= 4
    assert VISION["intermediate_size"] % 8 == 4  # like 3420, so rows are not 16-byte aligned
    assert len(full) == 2
    assert VISION["depth"] - 1 not in full


def test_the_tensors_have_the_published_names_and_type() -> None:
    with safe_open(TINY_FOLDER / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert metadata == {"format": "pt"}
    assert len(tensors) == 12 * VISION["depth"] + 6
    assert all(name.startswith("visual.") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["visual.patch_embed.proj.weight"].shape == (160, 3, 2, 14, 14)
    assert tensors["visual.blocks.4.attn.qkv.weight"].shape == (480, 160)
    assert tensors["visual.blocks.4.mlp.down_proj.weight"].shape == (160, 428)
    assert tensors["visual.merger.mlp.2.bias"].shape == (192,)


def test_no_bias_or_norm_weight_is_trivial() -> None:
    tensors, _ = read_checkpoint(TINY_FOLDER)
    vectors = {name: tensor.float() for name, tensor in tensors.items() if tensor.ndim == 1}
    assert len(vectors) == 7 * VISION["depth"] + 3
    for name, vector in vectors.items():
        # A constant vector would not show that a tower drops or moves it.
        assert vector.std() > 0.1 * vector.abs().max() / 3, name


@pytest.mark.parametrize("image", PHOTOGRAPHS)
@pytest.mark.parametrize("block", range(VISION["depth"]))
def test_attention_is_peaked_but_not_degenerate(block: int, image: str) -> None:
    """A uniform softmax does not show a RoPE fault, and a very peaked softmax differs between
    correct towers."""
    largest = peaks(image)[block]
    print(f"block {block}, {image}: {largest.mean():.3f}, heads {largest.mean(0).tolist()}")
    assert 0.2 <= largest.mean() <= 0.4
