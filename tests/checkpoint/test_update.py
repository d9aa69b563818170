"""Test that published tensors in pieces give the same parameters as a complete load."""

import random

import pytest
import torch
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.checkpoint.update import WeightUpdates
from qwen_vit.errors import CheckpointError
from qwen_vit.model import VisionTower
from tests.support.encoders import tiny


def empty_tower(like: VisionEncoder) -> VisionTower:
    """Return the tower of `like` with NaN everywhere, so that the test detects unwritten values."""
    with torch.device("meta"):
        tower = VisionTower(like.config, like.dtype)
    tower = tower.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(torch.nan)
    return tower


def assert_same(tower: VisionTower, expected: VisionTower) -> None:
    state = tower.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_and_any_pieces_give_the_parameters_of_a_complete_load(
    pieces: int, seed: int
) -> None:
    encoder = tiny()
    tower = empty_tower(encoder)
    updates = WeightUpdates(tower, encoder.config, encoder.image_config)
    tensors = list(encoder.checkpoint.tensors.items())
    random.Random(seed).shuffle(tensors)
    written: list[str] = []
    for start in range(pieces):
        written += updates.load(tensors[start::pieces])
    assert sorted(written) == sorted(tower.state_dict())
    assert not updates.missing
    assert_same(tower, encoder.tower)


def test_waiting_pieces_are_copied() -> None:
    """A trainer sends weights through one buffer, which it fills again after each call."""
    encoder = tiny()
    tower = empty_tower(encoder)
    updates = WeightUpdates(tower, encoder.config, encoder.image_config)
    for name, tensor in encoder.checkpoint.tensors.items():
        buffer = tensor.clone()
        updates.load([(name, buffer)])
        buffer.fill_(torch.nan)
    assert_same(tower, encoder.tower)


def test_new_weights_replace_old_ones_in_the_same_memory() -> None:
    encoder = tiny()
    tower = empty_tower(encoder)
    updates = WeightUpdates(tower, encoder.config, encoder.image_config)
    updates.load(encoder.checkpoint.tensors.items())
    addresses = {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()}
    updates.load((name, tensor * 2) for name, tensor in encoder.checkpoint.tensors.items())
    changed = VisionEncoder.from_tensors(
        {name: tensor * 2 for name, tensor in encoder.checkpoint.tensors.items()},
        encoder.config,
        encoder.image_config,
        device="cpu",
    )
    assert_same(tower, changed.tower)
    assert {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()} == addresses


def test_separately_stored_q_k_and_v_are_joined() -> None:
    encoder = tiny()
    tower = empty_tower(encoder)
    updates = WeightUpdates(tower, encoder.config, encoder.image_config)
    split: dict[str, Tensor] = {}
    for name, tensor in encoder.checkpoint.tensors.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}.")] = part
        else:
            split[name] = tensor
    last = "blocks.0.attn.k.weight"
    updates.load((name, tensor) for name, tensor in split.items() if name != last)
    assert updates.missing == ("blocks.0.attn.qkv.weight",)
    updates.load([(last, split[last])])
    assert not updates.missing
    assert_same(tower, encoder.tower)


def test_a_load_in_inference_mode_can_be_repeated_outside_of_it() -> None:
    encoder = tiny()
    tower = empty_tower(encoder)
    updates = WeightUpdates(tower, encoder.config, encoder.image_config)
    with torch.inference_mode():
        updates.load((name, tensor.clone()) for name, tensor in encoder.checkpoint.tensors.items())
    updates.load(encoder.checkpoint.tensors.items())
    assert_same(tower, encoder.tower)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.0.mlp.fc1.weight", torch.ones(2), "contains the vision tower of Qwen2-VL"),
        ("pos_embed.weight", torch.ones(2), "contains the vision tower of Qwen3-VL"),
        ("blocks.0.attn.qkv.weight_scale", torch.ones(2), "quantised"),
        ("blocks.0.attn.qkv.weight", torch.ones(480, 160, dtype=torch.int8), "quantised"),
        ("blocks.99.norm1.weight", torch.ones(160), "not a tensor of this vision tower"),
        ("merger.ln_q.weight", torch.ones(3), r"has the shape \[3\]"),
        (
            "merger.ln_q.weight",
            torch.full((160,), torch.nan),
            "merger.ln_q.weight: contains 160 NaN",
        ),
        ("patch_embed.proj.weight", torch.full((160, 3, 2, 14, 14), torch.inf), "infinite"),
    ],
)
def test_a_tensor_of_another_tower_is_refused_by_name(
    name: str, tensor: Tensor, message: str
) -> None:
    encoder = tiny()
    updates = WeightUpdates(empty_tower(encoder), encoder.config, encoder.image_config)
    with pytest.raises(CheckpointError, match=message):
        updates.load([(name, tensor)])
