"""Write small random models with different vision towers, which the plugin must not change."""

from pathlib import Path
from typing import Any

import torch

from tools.checks.engines.small_model import (
    TOKENS,
    randomise,
    randomise_language_model,
    text_settings,
    write_processors,
    write_tokenizer,
)

TOWERS = {  # model: vLLM's class of the vision tower
    "Qwen2-VL": "Qwen2VisionTransformer",
    "Qwen3-VL": "Qwen3_VisionTransformer",
}
CASES_OF_OTHERS = ("tall", "several", "swapped")  # no videos: Qwen3-VL adds text timestamps

WIDTH, HIDDEN, DEPTH, HEADS = 64, 192, 2, 2  # WIDTH and DEPTH: towers; HIDDEN: text


def write_other_models(work: Path) -> None:
    """Write WORK/Qwen2-VL and WORK/Qwen3-VL: the same bytes on every run."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    second = Qwen2VLConfig(
        text_config=text_settings(HIDDEN),
        vision_config={
            "depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "mlp_ratio": 2,
            "hidden_size": HIDDEN,
        },
        **TOKENS,
    )  # fmt: skip
    third = Qwen3VLConfig(
        text_config=text_settings(
            HIDDEN,
            head_dim=HIDDEN // HEADS,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True,
                "mrope_section": [16, 16, 16],
            },
        ),
        vision_config={
            "depth": DEPTH, "hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 128,
            "out_hidden_size": HIDDEN, "patch_size": 14, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **TOKENS,
    )  # fmt: skip
    _write(work / "Qwen2-VL", Qwen2VLForConditionalGeneration(second), "Qwen2VLProcessor")
    _write(
        work / "Qwen3-VL", Qwen3VLForConditionalGeneration(third), "Qwen3VLProcessor",
        video_processor_type="Qwen3VLVideoProcessor",
    )  # fmt: skip


def _write(folder: Path, model: Any, processor: str, **settings: str) -> None:
    model = model.float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    randomise_language_model(model, generator)
    randomise(model.model.visual, generator)
    model.save_pretrained(folder)
    write_tokenizer(folder, processor)
    write_processors(folder, processor_class=processor, **settings)
