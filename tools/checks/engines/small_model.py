"""Write a complete small random Qwen2.5-VL around weights/tiny, with tokenizer and processors.

It has 14 MB in float32. transformers, vLLM and SGLang load it from the same folder. The language
model is peaked, so that a wrong order, position or image changes its answers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tools.common import ROOT

TINY = ROOT / "weights" / "tiny"
SEED = 12  # chosen from 0 to 15: nine different answers, with clear likeliest tokens

# The vocabulary has 256 tokens for bytes, then these, then unused tokens up to a multiple of 64.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
N_BYTES, N_TOKENS = 256, 320
SPECIAL_IDS = {name: N_BYTES + i for i, name in enumerate(SPECIAL)}
TOKENS: dict[str, Any] = {
    "image_token_id": SPECIAL_IDS["<|image_pad|>"],
    "video_token_id": SPECIAL_IDS["<|video_pad|>"],
    "vision_start_token_id": SPECIAL_IDS["<|vision_start|>"],
    "vision_end_token_id": SPECIAL_IDS["<|vision_end|>"],
    "tie_word_embeddings": False,
}

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, MLP = 3, 2, 1, 96, 512  # 2 heads, for tensor parallelism of 2
MROPE_SECTION = [12, 18, 18]  # rotary pairs for time, row and column; the sum is HEAD_DIM / 2
PEAK = 1.6  # the gain of queries and keys, which makes attention peaked
LOGIT_RMS = 2.5  # log-probabilities between about -1 and -14

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def write_model(folder: Path) -> None:
    """Write the model: the same bytes on every run."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder)
    write_tokenizer(folder)
    write_processors(folder)


def write_processors(folder: Path, **changes: Any) -> None:
    """Write the settings of the processors for images and videos: tiny's, with `changes`."""
    settings = {**json.loads((TINY / "preprocessor_config.json").read_text()), **changes}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", **settings}
    video.pop("image_processor_type")
    for name, document in (("preprocessor", settings), ("video_preprocessor", video)):
        (folder / f"{name}_config.json").write_text(json.dumps(document, indent=2) + "\n")


def _write_weights(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision: dict[str, Any] = json.loads((TINY / "config.json").read_text())["vision_config"]
    config = Qwen2_5_VLConfig(
        text_config=text_settings(vision["out_hidden_size"]), vision_config=vision, **TOKENS
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval().requires_grad_(False)
    randomise_language_model(model, torch.Generator().manual_seed(SEED))
    tower = {
        name.removeprefix("visual."): tensor.float()
        for name, tensor in load_file(TINY / "model.safetensors").items()
    }
    model.model.visual.load_state_dict(tower, strict=True)
    model.save_pretrained(folder)


def text_settings(hidden_size: int, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a small language model."""
    return {
        "vocab_size": N_TOKENS,
        "hidden_size": hidden_size,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": MROPE_SECTION,
            "rope_theta": 10_000.0,
        },
        "bos_token_id": None,
        "eos_token_id": SPECIAL_IDS["<|im_end|>"],
        "tie_word_embeddings": False,
        **changes,
    }


def randomise_language_model(model: Any, generator: torch.Generator) -> None:
    """Give a model of transformers a peaked language model, and likely tokens that are bytes."""
    randomise(model.model.language_model, generator)
    head = model.lm_head.weight
    head.normal_(0, LOGIT_RMS / head.shape[1] ** 0.5, generator=generator)
    head[N_BYTES:] = 0  # 0 is never the largest logit, so no answer has a special token


def randomise(part: nn.Module, generator: torch.Generator) -> None:
    """Write random weights of about the scale that keeps the size of activations."""
    for name, weight in sorted(part.named_parameters()):
        if "norm" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0, 0.5, generator=generator)
        else:
            gain = PEAK if "q_proj" in name or "k_proj" in name else 1.0
            is_table = "embed_tokens" in name or "pos_embed" in name
            scale = 1.0 if is_table else gain / weight[0].numel() ** 0.5
            weight.normal_(0, scale, generator=generator)


def write_tokenizer(folder: Path, processor: str = "Qwen2_5_VLProcessor") -> None:
    """Write a tokenizer of one token per byte, because Qwen's merges need a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *SPECIAL, *(f"<|{i}|>" for i in range(N_BYTES + len(SPECIAL), N_TOKENS))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=names[N_BYTES:],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    document["tokenizer_class"] = "PreTrainedTokenizerFast"  # a class that every transformers has
    document["processor_class"] = processor
    path.write_text(json.dumps(document, indent=2) + "\n")
