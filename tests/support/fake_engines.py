"""Who takes features: transformers' own model, small and random; and what vLLM and SGLang check.

vLLM and SGLang need a GPU and are not installed. The stand-ins here accept what their sources at
the named files document, and refuse the rest.
"""

import base64
import io
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from qwen_vit.config import VisionConfig
from qwen_vit.integrations.hf import IMAGE_TOKEN_ID
from tests.support.checkpoints import SMALL

SPECIAL = {"<|im_start|>": 0, "<|im_end|>": 1, "<|vision_start|>": 2, "<|vision_end|>": 3}
LETTERS = 16  # where ordinary bytes begin: one token each
N_LETTERS = 256


def small_model(
    vision: VisionConfig, *, seed: int = 0, image_token_id: int = 4, tie: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """A whole Qwen2.5-VL in float32 whose random weights are peaked: an order or a position that
    is wrong changes its logits by as much as their size."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": max(LETTERS + N_LETTERS, image_token_id + 2),
            "hidden_size": vision.out_hidden_size,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": vision.out_hidden_size // 16,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 10_000.0,
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": tie,
        },
        vision_config=vision.to_json(),
        image_token_id=image_token_id,
        video_token_id=image_token_id + 1,
        vision_start_token_id=SPECIAL["<|vision_start|>"],
        vision_end_token_id=SPECIAL["<|vision_end|>"],
        tie_word_embeddings=tie,
    )
    return peaked(Qwen2_5_VLForConditionalGeneration(config), seed)


def peaked(model: Any, seed: int) -> Any:
    """The model with random weights that make its attention peaked, without gradients."""
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            scale = 1.0 if "embed_tokens" in name else gain / weight[0].numel() ** 0.5
            weight.normal_(0, scale, generator=generator)
        elif "norm" in name or "ln_q" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0, 0.5, generator=generator)
    return model


def small_tokenizer(image_token_id: int = 4) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = SPECIAL | {"<|image_pad|>": image_token_id}
    letters = {letter: LETTERS + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(letters | special, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(special),
        pad_token="<|im_end|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def vllm_items(data: dict[str, Any], hidden_size: int) -> list[Tensor]:
    """Each image's rows, found as vLLM's parser finds them in `multi_modal_data`.

    Source: vLLM, vllm/model_executor/models/qwen2_5_vl.py (Qwen2_5_VLImageEmbeddingInputs: the
    names and shapes) and qwen2_vl.py (Qwen2VLMultiModalDataParser: the required fields, and rows
    given out by sizes from the grids).
    """
    assert set(data) == {"image"}
    assert set(data["image"]) == {"image_embeds", "image_grid_thw"}
    embeds, grids = data["image"]["image_embeds"], data["image"]["image_grid_thw"]
    assert embeds.device.type == grids.device.type == "cpu"
    assert embeds.dim() == grids.dim() == 2
    assert embeds.is_floating_point()
    assert embeds.shape[1] == hidden_size
    assert grids.dtype == torch.int64
    assert grids.shape[1] == 3
    sizes = (grids.prod(-1) // 2 // 2).tolist()
    assert sum(sizes) == len(embeds)
    return list(embeds.split(sizes))


def vllm_chat_data(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The `multi_modal_data` that vLLM's server makes of the parts of a message.

    Source: vLLM, docs/features/multimodal_inputs.md (the form of a part, one image each, tensors
    of (image_feature_size, hidden_size) and (3,)); vllm/multimodal/media/image.py (how each is
    decoded: strict base64, then `torch.load` without pickled code); vllm/entrypoints/chat_utils.py
    (`_merge_embeds`: grids stacked, rows joined).
    """
    images = []
    for part in parts:
        assert set(part) == {"type", "image_embeds"}
        assert part["type"] == "image_embeds"
        image = {}
        for name, text in part["image_embeds"].items():
            raw = base64.b64decode(text, validate=True)
            image[name] = torch.load(io.BytesIO(raw), weights_only=True)
        assert image["image_embeds"].dim() == 2
        assert image["image_grid_thw"].shape == (3,)
        images.append(image)
    return {
        "image": {
            "image_embeds": torch.cat([image["image_embeds"] for image in images]),
            "image_grid_thw": torch.stack([image["image_grid_thw"] for image in images]),
        }
    }


def sglang_items(input_ids: list[int], image_data: list[Any], image_token_id: int) -> list[Tensor]:
    """Each image's rows, as SGLang gives them to the runs of image tokens in `input_ids`.

    Source: SGLang, docs/advanced_features/vlm_query.ipynb ("precomputed_embedding", with
    `input_ids`) and python/sglang/srt/multimodal/processors/base_processor.py (validate_mm_data:
    one such item a request; get_mm_items_offset: an image for each run of image tokens).
    """
    [item] = image_data
    assert set(item) == {"format", "feature", "image_grid_thw"}
    assert item["format"] == "precomputed_embedding"
    feature, grids = item["feature"], item["image_grid_thw"]
    assert feature.dim() == 2
    assert feature.is_floating_point()
    assert grids.dtype == torch.int64
    assert grids.dim() == 2
    assert grids.shape[1] == 3
    ids = torch.tensor(input_ids)
    assert int((ids == image_token_id).sum()) == len(feature)
    is_image = torch.nn.functional.pad((ids == image_token_id).int(), (1, 1))
    change = is_image.diff()
    runs = ((change == -1).nonzero() - (change == 1).nonzero()).flatten().tolist()
    assert runs == (grids.prod(-1) // 4).tolist()
    return list(feature.split(runs))


def install_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """For examples: "vllm", "sglang" and transformers' `from_pretrained`, at weights/tiny's width.

    The engines of the former check what they are given; the latter gives a small random model.
    """
    vision = replace(SMALL, out_hidden_size=192)

    class LLM:
        def __init__(self, model: str, *, enable_mm_embeds: bool = False) -> None:
            assert enable_mm_embeds

        def generate(self, request: dict[str, Any]) -> list[str]:
            assert set(request) == {"prompt", "multi_modal_data"}
            images = vllm_items(request["multi_modal_data"], vision.out_hidden_size)
            assert request["prompt"].count("<|image_pad|>") == len(images)
            return ["..."]

    class Engine:
        def __init__(self, *, model_path: str) -> None:
            pass

        def generate(self, *, input_ids: list[int], image_data: list[Any]) -> dict[str, str]:
            assert isinstance(input_ids, list)
            sglang_items(input_ids, image_data, IMAGE_TOKEN_ID)
            return {"text": "..."}

    for module, engine in (("vllm", LLM), ("sglang", Engine)):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[module], engine.__name__, engine, raising=False)
    model = staticmethod(lambda name: small_model(vision, image_token_id=IMAGE_TOKEN_ID, tie=True))
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "from_pretrained", model)
    tokenizer = staticmethod(lambda name: small_tokenizer(IMAGE_TOKEN_ID))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
