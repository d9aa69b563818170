"""Make small random models of transformers with the vision tower: Qwen2.5-VL and Omni's thinker."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from qwen_vit import VisionEncoder, as_hf_tower
from tests.support.checkpoints import SMALL
from tests.support.fake_engines import LETTERS, N_LETTERS, SPECIAL, peaked, small_model
from tests.support.towers import random_rows

VISION = replace(SMALL, hidden_size=32, out_hidden_size=48)
IMAGE, VIDEO, AUDIO = 4, 5, 6  # tokens
AUDIO_BEGIN, AUDIO_END, USER = 7, 8, 9
GRIDS = ((1, 4, 6), (1, 10, 8))


class Family(NamedTuple):
    """Describe a model class, its small model, and whether the class takes mm_token_type_ids."""

    model_class: Any
    make: Callable[[int], Any]
    wants_token_types: bool


def small_thinker(seed: int = 0) -> Any:
    """Make Qwen2.5-Omni's thinker, which stores q, k and v of its vision tower separately."""
    width = VISION.out_hidden_size
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": LETTERS + N_LETTERS,
            "hidden_size": width,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": width // 16,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 10_000.0,
            },
            "pad_token_id": SPECIAL["<|im_end|>"],
            "bos_token_id": None,
            "eos_token_id": None,
        },
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "output_dim": width,
            "num_mel_bins": 8,
            "n_window": 4,
        },
        vision_config=VISION.to_json(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        audio_start_token_id=AUDIO_BEGIN,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=SPECIAL["<|vision_start|>"],
        vision_end_token_id=SPECIAL["<|vision_end|>"],
        user_token_id=USER,
    )
    return peaked(Qwen2_5OmniThinkerForConditionalGeneration(config), seed)


FAMILIES = {
    "qwen2_5_vl": Family(
        Qwen2_5_VLForConditionalGeneration,
        lambda seed: small_model(VISION, seed=seed, image_token_id=IMAGE),
        True,
    ),
    "qwen2_5_omni": Family(Qwen2_5OmniThinkerForConditionalGeneration, small_thinker, False),
}


def make_model(family: str, folder: Path, seed: int = 0) -> tuple[Any, VisionEncoder]:
    """Write a model to the folder, and return the model and the encoder of this folder."""
    model = FAMILIES[family].make(seed)
    model.save_pretrained(folder)
    return model, VisionEncoder.from_pretrained(folder, device="cpu")


def with_our_tower(model: Any, encoder: VisionEncoder) -> Any:
    """Return the model with our tower in place of its own tower."""
    model.set_encoder(as_hf_tower(encoder), modality="image")
    return model


def tower_of(model: Any) -> Any:
    return model.get_encoder(modality="image")


def tower_name(model: Any) -> str:
    """Return the place of the tower, which differs between versions of transformers for Omni's
    thinker."""
    [name] = [name for name, module in model.named_modules() if module is tower_of(model)]
    return name


def vision_inputs(family: str, modality: str = "image", seed: int = 0) -> dict[str, Tensor]:
    """Return a prompt with two images, or with a video of two frames, and the pixels."""
    grids = GRIDS if modality == "image" else ((2, 4, 6),)
    token = IMAGE if modality == "image" else VIDEO
    ids = [20]
    for t, h, w in grids:
        pads = t * h * w // 4 * [token]
        ids += [SPECIAL["<|vision_start|>"], *pads, SPECIAL["<|vision_end|>"], 21]
    input_ids = torch.tensor([ids])
    rows = random_rows(sum(t * h * w for t, h, w in grids), seed)
    pixels, grid = ("pixel_values", "image_grid_thw")
    if modality == "video":
        pixels, grid = "pixel_values_videos", "video_grid_thw"
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        pixels: rows,
        grid: torch.tensor(grids),
    }
    if modality == "video" and family == "qwen2_5_omni":
        inputs["video_second_per_grid"] = torch.ones(len(grids))
    if FAMILIES[family].wants_token_types:
        inputs["mm_token_type_ids"] = (input_ids == token).long() * (1 if token == IMAGE else 2)
    return inputs


def make_both(family: str, folder: Path) -> tuple[Any, Any]:
    """Return a model with its own tower, and the same model with our tower."""
    model, encoder = make_model(family, folder)
    return model, with_our_tower(copy.deepcopy(model), encoder)
