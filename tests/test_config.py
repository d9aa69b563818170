"""Test the accepted values of config.json and preprocessor_config.json, and the errors."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.config import Grid, ImageConfig, VisionConfig, check_consistent
from qwen_vit.errors import CheckpointError
from tests.support.checkpoints import SMALL

PUBLISHED_7B = VisionConfig(
    depth=32,
    hidden_size=1280,
    num_heads=16,
    intermediate_size=3420,
    out_hidden_size=3584,
    in_channels=3,
    patch_px=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_px=112,
    fullatt_block_indexes=(7, 15, 23, 31),
    rope_theta=10_000.0,
)
VISION_7B = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
VISION_32B = {
    "hidden_size": 1280,
    "in_chans": 3,
    "intermediate_size": 3456,
    "model_type": "qwen2_5_vl",
    "out_hidden_size": 5120,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
OMNI = {
    **VISION_7B,
    "embed_dim": 1280,
    "in_channels": 3,
    "model_type": "qwen2_5_omni_vision_encoder",
}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"model_type": "qwen2_5_vl", "vision_config": VISION_7B}, PUBLISHED_7B),
        (VISION_7B, PUBLISHED_7B),
        ({**VISION_7B, "model_type": "qwen2_5_vl_vision"}, PUBLISHED_7B),
        (
            {"model_type": "qwen2_5_vl", "vision_config": VISION_32B},
            replace(PUBLISHED_7B, intermediate_size=3456, out_hidden_size=5120),
        ),
        (VISION_32B, replace(PUBLISHED_7B, intermediate_size=3456, out_hidden_size=5120)),
        ({"model_type": "qwen2_5_omni", "thinker_config": {"vision_config": OMNI}}, PUBLISHED_7B),
        ({"model_type": "qwen2_5_omni_thinker", "vision_config": OMNI}, PUBLISHED_7B),
        (OMNI, PUBLISHED_7B),
    ],
    ids=["whole", "flat", "flat-typed", "32B", "32B-flat", "omni", "omni-thinker", "omni-flat"],
)
def test_every_published_form_of_the_config_is_read(
    document: dict[str, Any], expected: VisionConfig
) -> None:
    assert VisionConfig.from_json(document) == expected


def test_derived_sizes_of_the_published_tower() -> None:
    config = PUBLISHED_7B
    assert (config.head_dim, config.rotary_pairs, config.patch_dim) == (80, 40, 1176)
    assert (config.merge_unit, config.window_units, config.factor_px) == (4, 4, 28)


def test_transformers_writes_a_config_that_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2_5_VLConfig(vision_config=SMALL.to_json())
    theirs.save_pretrained(tmp_path)
    assert VisionConfig.from_json(tmp_path / "config.json") == SMALL


@pytest.mark.parametrize("config", [PUBLISHED_7B, SMALL, replace(SMALL, fullatt_block_indexes=())])
def test_configs_survive_a_round_trip_through_a_file(tmp_path: Path, config: VisionConfig) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert VisionConfig.from_json(path) == VisionConfig.from_json(str(path)) == config


def test_configs_are_frozen_and_checked_when_built_directly() -> None:
    with pytest.raises(FrozenInstanceError):
        SMALL.depth = 4  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="num_heads 3 does not divide hidden_size 32"):
        replace(SMALL, num_heads=3)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_heads": 7}, "num_heads 7 does not divide hidden_size 1280"),
        ({"num_heads": 64}, r"head_dim is hidden_size 1280 / num_heads 64\. Expected a multiple"),
        ({"depth": 0}, r"depth is 0\. Expected 1 to 512"),
        ({"depth": 10**9}, r"depth is 1000000000\. Expected 1 to 512"),
        ({"depth": 10**5000}, r"depth is a number of thousands of digits\. Expected 1 to 512"),
        ({"depth": True}, r"depth is True\. Expected an integer"),
        ({"depth": 32.0}, r"depth is 32.0\. Expected an integer"),
        ({"depth": "32"}, r"depth is '32'\. Expected an integer"),
        ({"depth": None}, r"depth is None\. Expected an integer"),
        ({"hidden_size": -1280}, "hidden_size is -1280"),
        ({"window_size": 14}, "window_size 14 px is smaller than a merge unit of 28 px"),
        ({"window_size": 100}, "window_size 100 px is not a multiple of a merge unit of 28 px"),
        ({"fullatt_block_indexes": [7, 32]}, r"contains 32\. Expected 0 to 31"),
        ({"fullatt_block_indexes": [-1]}, r"contains -1\. Expected 0 to 31"),
        ({"fullatt_block_indexes": [7, 7]}, "contains 7 twice"),
        ({"fullatt_block_indexes": [True]}, r"contains True\. Expected integers"),
        ({"fullatt_block_indexes": [[1]]}, r"contains \[1\]\. Expected integers"),
        ({"fullatt_block_indexes": 7}, r"fullatt_block_indexes is 7\. Expected a list"),
        ({"hidden_act": "quick_gelu"}, r"hidden_act is 'quick_gelu'\. Expected 'silu'"),
        ({"in_chans": 4}, r"in_channels is 4\. Expected 3"),
        ({"in_channels": 1}, "in_channels 1 and in_chans 3 disagree"),
        ({"temporal_patch_size": 1}, r"temporal_patch_size is 1\. Expected 2"),
        ({"patch_size": 16}, "patch_size 16 and spatial_patch_size 14 disagree"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"type 'yarn'\. Expected 'axial'"),
        ({"rope_parameters": {"type": "linear"}}, r"type 'linear'\. Expected 'axial'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_parameters": {"factor": 2.0}}, r"contains \['factor'\]"),
        ({"rope_parameters": 1}, r"rope_parameters is 1\. Expected an object"),
    ],
)
def test_impossible_values_name_the_file_the_rule_and_the_remedy(
    change: dict[str, Any], rule: str
) -> None:
    with pytest.raises(CheckpointError, match=rule) as caught:
        VisionConfig.from_json({**VISION_7B, **change}, source="a/config.json")
    assert str(caught.value).startswith("a/config.json: ")
    assert caught.value.remedy == "Use the config.json that belongs to the weights."


def test_the_output_size_is_never_guessed() -> None:
    with pytest.raises(CheckpointError, match=r"c\.json: out_hidden_size is missing"):
        VisionConfig.from_json({"model_type": "qwen2_5_vl"}, source="c.json")


@pytest.mark.parametrize(
    "rope",
    [{}, {"rope_type": "default", "rope_theta": 5e4}, {"type": "axial", "rope_theta": 50000}],
)
def test_theta_is_read_from_rope_parameters(rope: dict[str, Any]) -> None:
    config = VisionConfig.from_json({**VISION_7B, "rope_parameters": rope})
    assert config.rope_theta == rope.get("rope_theta", 1e4)
    assert isinstance(config.rope_theta, float)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (
            {"model_type": "qwen2_vl"},
            r"this is Qwen2-VL\. Expected Qwen2\.5-VL .*\. Use .*Qwen2VLForConditionalGeneration",
        ),
        (
            {"vision_config": {"embed_dim": 1280, "mlp_ratio": 4}},
            "c.json, vision.*Qwen2-VL",
        ),
        (
            {"model_type": "qwen3_vl_moe"},
            r"this is Qwen3-VL\. Expected Qwen2\.5-VL .*\. Use .*Qwen3VLForConditionalGeneration",
        ),
        (
            {"vision_config": {"out_hidden_size": 8, "deepstack_visual_indexes": [1]}},
            "this is Qwen3-VL",
        ),
        ({"model_type": "qwen3_omni_moe"}, "this is Qwen3-Omni"),
        ({"model_type": "llava"}, r"model_type is 'llava'\. Expected one of qwen2_5_vl"),
        ({"model_type": ["qwen2_5_vl"]}, r"model_type is .*\. Expected one of qwen2_5_vl"),
        ({"vision_config": {**VISION_7B, "model_type": "siglip"}}, "model_type is 'siglip'"),
        ({"hidden_size": 1280}, r"there is no model_type\. Expected one of qwen2_5_vl"),
        (
            {**VISION_7B, "auto_map": {"AutoModel": "code.Model"}},
            r"qwen_vit never imports remote code\. If .*remove auto_map",
        ),
        ({"model_type": "qwen2_5_vl", "vision_config": 3}, r"vision_config is 3\. Expected an obj"),
        (
            {"model_type": "qwen2_5_omni", "thinker_config": []},
            r"thinker_config is \[\]\. Expected",
        ),
    ],
)
def test_other_models_are_refused_by_name(document: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        VisionConfig.from_json(document, source="c.json")
    assert str(caught.value).startswith("c.json")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", r"the JSON is \[1\]\. Expected an object"),
        (b"null", r"the JSON is None\. Expected an object"),
        (b'{"depth": "\xff"}', "not UTF-8 at byte 11 of 14"),
        (b'{"depth": NaN}', "contains NaN"),
        (b'{"depth": -Infinity}', "contains -Infinity"),
        (b'{"depth": 1e999}', "contains '1e999', which is too large for a float"),
        (b'{"depth": 1, "depth": 2}', "the key 'depth' appears twice"),
        (b'{"depth": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"<html>", "not JSON"),
    ],
    ids=[
        "empty",
        "torn",
        "list",
        "null",
        "encoding",
        "nan",
        "infinity",
        "overflow",
        "duplicate",
        "digits",
        "deep",
        "html",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as caught:
        VisionConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.remedy in ("Download the file again.", "Correct this value.")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(CheckpointError, match="not a file") as caught:
            VisionConfig.from_json(path)
        assert str(path) in str(caught.value)


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match=r": 1073741824 bytes\. Expected at most"):
        VisionConfig.from_json(path)


SIZE = {"shortest_edge": 6272, "longest_edge": 50_176}


@pytest.mark.parametrize(
    ("document", "limits"),
    [
        ({}, (3136, 1_003_520)),
        ({"min_pixels": 784, "max_pixels": 12_845_056}, (784, 12_845_056)),
        ({"size": SIZE}, (6272, 50_176)),
        ({"size": {"min_pixels": 784, "max_pixels": 1568}}, (784, 1568)),
        ({"size": SIZE, "min_pixels": 784}, (784, 50_176)),
        ({"size": SIZE, "min_pixels": None, "max_pixels": None}, (6272, 50_176)),
        ({"image_processor": {"size": SIZE}, "processor_class": "x"}, (6272, 50_176)),
    ],
)
def test_pixel_limits_are_found_in_every_form(
    document: dict[str, Any], limits: tuple[int, int]
) -> None:
    config = ImageConfig.from_json(document)
    assert (config.min_pixels, config.max_pixels) == limits
    assert (config.patch_px, config.temporal_patch_size, config.merge_size) == (14, 2, 2)
    assert config.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.image_std == (0.26862954, 0.26130258, 0.27577711)


def test_transformers_writes_image_settings_that_are_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2VLImageProcessorPil(size=SIZE, image_mean=[0.1, 0.2, 0.3])
    theirs.save_pretrained(tmp_path)
    ours = ImageConfig.from_json(tmp_path / "preprocessor_config.json")
    assert (ours.min_pixels, ours.max_pixels, ours.image_mean) == (6272, 50_176, (0.1, 0.2, 0.3))
    assert ImageConfig.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        ({"min_pixels": 0}, r"min_pixels is 0\. Expected 1 to"),
        ({"min_pixels": 3136.0}, r"min_pixels is 3136.0\. Expected an integer"),
        ({"max_pixels": True}, r"max_pixels is True\. Expected an integer"),
        ({"max_pixels": 10**400}, r"max_pixels is 1000000.*\. Expected 1 to"),
        ({"max_pixels": 1000}, "max_pixels 1000 is smaller than min_pixels 3136"),
        ({"min_pixels": 1, "max_pixels": 783}, r"max_pixels is 783\. Expected at least 784"),
        ({"resample": 2}, r"resample is 2\. Expected 3 \(bicubic\)"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor is .*\. Expected 1/255"),
        ({"do_resize": False}, r"do_resize is False\. Expected true"),
        ({"do_rescale": False}, r"do_rescale is False\. Expected true"),
        ({"do_normalize": 0}, r"do_normalize is 0\. Expected true"),
        ({"do_convert_rgb": False}, r"do_convert_rgb is False\. Expected true"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is .*\. Expected three numbers"),
        ({"image_mean": 0.5}, r"image_mean is 0.5\. Expected a list of three numbers"),
        ({"image_mean": [0.5, 0.5, 10**400]}, r"image_mean is .*\. Expected three numbers"),
        ({"image_mean": [0, 0, 10**5000]}, "image_mean is a number of thousands of digits"),
        ({"image_processor_type": 3}, r"image_processor_type is 3\. Expected Qwen2VLImageP"),
        ({"image_std": [0.5, 0.5, float("inf")]}, r"image_std is .*\. Expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std is .*\. Expected values above 0"),
        ({"patch_size": "14"}, r"patch_size is '14'\. Expected an integer"),
        ({"size": 448}, r"size is 448\. Expected an object"),
        ({"image_processor": 3}, r"image_processor is 3\. Expected an object"),
        ({"image_processor_type": "CLIPImageProcessor"}, "Expected Qwen2VLImageProcessor"),
    ],
)
def test_image_settings_that_cannot_be_met_name_the_file_and_the_rule(
    document: dict[str, Any], rule: str
) -> None:
    with pytest.raises(CheckpointError, match=rule) as caught:
        ImageConfig.from_json(document, source="p.json")
    assert str(caught.value).startswith("p.json")


@pytest.mark.parametrize(
    ("key", "value", "tower"),
    [("patch_size", 16, 14), ("temporal_patch_size", 1, 2), ("merge_size", 4, 2)],
)
def test_tower_and_images_must_agree(key: str, value: int, tower: int) -> None:
    check_consistent(SMALL, ImageConfig.from_json({}))
    with pytest.raises(CheckpointError, match=rf"p\.json: {key} is {value}, .*has {tower}\. Use"):
        check_consistent(SMALL, ImageConfig.from_json({key: value}), source="p.json")


def test_grids_count_patches_and_tokens() -> None:
    assert Grid(2, 4, 6).n_patches == 48
    assert Grid(2, 4, 6).n_tokens(4) == 12
