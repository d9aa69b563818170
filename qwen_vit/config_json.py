"""Map Hugging Face's config files to the fields of VisionConfig and ImageConfig, by tables."""

import math
from collections.abc import Mapping
from typing import Any

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.strict_json import child_object, is_integer, is_number
from qwen_vit.errors import CheckpointError

__all__ = ["VISION_KEYS", "find_vision_part", "image_fields", "vision_fields"]

OUR_MODEL_TYPES = (
    "qwen2_5_vl",  # a whole model, and the vision part of the published 32B
    "qwen2_5_omni",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl_vision",
    "qwen2_5_omni_vision_encoder",
)

# Models that look similar: the start of model_type, the name, and the software to use instead.
OTHER_MODELS = (
    ("qwen2_vl", "Qwen2-VL", "transformers' Qwen2VLForConditionalGeneration"),
    ("qwen3_vl", "Qwen3-VL", "transformers' Qwen3VLForConditionalGeneration"),
    ("qwen3_omni", "Qwen3-Omni", "transformers' Qwen3OmniMoeForConditionalGeneration"),
    ("qwen3_5", "Qwen3.5", "transformers' AutoModelForImageTextToText"),
)
QWEN2_VL_KEYS = ("embed_dim", "mlp_ratio")
QWEN3_VL_KEYS = ("deepstack_visual_indexes", "num_position_embeddings")
QWEN2_5_KEYS = ("out_hidden_size", "window_size", "fullatt_block_indexes")

# Each row: field, its names in JSON (to_json writes the first), the published value, the largest
# accepted value. The 32B config omits depth and num_heads. No published config omits
# out_hidden_size.
VISION_KEYS: tuple[tuple[str, tuple[str, ...], int | None, int], ...] = (
    ("depth", ("depth", "num_hidden_layers"), 32, 512),
    ("hidden_size", ("hidden_size",), 1280, 65_536),
    ("num_heads", ("num_heads", "num_attention_heads"), 16, 1_024),
    ("intermediate_size", ("intermediate_size",), 3420, 1_048_576),
    ("out_hidden_size", ("out_hidden_size",), None, 1_048_576),
    ("in_channels", ("in_channels", "in_chans"), 3, 1_024),
    ("patch_px", ("patch_size", "spatial_patch_size"), 14, 1_024),
    ("temporal_patch_size", ("temporal_patch_size",), 2, 1_024),
    ("spatial_merge_size", ("spatial_merge_size",), 2, 64),
    ("window_px", ("window_size",), 112, 65_536),
)
PUBLISHED_FULLATT_BLOCK_INDEXES = (7, 15, 23, 31)
PUBLISHED_ROPE_THETA = 10_000.0

# The limits' names at the top of the file and, in newer transformers, inside `size`. The first name
# with a value wins. The last column has transformers' defaults.
PIXEL_LIMITS = (
    ("min_pixels", ("shortest_edge", "min_pixels"), 3_136),
    ("max_pixels", ("longest_edge", "max_pixels"), 1_003_520),
)
MIN_AREA = 28 * 28  # one token's
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PILLOW_BICUBIC = 3


def find_vision_part(config: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], str]:
    """Return the vision part of a config, and the name of this part for error messages.

    Raises CheckpointError for the config of another model.
    """
    _refuse_other_models(config, source)
    nested = [key for key in ("thinker_config", "vision_config") if key in config]
    if "model_type" not in config and not nested and not any(key in config for key in QWEN2_5_KEYS):
        raise CheckpointError(
            "there is no model_type",
            name=source,
            expected=f"one of {', '.join(OUR_MODEL_TYPES)}",
            remedy="use the config.json that belongs to the weights",
        )
    for key in ("thinker_config", "vision_config"):
        if key in config:
            config, source = child_object(config, key, source)
            _refuse_other_models(config, source)
    return config, source


def _refuse_other_models(config: Mapping[str, Any], source: str) -> None:
    if config.get("auto_map"):
        raise CheckpointError(
            "auto_map requests remote code, and qwen_vit never imports remote code",
            name=source,
            remedy="if this is a plain Qwen2.5-VL tower, remove auto_map from a copy of the file",
        )
    model_type = config.get("model_type")
    # Qwen2.5-Omni's config also has an embed_dim, in addition to keys that only Qwen2.5 has.
    if any(key in config for key in QWEN3_VL_KEYS):
        model_type = "qwen3_vl"
    elif any(key in config for key in QWEN2_VL_KEYS) and not any(
        key in config for key in QWEN2_5_KEYS
    ):
        model_type = "qwen2_vl"
    for start, name, runner in OTHER_MODELS:
        if isinstance(model_type, str) and model_type.startswith(start):
            raise CheckpointError(
                f"this is {name}",
                name=source,
                expected="Qwen2.5-VL or Qwen2.5-Omni, the only vision towers that qwen_vit reads",
                remedy=f"use {runner}",
            )
    if "model_type" in config and model_type not in OUR_MODEL_TYPES:
        raise CheckpointError(
            f"model_type is {short_repr(model_type)}",
            name=source,
            expected=f"one of {', '.join(OUR_MODEL_TYPES)}",
            remedy="use a Qwen2.5-VL or Qwen2.5-Omni checkpoint, or try transformers' AutoModel",
        )


def vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of VisionConfig, which checks their types and ranges."""
    fields: dict[str, Any] = {}
    for field, names, published, _ in VISION_KEYS:
        stated = {name: vision[name] for name in names if name in vision}
        values = list(stated.values()) or [published]
        if any(value != values[0] for value in values):
            raise CheckpointError(
                " and ".join(f"{name} {short_repr(value)}" for name, value in stated.items())
                + " disagree",
                expected="one value",
            )
        if not stated and published is None:
            raise CheckpointError(
                f"{names[0]} is missing, and qwen_vit assumes no value, because the published "
                "models differ"
            )
        fields[field] = values[0]
    indexes = vision.get("fullatt_block_indexes", PUBLISHED_FULLATT_BLOCK_INDEXES)
    if not isinstance(indexes, list | tuple):
        raise CheckpointError(f"fullatt_block_indexes is {short_repr(indexes)}", expected="a list")
    activation = vision.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"hidden_act is {short_repr(activation)}", expected="'silu'")
    theta = _as_float(_read_rope(vision))
    return {**fields, "fullatt_block_indexes": tuple(indexes), "rope_theta": theta}


def _read_rope(vision: Mapping[str, Any]) -> Any:
    # Files older than transformers 5 have no entry, and their towers used the same RoPE.
    rope = vision.get("rope_parameters")
    if rope is None:
        return vision.get("rope_theta", PUBLISHED_ROPE_THETA)
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_parameters is {short_repr(rope)}", expected="an object")
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind not in ("axial", "default"):
        raise CheckpointError(
            f"rope_parameters has the type {short_repr(kind)}",
            expected="'axial' or 'default'",
        )
    unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
    if unknown:
        raise CheckpointError(
            f"rope_parameters contains {short_repr(unknown)}",
            expected="rope_type and rope_theta only",
        )
    return rope.get("rope_theta", PUBLISHED_ROPE_THETA)


def image_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ImageConfig, which checks their types and ranges."""
    stated = {key: value for key, value in config.items() if value is not None}
    kind = stated.get("image_processor_type", "Qwen2VLImageProcessor")
    if not isinstance(kind, str) or not kind.startswith(("Qwen2VL", "Qwen2_5")):
        raise CheckpointError(
            f"image_processor_type is {short_repr(kind)}", expected="Qwen2VLImageProcessor"
        )
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if stated.get(step, True) is not True:
            raise CheckpointError(f"{step} is {short_repr(stated[step])}", expected="true")
    resample = stated.get("resample", PILLOW_BICUBIC)
    if not is_integer(resample) or resample != PILLOW_BICUBIC:
        raise CheckpointError(f"resample is {short_repr(resample)}", expected="3 (bicubic)")
    rescale = stated.get("rescale_factor", 1 / 255)
    if not is_number(rescale) or not math.isclose(rescale, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"rescale_factor is {short_repr(rescale)}", expected="1/255")
    size = stated.get("size", {})
    if not isinstance(size, Mapping):
        raise CheckpointError(
            f"size is {short_repr(size)}",
            expected="an object with shortest_edge and longest_edge",
        )
    known = {key for _, in_size, _ in PIXEL_LIMITS for key in in_size}
    if size.keys() - known:
        raise CheckpointError(
            f"size contains {short_repr(sorted(size.keys() - known))}, which belongs to another "
            "model's processor",
            expected="shortest_edge and longest_edge: height x width in pixels",
        )
    for key, value in size.items():
        if is_integer(value) and value < MIN_AREA:
            raise CheckpointError(
                f"size has {key} {value}, which is a side length of another model's processor",
                expected="a number of pixels: height x width",
            )
    fields: dict[str, Any] = {
        "patch_px": stated.get("patch_size", 14),
        "temporal_patch_size": stated.get("temporal_patch_size", 2),
        "merge_size": stated.get("merge_size", 2),
    }
    for name, in_size, default in PIXEL_LIMITS:
        places = [stated.get(name), *(size.get(key) for key in in_size)]
        fields[name] = next((value for value in places if value is not None), default)
    for name, clip in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        values = stated.get(name, clip)
        if not isinstance(values, list | tuple):
            raise CheckpointError(
                f"{name} is {short_repr(values)}", expected="a list of three numbers"
            )
        fields[name] = tuple(map(_as_float, values))
    return fields


def _as_float(value: Any) -> Any:
    # keep a value that is not a number, for the rule that names it
    return float(value) if is_number(value) else value
