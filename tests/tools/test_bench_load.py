"""Test that the load benchmark runs without a GPU, and appends its row to a ledger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_tiny_checkpoint_is_measured_beside_plain_copies(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-m", "tools.benchmarks.load", "--model", "tiny", "--repeats", "1"]
    command += ["--ledger", str(ledger), "--commit", "abc1234"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    *table, last = done.stdout.splitlines()
    row = json.loads(last)
    assert [row] == [json.loads(line) for line in ledger.read_text().splitlines()]
    assert (row["what"], row["device"], row["commit"]) == ("load", "cpu", "abc1234")
    # The bytes of the tiny tower's tensors in its file.
    assert row["bytes"] == 4_541_424
    copied = row["copies_gb_per_s"]["page cache to memory"]
    assert row["load_gb_per_s"] == pytest.approx(row["bytes"] / row["load_s"] / 1e9, rel=0.05)
    assert row["share_of_the_page_cache"] == pytest.approx(row["load_gb_per_s"] / copied, rel=0.05)
    assert any(line.startswith("host memory that a load adds, MiB: own") for line in table)
