"""Test that the export benchmark runs without a GPU, and counts correctly."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner

from tools.benchmarks import export, export_bounds


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def measured(*words: str, **changed: Any) -> dict[str, Any]:
    common = ["--model", "tiny", "--sides", "56", "84", "--commit", "abc1234"]
    # Use threads, because a fork of this process could inherit a held lock.
    with patch.multiple(export, **changed, ProcessPoolExecutor=ThreadPoolExecutor):
        done = CliRunner().invoke(export.main, [*words, *common], catch_exceptions=False)
    assert done.exit_code == 0
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@pytest.mark.slow
def test_the_rates_count_the_exported_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rates of 5,000 images were once 2.5 times too high, because the tool always made 2,000
    images."""
    monkeypatch.setattr(export_bounds, "WRITTEN_BYTES", 2**24)
    line = measured(
        *("--images", "7", "--peer-images", "0", "--checked", "3", "--shard-size", "4"),
        MEMORY_FILES=3,
    )
    assert (line["what"], line["images"], line["shard_size"]) == ("export", 7, 4)
    rates = line["images_per_s"]
    assert rates["export"] == pytest.approx(7 / line["seconds"], rel=0.01)
    assert line["share_of_the_lower_bound"] == pytest.approx(
        rates["export"] / min(rates["encoder alone"], rates["disk"]), abs=0.002
    )
    assert 16 <= line["patches_per_image"] <= 36  # sides of 56 to 84 px
    assert sum(line["waits_s"].values()) <= line["seconds"] + 0.05


def test_memory_is_measured_over_repeated_files() -> None:
    line = measured("memory", "--images", "9", MEMORY_FILES=4)
    assert (line["what"], line["images"]) == ("export memory", 9)
    assert line["images_per_s"] == pytest.approx(9 / line["seconds"], rel=0.01)
    assert sum(line["waits_s"].values()) <= line["seconds"] + 0.05
    assert line["resident_mb"][0] <= line["resident_mb"][1]
