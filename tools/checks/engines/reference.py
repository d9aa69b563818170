"""Compute reference answers by transformers' own model in float64, without a processor."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tools.checks.engines.answers import Answer, Answers
from tools.checks.engines.cases import (
    CASES,
    MERGE,
    NEW_TOKENS,
    SECONDS_PER_GRID,
    Case,
    grid,
    rows,
)
from tools.checks.engines.small_model import SPECIAL_IDS

MIN_GAP = 0.01  # between the two likeliest tokens, so that rounding cannot swap them


def reference_answers(folder: Path, cases: Iterable[Case] = CASES) -> Answers:
    """Answer cases greedily with transformers' own tower.

    Raises:
        ValueError: Two tokens are almost equally likely, so the model needs another seed.
    """
    found = {}
    for each, answer, gap in _answer(folder, cases):
        if gap < MIN_GAP:
            raise ValueError(f"{each.name!r}: the two likeliest tokens are {gap:.4f} apart")
        found[each.name] = answer
    return found


def clear_answers(folder: Path, cases: Iterable[Case]) -> Answers:
    """Return the result of `reference_answers`, without cases in which two tokens are almost
    equally likely."""
    return {each.name: answer for each, answer, gap in _answer(folder, cases) if gap >= MIN_GAP}


def _answer(folder: Path, cases: Iterable[Case]) -> Iterator[tuple[Case, Answer, float]]:
    """Yield each case, its answer, and the smallest distance between the two likeliest tokens."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for each in cases:
        arguments = _inputs(each, tokenizer, settings)
        with torch.no_grad():
            out = model.generate(
                **arguments, do_sample=False, max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        logprobs = torch.cat(out.logits).log_softmax(-1)
        best = logprobs.topk(2).values
        gap = float((best[:, 0] - best[:, 1]).min())
        yield each, Answer(out.sequences[0, -NEW_TOKENS:].clone(), logprobs), gap


def _inputs(each: Case, tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    text = each.text
    names = {"<|image_pad|>": each.pictures, "<|video_pad|>": each.videos}
    for pad, kind in names.items():
        for name in kind:
            n = torch.tensor(grid(name)).prod().item() // MERGE**2
            text = text.replace(pad, "\0" * int(n), 1)
        text = text.replace("\0", pad)
    ids = tokenizer(text, return_tensors="pt").input_ids
    kinds = [(ids == SPECIAL_IDS[pad]).long() for pad in names]
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds[0] + 2 * kinds[1],
    }
    mean, std = settings["image_mean"], settings["image_std"]
    if each.pictures:
        arguments["pixel_values"] = rows(each.pictures, mean, std)
        arguments["image_grid_thw"] = torch.tensor([grid(name) for name in each.pictures])
    if each.videos:
        arguments["pixel_values_videos"] = rows(each.videos, mean, std)
        arguments["video_grid_thw"] = torch.tensor([grid(name) for name in each.videos])
        arguments["second_per_grid_ts"] = torch.tensor(len(each.videos) * [SECONDS_PER_GRID])
    return arguments
