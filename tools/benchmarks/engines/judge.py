"""Compare the answers of vLLM, with its own tower and with our tower, with float64."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.benchmarks.engines.model import embeddings_file, small_folder
from tools.benchmarks.engines.oracle import Oracle


def judge_answers(
    folder: Path, answers: Mapping[str, Sequence[dict[str, Any]]], device: torch.device
) -> dict[str, Any]:
    """Return each engine's errors, and a comparison of the errors.

    `answers` has one entry per random model for each engine. `logprob_rms` is the error of the
    first token's log-probabilities, as the engine returns them. `tower_error` is the relative error
    of the embeddings. `logprob_rms_of_tower` is the error of the log-probabilities if the language
    model computes in float64 on the engine's embeddings. This value is the tower's share of the
    error.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    shares: dict[str, list[Tensor]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    right: dict[str, int] = defaultdict(int)
    for seed in range(max(map(len, answers.values()))):
        oracle = Oracle(small_folder(folder, seed), device)
        exact = oracle.embeddings()
        truth = oracle.logprobs(exact)
        for name, found in answers.items():
            joined = load_file(embeddings_file(folder, name, seed))["embeddings"]
            ours = joined.split([len(each) for each in exact])
            errors[name].append(_relative_error(ours, exact))
            shares[name].append((oracle.logprobs(ours) - truth).square().mean(1))
            given = torch.tensor(found[seed]["logprobs"], dtype=torch.float64)
            squares[name].append((given - truth).square().mean(1))
            first = torch.tensor([tokens[0] for tokens in found[seed]["tokens"]])
            right[name] += int((first == truth.argmax(1)).sum())
        del oracle, exact
        torch.cuda.empty_cache()
    report: dict[str, Any] = {
        name: {
            "logprob_rms": _rms(squares[name]),
            "logprob_rms_of_tower": _rms(shares[name]),
            "tower_error": sum(errors[name]) / len(errors[name]),
            "first_tokens_of_float64": right[name],
            "images_per_s": found[0]["images_per_s"],
        }
        for name, found in answers.items()
    }
    if {"default", "plugin"} <= set(answers):
        report |= _against_each_other(answers, squares)
    return report


def _against_each_other(
    answers: Mapping[str, Sequence[dict[str, Any]]], squares: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Compare our tower's answers with the answers of vLLM's tower, request by request. `excess` is
    the relative difference between our mean square error and vLLM's mean square error. Its standard
    error is over the requests. `excess_by_weights` has the excess for each random model.
    """
    plugin, default = torch.cat(list(squares["plugin"])), torch.cat(list(squares["default"]))
    excess = (plugin - default) / default.mean()
    pairs = zip(answers["plugin"], answers["default"], strict=True)
    same = sum(
        ours == theirs
        for a, b in pairs
        for ours, theirs in zip(a["tokens"], b["tokens"], strict=True)
    )
    by_weights = zip(squares["plugin"], squares["default"], strict=True)
    return {
        "requests": len(plugin),
        "weights": len(squares["plugin"]),
        "same_tokens": same,
        "ours_nearer": int((plugin < default).sum()),
        "excess": float(excess.mean()),
        "standard_error": float(excess.std() / len(excess) ** 0.5),
        "excess_by_weights": [
            float(ours.mean() / theirs.mean() - 1) for ours, theirs in by_weights
        ],
    }


def _rms(squares: Sequence[Tensor]) -> float:
    return float(torch.cat(list(squares)).mean().sqrt())


def _relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the norm of the difference over the norm of the exact values, over all requests."""
    pairs = [(a.to(b), b) for a, b in zip(found, exact, strict=True)]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(wrong / sum(float(b.square().sum()) for _, b in pairs))
