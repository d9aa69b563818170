"""Write a Qwen2.5-VL of the 7B shape with random weights, without a download.

`write_small` writes the whole tower and two language layers with peaked weights, so that the
benchmark can compare answers with float64. `write_large` writes all of the 7B's layers without
weights (for load_format="dummy"), so that requests take a realistic time.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_vit.config import VisionConfig
from tools.checks.engines.small_model import (
    LOGIT_RMS,
    N_BYTES,
    N_TOKENS,
    PEAK,
    SPECIAL_IDS,
    write_processors,
    write_tokenizer,
)
from tools.random_tower import SHAPE, random_weights

HIDDEN, HEADS, KEY_HEADS = 3584, 28, 4
MAX_PIXELS = 12_845_056
SMALL_MLP, SMALL_LAYERS = 4096, 2
LARGE_MLP, LARGE_LAYERS = 18_944, 28


def small_folder(folder: Path, seed: int) -> Path:
    """Return the folder of the small model with these weights."""
    return folder / (f"small{seed}" if seed else "small")


def embeddings_file(folder: Path, variant: str, seed: int) -> Path:
    """Return the file of the embeddings that an engine's tower computed with these weights."""
    return folder / f"{variant}{seed}.safetensors"


def config_document(n_layers: int, mlp: int) -> dict[str, Any]:
    """Return a config.json of the 7B shape, with a vocabulary of bytes."""
    text = {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": N_TOKENS,
        "hidden_size": HIDDEN,
        "intermediate_size": mlp,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": SPECIAL_IDS["<|im_end|>"],
        "tie_word_embeddings": False,
    }
    return {
        **text,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": VisionConfig.from_json(SHAPE).to_json(),
        "image_token_id": SPECIAL_IDS["<|image_pad|>"],
        "video_token_id": SPECIAL_IDS["<|video_pad|>"],
        "vision_start_token_id": SPECIAL_IDS["<|vision_start|>"],
        "vision_end_token_id": SPECIAL_IDS["<|vision_end|>"],
        "torch_dtype": "bfloat16",
    }


def _write_common(folder: Path, n_layers: int, mlp: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = config_document(n_layers, mlp)
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    write_tokenizer(folder)
    write_processors(folder, max_pixels=MAX_PIXELS)


def write_large(folder: Path) -> None:
    """Write the configuration of a whole 7B, without weights."""
    _write_common(folder, LARGE_LAYERS, LARGE_MLP)


def write_small(folder: Path, device: torch.device, seed: int = 0) -> None:
    """Write a model with the whole tower and a language model of two peaked layers."""
    _write_common(folder, SMALL_LAYERS, SMALL_MLP)
    tower = random_weights(VisionConfig.from_json(SHAPE), 2 * seed, device)
    weights = {f"visual.{name}": tensor for name, tensor in tower.items()}
    weights |= _language_weights(2 * seed + 1, device)
    stored = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def _language_weights(seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    head_dim, C = HIDDEN // HEADS, HIDDEN
    weights = {
        "model.embed_tokens.weight": normal(N_TOKENS, C, scale=1.0),
        "model.norm.weight": 1 + normal(C, scale=0.1),
        "lm_head.weight": normal(N_TOKENS, C, scale=LOGIT_RMS / C**0.5),
    }
    weights["lm_head.weight"][N_BYTES:] = 0  # answers never contain a special token
    for layer in range(SMALL_LAYERS):
        block = f"model.layers.{layer}."
        for name, rows, gain in (
            ("q", HEADS * head_dim, PEAK),
            ("k", KEY_HEADS * head_dim, PEAK),
            ("v", KEY_HEADS * head_dim, 1.0),
        ):
            weights[f"{block}self_attn.{name}_proj.weight"] = normal(rows, C, scale=gain / C**0.5)
            weights[f"{block}self_attn.{name}_proj.bias"] = normal(rows, scale=0.5)
        weights[f"{block}self_attn.o_proj.weight"] = normal(C, C, scale=C**-0.5)
        weights[f"{block}mlp.gate_proj.weight"] = normal(SMALL_MLP, C, scale=C**-0.5)
        weights[f"{block}mlp.up_proj.weight"] = normal(SMALL_MLP, C, scale=C**-0.5)
        weights[f"{block}mlp.down_proj.weight"] = normal(C, SMALL_MLP, scale=SMALL_MLP**-0.5)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}{norm}.weight"] = 1 + normal(C, scale=0.1)
    return weights
