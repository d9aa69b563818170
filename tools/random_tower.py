"""Create a 7B-shaped tower with random weights, without a download."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import VisionConfig

SHAPE = {"model_type": "qwen2_5_vl", "out_hidden_size": 3584}  # the defaults are as published


def random_weights(config: VisionConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return bf16 weights by published name, with scaled queries and keys for peaked attention."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator, device=device)
        if "norm" in name or "ln_q" in name:
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values *= 0.02
        else:
            values *= math.prod(shape[1:]) ** -0.5
        if name.endswith("qkv.weight"):
            values[: 2 * config.hidden_size] *= 1.6
        tensors[name] = values.bfloat16()
    return tensors


def heavy_rows(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Multiply each row of every linear weight by a log-normal factor, exp(0.5 N(0, 1))."""
    generator = torch.Generator().manual_seed(seed)
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("weight") and tensor.dim() == 2:
            factors = torch.exp(0.5 * torch.randn(len(tensor), 1, generator=generator))
            changed[name] = (tensor.float() * factors.to(tensor.device)).to(tensor.dtype)
    return changed


def outlier_channels(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Multiply 4 channels of what every block adds to the residual stream by 30."""
    generator = torch.Generator().manual_seed(seed)
    changed, channels = dict(tensors), None
    for name, tensor in tensors.items():
        if name.endswith(("attn.proj.weight", "down_proj.weight")):
            if channels is None:
                channels = torch.randperm(len(tensor), generator=generator)[:4]
            changed[name] = tensor.clone()
            changed[name][channels.to(tensor.device)] *= 30
    return changed


# Kinds of random weights, which differ in the error of 8-bit floats. The arguments have the seed.
FAMILIES: dict[str, Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]] = {
    "plain": lambda tensors, seed: tensors,
    "heavy-tailed rows": heavy_rows,
    "outlier channels": outlier_channels,
}


def write_model(folder: Path, device: torch.device, **settings: object) -> None:
    """Write random weights in the published format, as a folder for `from_pretrained`.

    `settings` replace values of the published config, such as `depth`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = VisionConfig.from_json({**SHAPE, **settings})
    document = {"model_type": "qwen2_5_vl", "vision_config": config.to_json()}
    (folder / "config.json").write_text(json.dumps(document))
    limits = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    weights = random_weights(config, 0, device)
    stored = {f"visual.{name}": tensor.cpu() for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
