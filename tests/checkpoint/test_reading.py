"""Test that checkpoints in every layout give the same tensors and hashes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_vit.checkpoint.load import config_hash, load_checkpoint
from qwen_vit.checkpoint.published_tensors import weights_hash
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import ImageConfig, VisionConfig
from tests.support.checkpoint_cases import IMAGE_CONFIG, assert_same_tensors
from tests.support.checkpoints import (
    SMALL,
    write_checkpoint,
)

# Tensors and settings


def test_the_published_tower_has_390_tensors() -> None:
    published = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    shapes = expected_tensors(published)
    assert len(shapes) == 390
    assert shapes["patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert shapes["merger.mlp.2.weight"] == (3584, 5120)


def test_expected_tensors_are_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    theirs_config = modeling.Qwen2_5_VLVisionConfig(**SMALL.to_json())
    with torch.device("meta"):
        theirs = modeling.Qwen2_5_VisionTransformerPretrainedModel(theirs_config)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert expected_tensors(SMALL) == shapes


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "prefix", ["visual.", "model.visual.", "thinker.visual.", "", "base_model.model.visual."]
)
def test_every_key_layout_and_file_layout_gives_the_same_tensors(
    tmp_path: Path, prefix: str, shards: int
) -> None:
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix, shards=shards)
    checkpoint = load_checkpoint(tmp_path)
    assert_same_tensors(checkpoint.tensors, tensors)
    assert (checkpoint.config, checkpoint.prefix, checkpoint.dtypes) == (SMALL, prefix, ("BF16",))
    assert checkpoint.image_config.max_pixels == 12_845_056
    assert {path.name for path in checkpoint.files} >= {"config.json", "preprocessor_config.json"}
    assert weights_hash(checkpoint.tensors) == weights_hash(tensors)


@pytest.mark.parametrize("name", ["vision.safetensors", "tower.safetensors"])
def test_a_single_file_of_another_name_is_read(tmp_path: Path, name: str) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    assert_same_tensors(load_checkpoint(str(tmp_path)).tensors, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types_are_kept_until_conversion(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write_checkpoint(tmp_path, SMALL, dtype=dtype)
    assert_same_tensors(load_checkpoint(tmp_path).tensors, tensors)


def test_image_settings_fall_back_to_the_processor_then_to_the_defaults(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "x"}')
    assert load_checkpoint(tmp_path).image_config.max_pixels == 12_845_056
    nested = {"image_processor": {"size": {"longest_edge": 50_176}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load_checkpoint(tmp_path).image_config.max_pixels == 50_176
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink()
    assert load_checkpoint(tmp_path).image_config == ImageConfig.from_json({})


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    repo, snapshot = tmp_path / "models--x", tmp_path / "models--x/snapshots/abc"
    tensors = write_checkpoint(repo / "blobs", SMALL, shards=2)
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert_same_tensors(load_checkpoint(snapshot).tensors, tensors)


def test_shards_without_a_vision_tensor_need_not_be_there(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, SMALL, shards=2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.layers.0.weight"] = "model-00003-of-00003.safetensors"
    index_path.write_text(json.dumps(index))
    assert_same_tensors(load_checkpoint(tmp_path).tensors, tensors)


# Hashes


def test_the_weights_hash_depends_on_name_type_shape_and_bytes_alone() -> None:
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    same = {"b": torch.ones(4)[::2], "a": torch.arange(4.0)}
    assert weights_hash(base) == weights_hash(same)
    for other in (
        {**base, "a": torch.tensor([0.0, 1.0, 2.0, 3.5])},
        {**base, "a": torch.arange(4.0).view(2, 2)},
        {**base, "a": torch.arange(4.0).view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ):
        assert weights_hash(other) != weights_hash(base)


def test_the_config_hash_ignores_spelling_but_no_value() -> None:
    base = config_hash(SMALL, IMAGE_CONFIG)
    respelt = {**SMALL.to_json(), "in_chans": 3, "rope_parameters": {"rope_theta": 10_000}}
    assert config_hash(VisionConfig.from_json(respelt), ImageConfig.from_json({})) == base
    assert config_hash(replace(SMALL, rope_theta=5e4), IMAGE_CONFIG) != base
    assert config_hash(SMALL, replace(IMAGE_CONFIG, max_pixels=4096)) != base
