"""Provide a small random model of transformers, and fakes of vLLM's and SGLang's checks. The tests
do not install vLLM and SGLang. The fakes accept the values that the named source files document,
and handle other values as tools/checks/engines measured.
"""

import base64
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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
LETTERS = 16  # the token of the first byte; each byte is one token
N_LETTERS = 256


def small_model(
    vision: VisionConfig, *, seed: int = 0, image_token_id: int = 4, tie: bool = False
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a whole Qwen2.5-VL in float32 with peaked random weights. A wrong order or position
    changes the logits by their own size."""
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
    """Return the model with random weights for a peaked attention, without gradients."""
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
    """Provide one token for each byte, and the special tokens."""
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


class EngineDeadError(RuntimeError):
    """Report that vLLM's engine has stopped and answers no more requests."""


class FakeVllm:
    """Imitate the part of vLLM's engine that takes features, and its faults. As in vLLM 0.32.0
    (measured by tools/checks/engines), a wrong number of rows, width or time grid, or a missing
    cache file, stops the engine for all users. NaN spoils later requests. Sources:
    vllm/model_executor/models/qwen2_5_vl.py and qwen2_vl.py, vllm/renderers/chat_utils.py and
    distributed/ec_transfer/ec_connector/example_connector.py.
    """

    def __init__(self, width: int, cache: Path | None = None) -> None:
        self.width, self.cache = width, cache
        self.is_dead = self.is_spoilt = False

    def generate(self, request: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Return the language model's input: the rows of each item for each modality."""
        if self.is_dead:
            raise EngineDeadError("the engine has stopped")
        assert set(request) <= {"prompt", "multi_modal_data", "multi_modal_uuids"}
        found = {}
        for kind, data in request["multi_modal_data"].items():
            uuids = request.get("multi_modal_uuids", {}).get(kind)
            try:
                found[kind] = self._items(kind, data, uuids)
            except AssertionError:  # the front end accepts such a request, and the engine stops
                self.is_dead = True
                raise EngineDeadError(f"the engine stops at {kind} {data}") from None
        rows = [part for parts in found.values() for part in parts]
        self.is_spoilt = self.is_spoilt or any(bool(part.isnan().any()) for part in rows)
        if self.is_spoilt:
            return {kind: [part * float("nan") for part in parts] for kind, parts in found.items()}
        return found

    def _items(self, kind: str, data: dict[str, Any], uuids: list[str] | None) -> list[Tensor]:
        names = {f"{kind}_embeds", f"{kind}_grid_thw", "second_per_grid_ts"}
        if not set(data) <= names or f"{kind}_grid_thw" not in data:
            raise ValueError(f"the front end refuses {sorted(data)}")
        grids = data[f"{kind}_grid_thw"]
        if grids.dim() != 2 or grids.shape[1] != 3 or grids.dtype != torch.int64:
            raise ValueError("the front end refuses the grids")
        if kind == "image":
            assert (grids[:, 0] == 1).all()
        sizes = (grids.prod(-1) // 4).tolist()
        if f"{kind}_embeds" in data:
            rows = data[f"{kind}_embeds"]
            assert rows.device.type == "cpu"
            assert sum(sizes) == len(rows)
            parts = list(rows.split(sizes))
        else:
            if self.cache is None or uuids is None:
                raise ValueError("the front end refuses a request without embeddings")
            parts = [self._cached(uuid) for uuid in uuids]
            assert [len(part) for part in parts] == sizes
        assert all(part.dim() == 2 and part.shape[1] == self.width for part in parts)
        return parts

    def _cached(self, uuid: str) -> Tensor:
        assert self.cache is not None
        path = self.cache / uuid / "encoder_cache.safetensors"
        assert path.is_file()
        return load_file(path)["ec_cache"]

    def chat(self, parts: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
        """Answer like `generate`, from the parts of a message to the server."""
        return self.generate(chat_request(parts))


def chat_request(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the request that vLLM's server makes from the parts of a message. Each part is one
    image or video. Tensors are strict base64 of data that `torch.load` reads without pickled code,
    and grids may be JSON arrays. The function stacks grids and joins rows.
    """
    items: dict[str, list[dict[str, Tensor]]] = {}
    uuids: dict[str, list[str | None]] = {}
    for part in parts:
        kind = part["type"].removesuffix("_embeds")
        assert set(part) <= {"type", f"{kind}_embeds", "uuid"}
        item = {}
        for name, value in part[f"{kind}_embeds"].items():
            if isinstance(value, list):
                assert name == f"{kind}_grid_thw"
                item[name] = torch.tensor(value)
            else:
                raw = base64.b64decode(value, validate=True)
                item[name] = torch.load(io.BytesIO(raw), weights_only=True)
        items.setdefault(kind, []).append(item)
        uuids.setdefault(kind, []).append(part.get("uuid"))
    data = {}
    for kind, found in items.items():
        assert len({frozenset(item) for item in found}) == 1
        data[kind] = {
            name: (torch.cat if name.endswith("_embeds") else torch.stack)(
                [item[name] for item in found]
            )
            for name in found[0]
        }
    return {"prompt": "", "multi_modal_data": data, "multi_modal_uuids": uuids}


def sglang_items(input_ids: list[int], image_data: list[Any], image_token_id: int) -> list[Tensor]:
    """Return each image's rows, as SGLang assigns them to the runs of image tokens in `input_ids`.

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
    """Provide "vllm", "sglang" and transformers' `from_pretrained` for examples, at weights/tiny's
    width. The two engines check their inputs, and `from_pretrained` gives a small random model.
    """
    vision = replace(SMALL, out_hidden_size=192)

    class LLM:
        def __init__(self, model: str, *, enable_mm_embeds: bool = False) -> None:
            assert enable_mm_embeds

        def generate(self, request: dict[str, Any]) -> list[str]:
            images = FakeVllm(vision.out_hidden_size).generate(request)["image"]
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
