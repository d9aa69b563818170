"""Make small random checkpoints in the published format, in any key layout."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import VisionConfig

SMALL = VisionConfig(
    depth=3,
    hidden_size=32,
    num_heads=2,
    intermediate_size=12,
    out_hidden_size=24,
    in_channels=3,
    patch_px=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_px=112,
    fullatt_block_indexes=(1,),
    rope_theta=10_000.0,
)
WIDE = replace(SMALL, hidden_size=160, intermediate_size=140)  # head_dim 80, as published


def random_tensors(
    config: VisionConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return normal values under the published names. The weights of norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator) * 0.05
        is_norm = "norm" in name or "ln_q" in name
        tensors[name] = (values + 1 if is_norm else values).to(dtype)
    return tensors


def split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the layout of Qwen2.5-Omni: q, k and v as three linears."""
    split = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}.")] = part.contiguous()
        else:
            split[name] = tensor
    return split


def write_checkpoint(
    folder: Path,
    config: VisionConfig,
    *,
    prefix: str = "visual.",
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """Write a checkpoint and return its tensors under their bare published names.

    "thinker.visual." writes Qwen2.5-Omni's split q, k, v and its config, "" a bare tower with a
    flat config. With a prefix, the checkpoint also has a tensor of a language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed=seed, dtype=dtype)
    omni = prefix == "thinker.visual."
    stored = {prefix + k: v for k, v in (split_qkv(tensors) if omni else tensors).items()}
    vision = config.to_json()
    if omni:
        document = {"model_type": "qwen2_5_omni", "thinker_config": {"vision_config": vision}}
    else:
        document = {"model_type": "qwen2_5_vl", "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(document if prefix else vision))
    settings = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if prefix:
        stored["lm_head.weight"] = torch.zeros(4, 4, dtype=dtype)
    write_weights(folder, stored, shards=shards)
    return tensors


def write_weights(folder: Path, stored: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write model.safetensors, or this number of shards and their index."""
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    names = sorted(stored)
    for i in range(shards):
        file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[i::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peaked_tensors(config: VisionConfig, seed: int) -> dict[str, Tensor]:
    """Return random weights that keep activations near 1 and the softmax far from uniform. With
    nearly equal attention weights, a mistake in RoPE or in the segments would have little
    effect."""
    tensors = random_tensors(config, seed=seed, dtype=torch.float32)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensor /= 0.05 * tensor[0].numel() ** 0.5
        elif name.endswith("bias"):
            tensor *= 10
        if ".qkv." in name:
            tensor[: 2 * config.hidden_size] *= 1.5
    return tensors
