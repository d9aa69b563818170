"""Provide transformers' small model with a prompt of five images, and our exported features."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from qwen_vit import VisionEncoder
from qwen_vit.downstream import expand_placeholders
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.collection import Features
from qwen_vit.feature_files.read import load_features
from tests.support.checkpoints import SMALL
from tests.support.fake_engines import small_model, small_tokenizer
from tests.support.towers import assert_no_worse_than

IMAGE_TOKEN = 4
ONE_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Height and width in pixels: a wide and a tall image with equally many tokens, an image with
# incomplete windows, and an image that is enlarged.
SIZES = ((56, 84), (140, 84), (61, 200), (84, 56), (20, 20))
NEW_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """Hold a model, a prompt with five images, the answer from pixels, and our exported
    features."""

    model: Any
    encoder: VisionEncoder
    features: Features
    prompt: str
    ids: Tensor
    pixels: dict[str, Tensor]
    logits: Tensor
    exact_logits: Tensor
    tokens: list[int]

    @property
    def is_image(self) -> Tensor:
        return (self.ids == IMAGE_TOKEN).long()

    def logits_from(self, **arguments: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**{"input_ids": self.ids} | arguments).logits

    def tokens_from(self, **arguments: Any) -> list[int]:
        return greedy(self.model, input_ids=self.ids, **arguments)

    def assert_same_answer(self, logits: Tensor, tokens: list[int]) -> None:
        """Check that all tokens are equal, and that the logits' error against float64 is at most
        twice the error of transformers' own float32. The factor 2 allows for different orders of
        sums in two float32 runs.
        """
        assert_no_worse_than(logits, self.logits, self.exact_logits, factor=2)
        assert tokens == self.tokens


def greedy(model: Any, **arguments: Any) -> list[int]:
    ids = arguments["input_ids"]
    arguments = {"attention_mask": torch.ones_like(ids)} | arguments
    out = model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def make_setting(folder: Path) -> Setting:
    """Write a model with transformers, read the tower from that folder, and export. The five images
    fill three shards, and a sixth image is broken.
    """
    vision = replace(SMALL, hidden_size=32, out_hidden_size=48)
    model = small_model(vision, image_token_id=IMAGE_TOKEN)
    model.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=1_003_520)
    processor.save_pretrained(folder)
    encoder = VisionEncoder.from_pretrained(folder)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in SIZES]
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    (folder / "images" / "1 broken.png").write_bytes(b"no image")
    exported = folder / "export"
    export_features(encoder, [str(folder / "images")], exported, ExportOptions(shard_size=2))
    features = load_features(exported)
    assert features.ids == [f"{i}.png" for i in range(len(SIZES))]
    prompt = "Which " + " or ".join(ONE_IMAGE for _ in SIZES) + "?<|im_end|>"
    text = expand_placeholders(prompt, [each.grid_thw for each in features])
    ids = small_tokenizer(IMAGE_TOKEN)(text, return_tensors="pt").input_ids
    pixels = dict(processor(images, return_tensors="pt"))
    pixels["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits
        doubled = pixels | {"pixel_values": pixels["pixel_values"].double()}
        exact_logits = exact(input_ids=ids, **doubled).logits
    tokens = greedy(model, input_ids=ids, **pixels)
    return Setting(model, encoder, features, prompt, ids, pixels, logits, exact_logits, tokens)
