"""Test that transformers' model gives the same answers with our features as with its own tower.

Each comparison also detects an injected fault.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2_5_VLProcessor

from qwen_vit.common import transformers_version
from qwen_vit.common.installation import install_command
from qwen_vit.downstream import as_hf_tower, expand_placeholders, to_hf
from qwen_vit.errors import ArgumentError
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import ImageFeatures
from tests.support import ROOT
from tests.support.fake_engines import small_tokenizer
from tests.support.features import features_with_grids
from tests.support.hf_setting import IMAGE_TOKEN, NEW_TOKENS, ONE_IMAGE, Setting
from tests.support.towers import assert_no_worse_than


def test_mm_encoder_outputs_give_the_answer_of_the_models_own_tower(setting: Setting) -> None:
    arguments = setting.features.to_hf(setting.ids, image_token_id=IMAGE_TOKEN)
    logits = setting.logits_from(**arguments)
    setting.assert_same_answer(logits, setting.tokens_from(**arguments))


def test_inputs_embeds_with_the_right_positions_give_the_same_answer(setting: Setting) -> None:
    """Generate with positions of transformers' own get_rope_index, with one forward pass for each
    new token."""
    model, ids = setting.model, setting.ids
    rows = torch.cat([each.embeds for each in setting.features])
    text = model.get_input_embeddings()
    embeds = text(ids).masked_scatter((ids == IMAGE_TOKEN)[..., None], rows)
    grids = torch.tensor([each.grid_thw for each in setting.features])
    positions, _ = model.model.get_rope_index(ids, setting.is_image, image_grid_thw=grids)
    first, tokens = None, []
    for _ in range(NEW_TOKENS):
        logits = setting.logits_from(input_ids=None, inputs_embeds=embeds, position_ids=positions)
        first = logits if first is None else first
        tokens.append(int(logits[0, -1].argmax()))
        embeds = torch.cat([embeds, text(torch.tensor([tokens[-1:]]))], dim=1)
        positions = torch.cat([positions, positions.max() + torch.ones(3, 1, 1).long()], dim=2)
    assert first is not None
    setting.assert_same_answer(first, tokens)


def test_a_file_keeps_every_bit_of_the_models_own_features(
    setting: Setting, tmp_path: Path
) -> None:
    """The features come from the model's own tower, so the file must keep every bit."""
    grids = setting.pixels["image_grid_thw"]
    with torch.no_grad():
        merged = setting.model.model.visual(setting.pixels["pixel_values"], grid_thw=grids)
    rows = merged.pooler_output.split((grids.prod(-1) // 4).tolist())
    made = [
        ImageFeatures(str(i), part, tuple(grid))
        for i, (part, grid) in enumerate(zip(rows, grids.tolist(), strict=True))
    ]
    stored = load_features(write_features(tmp_path / "f.safetensors", made, {}))
    arguments = stored.to_hf(setting.ids, image_token_id=IMAGE_TOKEN)
    assert torch.equal(setting.logits_from(**arguments), setting.logits)


def test_padded_batches_and_beams_work(setting: Setting) -> None:
    """Test two prompts of two and three images, and transformers' copies of both for its beams."""
    grids = [each.grid_thw for each in setting.features]
    tokenizer = small_tokenizer(IMAGE_TOKEN)
    texts = [
        expand_placeholders(ONE_IMAGE * len(part) + "?", part) for part in (grids[:2], grids[2:])
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pixels = setting.pixels | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()}
    ours = setting.features.to_hf(ids, image_token_id=IMAGE_TOKEN)
    answers = [
        setting.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **arguments,
            max_new_tokens=NEW_TOKENS,
            num_beams=3,
            do_sample=False,
        )
        for arguments in (pixels, ours)
    ]
    assert torch.equal(*answers)


def by_columns(image: ImageFeatures) -> ImageFeatures:
    """Put an image's rows in the order of its grid's columns."""
    _, h, w = image.grid_thw
    rows = image.embeds.unflatten(0, (h // 2, w // 2)).transpose(0, 1).flatten(0, 1)
    return replace(image, embeds=rows)


def swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    """Exchange the wide and the tall image, which have six tokens each."""
    return [images[3], images[1], images[2], images[0], images[4]]


def two_rows_swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    """Swap the first two of 45 rows."""
    return [replace(images[0], embeds=images[0].embeds[[1, 0, 2, 3, 4, 5]]), *images[1:]]


def grids_swapped(images: list[ImageFeatures]) -> list[ImageFeatures]:
    pairs = zip(images, swapped(images), strict=True)
    return [replace(image, grid_thw=other.grid_thw) for image, other in pairs]


FAULTS: dict[str, Callable[[list[ImageFeatures]], list[ImageFeatures]]] = {
    "rows by columns": lambda images: [by_columns(image) for image in images],
    "two images swapped": swapped,
    "two rows swapped": two_rows_swapped,
    "grids swapped": grids_swapped,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects_a_fault_in_the_features(setting: Setting, fault: str) -> None:
    arguments = to_hf(FAULTS[fault](list(setting.features)))
    arguments["mm_token_type_ids"] = setting.is_image
    logits = setting.logits_from(**arguments)
    with pytest.raises(AssertionError, match="ours"):
        assert_no_worse_than(logits, setting.logits, setting.exact_logits, factor=1000)
    if fault in ("rows by columns", "two images swapped"):  # other faults change no token
        assert setting.tokens_from(**arguments) != setting.tokens


def test_the_comparison_detects_positions_of_text(setting: Setting) -> None:
    """Without mm_token_type_ids, transformers silently numbers image tokens as text."""
    arguments = setting.features.to_hf()
    logits = setting.logits_from(**arguments)
    with pytest.raises(AssertionError, match="ours"):
        assert_no_worse_than(logits, setting.logits, setting.exact_logits, factor=1000)
    assert setting.tokens_from(**arguments) != setting.tokens


def test_image_tokens_that_do_not_fit_the_features_are_refused(setting: Setting) -> None:
    """Test a missing token, a missing image, and the right number of tokens in the wrong order."""
    one_less = setting.ids.clone()
    one_less[0, (one_less[0] == IMAGE_TOKEN).nonzero()[0]] = 20
    others = setting.features[["1.png", "0.png", "2.png", "3.png", "4.png"]]
    for ids, features in (
        (one_less, setting.features),
        (setting.ids, setting.features[:4]),
        (setting.ids, others),
    ):
        words = r"5 runs of .* token 4, .*lengths \[.*\. Expected \[.* the tokens .*\. Expand the"
        with pytest.raises(ArgumentError, match=words):
            features.to_hf(ids, image_token_id=IMAGE_TOKEN)


class OtherVersion:
    """Replace `importlib.metadata.version`, for a machine with another transformers."""

    def __init__(self, found: str | None) -> None:
        self.found = found

    def __call__(self, package: str) -> str:
        if self.found is None:
            raise PackageNotFoundError(package)
        return self.found


@pytest.mark.parametrize("made", [to_hf, as_hf_tower])
@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "transformers is not installed. Expected 5.18 or newer, which {} needs."),
        ("4.57.6", "transformers 4.57.6 is too old. Expected 5.18 or newer"),
        ("5.17.0", "5.18 or newer, which {} needs. Run {}."),
    ],
)
def test_a_transformers_that_is_missing_or_too_old_is_named(
    made: Any, found: str | None, words: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_version, "version", OtherVersion(found))
    given = setting.encoder if made is as_hf_tower else features_with_grids((1, 4, 4))
    expected = words.format(made.__name__, install_command("hf"))
    with pytest.raises(ArgumentError, match=re.escape(expected)):
        made(given)


@pytest.mark.parametrize("found", ["5.18.0", "5.18.0.dev0", "5.24.0", "6.0.0"])
def test_a_transformers_of_the_range_or_newer_is_taken(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_version, "version", OtherVersion(found))
    assert to_hf(features_with_grids((1, 4, 4)))


def test_one_range_of_transformers_is_stated_everywhere() -> None:
    """The version must be equal in pyproject.toml's extra, in the code, in the README and in
    docs/."""
    minimum = transformers_version.MIN_TRANSFORMERS
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra["optional-dependencies"]["hf"] == [f"transformers>={minimum}"]
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        stated = re.findall(
            r"transformers[\s(]+(5\.\d+)(?: or newer| to 5)", page.read_text("utf-8")
        )
        assert set(stated) <= {minimum}, page
        assert stated or page.name != "README.md"


@pytest.mark.parametrize("ids", [[[4, 4]], torch.tensor([4, 4]), torch.tensor([[4]]).numpy()])
def test_input_ids_of_another_kind_are_refused(ids: Any) -> None:
    words = r"input_ids is .*\. Expected a tensor of shape .prompts, tokens.\. Call the tokenizer"
    with pytest.raises(ArgumentError, match=words):
        to_hf(features_with_grids((1, 2, 2)), ids)


# Placeholders


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), max_size=5))
def test_placeholders_are_those_of_transformers_processor(
    halves: list[tuple[int, int, int]],
) -> None:
    """Source: Qwen2_5_VLProcessor.replace_image_token; the processor itself needs torchvision."""
    grids = [(t, 2 * h, 2 * w) for t, h, w in halves]
    tensor = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    processor: Any = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2), image_token="<|image_pad|>"
    )
    theirs = [
        Qwen2_5_VLProcessor.replace_image_token(processor, {"image_grid_thw": tensor}, i)
        for i in range(len(grids))
    ]
    text = "".join(f"<|vision_start|><|image_pad|><|vision_end|>{i}\n" for i in range(len(grids)))
    expected = "".join(f"<|vision_start|>{pad}<|vision_end|>{i}\n" for i, pad in enumerate(theirs))
    assert expand_placeholders(text, grids) == expected
    assert expand_placeholders(text, tensor) == expected


