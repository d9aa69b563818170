"""Test that tensors from a caller make the same checkpoint, or raise an error with their names."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.load import Checkpoint, load_checkpoint
from qwen_vit.checkpoint.published_tensors import weights_hash
from qwen_vit.errors import ArgumentError, CheckpointError
from tests.support.checkpoint_cases import IMAGE_CONFIG, QKV, assert_same_tensors, given
from tests.support.checkpoints import (
    SMALL,
    random_tensors,
    write_checkpoint,
)


def rejection(*arguments: Any) -> CheckpointError:
    """Return the error for a caller's tensors."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_tensors(*arguments)
    return caught.value


@pytest.mark.parametrize(
    "prefix", ["visual.", "model.visual.", "thinker.visual.", "", "base_model.model.visual."]
)
def test_given_tensors_make_the_checkpoint_that_their_files_make(
    tmp_path: Path, prefix: str
) -> None:
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix)
    loaded = load_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = Checkpoint.from_tensors(given(prefix), config, settings)
    assert_same_tensors(checkpoint.tensors, tensors)
    for field in ("config", "image_config", "prefix", "dtypes"):
        assert getattr(checkpoint, field) == getattr(loaded, field)
    assert (checkpoint.files, checkpoint.locate(QKV)) == ((), QKV)
    assert checkpoint.weights_sha256() == loaded.weights_sha256()
    convert_both = (
        convert(each.tensors, SMALL, each.image_config, torch.bfloat16)
        for each in (checkpoint, loaded)
    )
    assert_same_tensors(*convert_both)


@pytest.mark.parametrize("image_config", [None, {}, IMAGE_CONFIG])
def test_configs_are_objects_or_the_json_of_their_files(image_config: Any) -> None:
    for config in (SMALL, SMALL.to_json(), {"model_type": "qwen2_5_vl", **SMALL.to_json()}):
        checkpoint = Checkpoint.from_tensors(given(), config, image_config)
        assert (checkpoint.config, checkpoint.image_config) == (SMALL, IMAGE_CONFIG)


def test_parameters_and_views_are_accepted_without_a_copy() -> None:
    tensors = random_tensors(SMALL, dtype=torch.float32)
    views = {
        name: torch.stack([tensor, tensor], 1)[:, 0]  # a view of every second value
        for name, tensor in tensors.items()
        if tensor.ndim == 1
    }
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in (tensors | views).items()}
    checkpoint = Checkpoint.from_tensors(stored, SMALL)
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())
    assert all(checkpoint.tensors[name].data_ptr() == t.data_ptr() for name, t in stored.items())
    assert checkpoint.weights_sha256() == weights_hash(tensors)
    state = convert(checkpoint.tensors, SMALL, IMAGE_CONFIG, torch.float32)
    assert_same_tensors(state, convert(tensors, SMALL, IMAGE_CONFIG, torch.float32))
    ours = {tensor.data_ptr() for tensor in state.values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in stored.values())


def test_a_checkpoint_of_given_tensors_is_copied_and_pickled() -> None:
    checkpoint = Checkpoint.from_tensors(given("thinker.visual."), SMALL)
    for twin in (copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert_same_tensors(twin.tensors, checkpoint.tensors)
        assert twin.weights_sha256() == checkpoint.weights_sha256()


@pytest.mark.parametrize(
    ("changes", "name", "fact", "expected"),
    [
        (
            {"visual__blocks__9__norm1__weight": torch.zeros(32)},
            "tensors",
            "0 of 42 vision tensors are missing (none) and 1 are unknown (blocks.9.norm1.weight)",
            "",
        ),
        (
            {"visual__merger__ln_q__weight": torch.zeros(31)},
            "visual.merger.ln_q.weight",
            "has the shape [31]",
            "[32] from config.json",
        ),
        (
            {"visual__merger__ln_q__weight": torch.zeros(32, dtype=torch.float64)},
            "tensors",
            "it has 1 vision tensor of a quantised or other type (merger.ln_q.weight; "
            "visual.merger.ln_q.weight is torch.float64)",
            "F32, BF16, F16",
        ),
        (
            {"visual__blocks__0__attn__qkv__qweight": torch.zeros(4, dtype=torch.int32)},
            "tensors",
            "it has 1 vision tensor of a quantised or other type (blocks.0.attn.qkv.qweight; "
            "visual.blocks.0.attn.qkv.qweight is torch.int32)",
            "F32, BF16, F16",
        ),
        (
            {"visual__pos_embed__weight": torch.zeros(4)},
            "tensors",
            "contains the vision tower of Qwen3-VL (visual.pos_embed.weight)",
            "Qwen2.5-VL",
        ),
        (
            {"patch_embed__proj__weight": torch.zeros(4)},
            "tensors",
            "contains 2 vision towers, under no prefix, visual.",
            "one",
        ),
    ],
)
def test_given_tensors_of_wrong_shapes_are_named(
    changes: dict[str, Any], name: str, fact: str, expected: str
) -> None:
    error = rejection(given(**changes), SMALL)
    assert (error.name, error.fact, error.expected) == (name, fact, expected)
    assert error.remedy


def test_a_given_tower_that_is_incomplete_or_of_another_config_is_refused() -> None:
    incomplete = given()
    del incomplete["visual.blocks.1.norm2.weight"]
    assert "1 of 42 vision tensors are missing (blocks.1.norm2.weight)" in str(
        rejection(incomplete, SMALL)
    )
    assert "12 of 54 vision tensors are missing" in str(rejection(given(), replace(SMALL, depth=4)))
    assert "no vision tower: none of its 1 tensors (a)" in str(
        rejection({"a": torch.ones(1)}, SMALL)
    )
    assert str(rejection(given(), {"model_type": "llava"})).startswith("config: model_type is 'll")
    other_images = {"patch_size": 16}
    assert "image_config: patch_size is 16, but config.json has 14" in str(
        rejection(given(), SMALL, other_images)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([torch.zeros(1)], SMALL), r"tensors is \[.*\. Expected a mapping whose keys are strings"),
        (({0: torch.zeros(1)}, SMALL), r"tensors is \{0: .*\. Expected a mapping whose keys are"),
        ((given(), 3), r"config is 3\. Expected a mapping"),
        ((given(), SMALL, 3), r"image_config is 3\. Expected a mapping"),
        (
            (given(visual__merger__ln_q__weight=[1.0]), SMALL),
            r"tensors\['visual\.merger\.ln_q\.weight'\] is \[1\.0\] \(list\)\. Expected a torch",
        ),
        (
            (given(visual__merger__ln_q__weight=torch.zeros(32, device="meta")), SMALL),
            r"ln_q\.weight'\]: a tensor on the meta device\. Expected .* Load the weights first",
        ),
        (
            (given(visual__merger__ln_q__weight=torch.zeros(32).to_sparse()), SMALL),
            r"ln_q\.weight'\]: a tensor of the layout torch\.sparse_coo\. Expected",
        ),
    ],
)
def test_a_wrong_type_of_tensors_or_config_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Checkpoint.from_tensors(*arguments)
