"""Test that qwen_vit rejects, counts and names weights that do not fit the tower."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.errors import CheckpointError
from tests.support.checkpoint_cases import IMAGE_CONFIG, NORM_OF_A_BLOCK, QKV, refusal
from tests.support.checkpoints import (
    SMALL,
    random_tensors,
    write_checkpoint,
    write_weights,
)


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# Weights that do not fit the tower


def test_missing_and_extra_tensors_are_counted_and_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["visual.blocks.1.norm2.weight"]
        tensors["visual.blocks.9.norm1.weight"] = torch.zeros(32)

    edit_weights(tmp_path, edit)
    message = refusal(tmp_path)
    assert f"{tmp_path} (model.safetensors): 1 of 42 vision tensors are missing" in message
    assert "(blocks.1.norm2.weight) and 1 are unknown (blocks.9.norm1.weight)" in message
    assert "Use the config.json that belongs to the weights, or download" in message


def test_at_most_five_missing_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    document = {"model_type": "qwen2_5_vl", "vision_config": replace(SMALL, depth=4).to_json()}
    (tmp_path / "config.json").write_text(json.dumps(document))
    message = refusal(tmp_path)
    assert "12 of 54 vision tensors are missing" in message
    assert message.count("blocks.3.") == 5
    assert "0 are unknown (none)" in message


def test_a_single_unknown_tensor_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    edit_weights(tmp_path, lambda tensors: tensors.update({"visual.extra": torch.zeros(1)}))
    assert "0 of 42 vision tensors are missing (none) and 1 are unknown (extra)" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("prefix", ["visual.", "thinker.visual."])
def test_a_block_of_the_other_qkv_layout_is_refused(tmp_path: Path, prefix: str) -> None:
    write_checkpoint(tmp_path, SMALL, prefix=prefix)

    def edit(tensors: dict[str, Tensor]) -> None:
        if prefix == "visual.":
            for part in ("weight", "bias"):
                qkv = tensors.pop(f"visual.blocks.2.attn.qkv.{part}")
                for letter, third in zip("qkv", qkv.chunk(3), strict=True):
                    tensors[f"visual.blocks.2.attn.{letter}.{part}"] = third.clone()
        else:
            del tensors["thinker.visual.blocks.2.attn.k.bias"]

    edit_weights(tmp_path, edit)
    assert "blocks.2.attn.k.bias" in refusal(tmp_path)


def test_a_wrong_shape_names_both_shapes_and_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path, lambda tensors: tensors.update({"visual." + QKV: torch.zeros(96, 31).bfloat16()})
    )
    message = refusal(tmp_path)
    assert message.startswith(
        f"{tmp_path / 'model.safetensors'}: visual.{QKV}: has the shape [96, 31]. "
        "Expected [96, 32] from config.json. Use the config.json that belongs to the weights."
    )


@pytest.mark.parametrize(
    ("name", "dtype", "shown"),
    [
        (QKV, torch.float8_e4m3fn, "F8_E4M3"),
        (QKV, torch.int8, "I8"),
        (QKV, torch.float64, "F64"),
        (QKV + "_scale", torch.float32, "F32"),
        ("blocks.0.attn.qkv.qweight", torch.int32, "I32"),
        ("blocks.0.mlp.up_proj.weight.absmax", torch.float32, "F32"),
    ],
)
def test_quantised_towers_are_refused_by_name(
    tmp_path: Path, name: str, dtype: torch.dtype, shown: str
) -> None:
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path, lambda tensors: tensors.update({f"visual.{name}": torch.zeros(96, 32).to(dtype)})
    )
    message = refusal(tmp_path)
    assert message.startswith(
        f"{tmp_path} (model.safetensors): it has 1 vision tensor of a quantised"
    )
    assert f"model.safetensors: visual.{name} is {shown})" in message
    assert "Expected F32, BF16, F16. Use a checkpoint that leaves the vision tower unq" in message


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("blocks.0.mlp.fc1.weight", "Qwen2-VL"),
        ("merger.ln_q.bias", "Qwen2-VL"),
        ("pos_embed.weight", "Qwen3-VL"),
        ("blocks.0.mlp.linear_fc1.weight", "Qwen3-VL"),
    ],
)
def test_towers_of_other_models_are_refused_by_name(tmp_path: Path, name: str, model: str) -> None:
    write_checkpoint(tmp_path, SMALL)
    edit_weights(tmp_path, lambda tensors: tensors.update({f"visual.{name}": torch.zeros(4)}))
    message = refusal(tmp_path)
    assert f"contains the vision tower of {model} ({tmp_path / 'model.safetensors'}: " in message
    assert f": visual.{name}). Expected Qwen2.5-VL. Use transformers for this model." in message


def test_a_checkpoint_of_two_towers_or_no_tower_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    edit_weights(
        tmp_path,
        lambda tensors: tensors.update({"other.patch_embed.proj.weight": torch.zeros(1)}),
    )
    assert "contains 2 vision towers, under other., visual. Expected one. Save" in refusal(tmp_path)
    write_weights(tmp_path, {"lm_head.weight": torch.zeros(1)})
    assert f"{tmp_path}: no vision tower: none of its 1 tensors (lm_head.weight)" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_finite_are_counted_and_their_file_named(
    tmp_path: Path, shards: int
) -> None:
    tensors = write_checkpoint(tmp_path, SMALL, prefix="", shards=shards)
    tensors[QKV][0, :3] = float("nan")
    tensors[QKV][1, 0] = -float("inf")
    write_weights(tmp_path, tensors, shards=shards)
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        convert(
            checkpoint.tensors, SMALL, IMAGE_CONFIG, torch.float32, locate=checkpoint.locate
        )  # fmt: skip
    assert ".safetensors (" in str(caught.value)
    assert f" bytes): {QKV}: contains 3 NaN and 1 infinite values, of 3072" in str(caught.value)
    assert "download them again" in caught.value.remedy
    with pytest.raises(CheckpointError, match=f"^{QKV}: contains 3 NaN and 1 infinite"):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_value_that_is_not_finite_is_found_in_every_tensor(
    value: str, dtype: torch.dtype
) -> None:
    """The loader checks only the converted tensors, so a conversion must keep NaN and infinity: in
    a product with a norm's weight of zero, in another type, and in a sum."""
    for name, tensor in random_tensors(SMALL).items():
        tensors = random_tensors(SMALL)
        for norm in filter(NORM_OF_A_BLOCK.fullmatch, tensors):
            tensors[norm] = torch.zeros_like(tensors[norm])
        tensors[name].view(-1)[tensor.numel() // 2] = float(value)
        counts = "1 NaN and 0" if value == "nan" else "0 NaN and 1"
        words = rf"{counts} infinite values, of {tensor.numel()}\. Expected"
        words = rf"^{re.escape(name)}: contains {words}"
        with pytest.raises(CheckpointError, match=words):
            convert(tensors, SMALL, IMAGE_CONFIG, dtype)


def test_the_place_of_a_tensor_in_three_parts_names_each(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL, prefix="thinker.visual.")
    size = (tmp_path / "model.safetensors").stat().st_size
    place = load_checkpoint(tmp_path).locate(QKV)
    file = f"{tmp_path}/model.safetensors ({size} bytes): thinker.visual.blocks.0.attn"
    assert place == " with ".join(f"{file}.{letter}.weight" for letter in "qkv")