@pytest.mark.parametrize(
    ("text", "grids", "words"),
    [
        ("no image", [(1, 4, 4)], "has 0 <|image_pad|> for 1 image. Expected one per"),
        ("<|image_pad|>", [], "has 1 <|image_pad|> for 0 images. Expected one per image."),
        (
            "<|image_pad|>" * 4,
            [(1, 4, 4)],
            "has 4 .* Write one .* per image, and expand the text only once.",
        ),
        ("<|image_pad|>", [(1, 4, 5)], "a grid is (1, 4, 5)"),
        ("<|image_pad|>", [(1, 4.7, 4)], "a grid is (1, 4.7, 4). Expected whole numbers"),
        ("<|image_pad|>", 3, "image grids are 3. Expected a list of grids"),
        ("<|image_pad|>", [None], "a grid is None. Expected whole numbers"),
        ("<|image_pad|>", [(4, 4)], "a grid is (4, 4)"),
        ("<|image_pad|>", [(1, 0, 4)], "a grid is (1, 0, 4)"),
        ("<|image_pad|>", [(0, 4, 4)], "a grid is (0, 4, 4)"),
    ],
)
def test_a_text_that_does_not_fit_its_grids_is_refused(
    text: str, grids: list[Any], words: str
) -> None:
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises(ArgumentError, match=pattern):
        expand_placeholders(text, grids)
