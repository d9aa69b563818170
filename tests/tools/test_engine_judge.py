"""Test that the judge of vLLM's answers detects the tower with the smaller error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools.benchmarks.engines import model, oracle
from tools.benchmarks.engines.judge import judge_answers
from tools.benchmarks.engines.oracle import Oracle
from tools.random_tower import SHAPE as PUBLISHED_SHAPE

CPU = torch.device("cpu")
SHAPE = {
    **PUBLISHED_SHAPE, "out_hidden_size": 256, "depth": 2, "fullatt_block_indexes": [1],
    "hidden_size": 160, "intermediate_size": 64, "num_heads": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make two models of a small shape, and requests with three images."""
    changes = {"HIDDEN": 256, "HEADS": 2, "KEY_HEADS": 1, "SMALL_MLP": 128, "SHAPE": SHAPE}
    for name, value in changes.items():
        monkeypatch.setattr(model, name, value)
    monkeypatch.setattr(oracle, "request_sizes", lambda: ((84, 56), (112, 140), (56, 56)))
    for seed in range(2):
        model.write_small(model.small_folder(tmp_path, seed), CPU, seed)
    return tmp_path


def test_noise_in_the_embeddings_and_in_the_answers_is_measured(small: Path) -> None:
    torch.manual_seed(0)
    answers: dict[str, list[dict[str, Any]]] = {"default": [], "plugin": []}
    for seed in range(2):
        judge = Oracle(model.small_folder(small, seed), CPU)
        exact = judge.embeddings()
        truth = judge.logprobs(exact)
        for name, noise in (("default", 0.01), ("plugin", 0.02)):
            wrong = torch.cat([each + noise * torch.randn_like(each) for each in exact])
            save_file({"embeddings": wrong}, model.embeddings_file(small, name, seed))
            logprobs = truth + noise * torch.randn_like(truth)
            tokens = [[int(token)] for token in truth.argmax(1)]
            answers[name].append(
                {"tokens": tokens, "logprobs": logprobs.tolist(), "images_per_s": 1.0}
            )
    report = judge_answers(small, answers, CPU)
    print(json.dumps(report, indent=1))
    for name, noise in (("default", 0.01), ("plugin", 0.02)):
        assert report[name]["logprob_rms"] == pytest.approx(noise, rel=0.1)
        assert report[name]["first_tokens_of_float64"] == 6
    errors = [report[name]["tower_error"] for name in ("plugin", "default")]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    shares = [report[name]["logprob_rms_of_tower"] for name in ("plugin", "default")]
    assert shares[0] > 1.5 * shares[1] > 0
    assert (report["requests"], report["weights"], report["same_tokens"]) == (6, 2, 6)
    assert report["excess"] == pytest.approx(3, rel=0.2)  # 2**2 - 1 for twice the noise


def test_the_language_model_answers_as_the_whole_model(small: Path) -> None:
    judge = Oracle(model.small_folder(small, 0), CPU, n_requests=1)
    [ids, rows, grid] = judge._requests[0]
    with torch.inference_mode():
        full_model = judge._model(
            input_ids=ids, pixel_values=rows, image_grid_thw=grid, logits_to_keep=1,
            mm_token_type_ids=(ids == judge._model.config.image_token_id).long(),
        )  # fmt: skip
    expected = full_model.logits[0, -1].log_softmax(-1)
    assert torch.equal(judge.logprobs(judge.embeddings())[0], expected)
