"""Test that the check of a dry run's time runs without a GPU."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from tools.checks import dry_run


@pytest.mark.slow
def test_estimates_and_exports_of_one_workload_are_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # Use threads, because a fork of this process could inherit a held lock.
    monkeypatch.setattr(dry_run, "ProcessPoolExecutor", ThreadPoolExecutor)
    words = ["--images", "12", "--sides", "56", "84", "--model", "tiny", "--commit", "abc1234"]
    done = CliRunner().invoke(dry_run.main, words, catch_exceptions=False)
    row = json.loads(done.stdout.splitlines()[-1])
    [workload] = row["workloads"]
    assert (row["what"], workload["images"]) == ("dry run", 12)
    assert workload["rows"][0] == workload["rows"][1] > 12
    ratio = workload["estimate_s"] / workload["export_s"]
    assert workload["estimate_over_export"] == pytest.approx(ratio, rel=0.01)
    assert done.exit_code == (not dry_run.is_close(workload))


@pytest.mark.parametrize(
    ("ratio", "close"), [(0.66, False), (0.67, True), (1.5, True), (1.51, False)]
)
def test_the_factor_holds_both_ways(ratio: float, close: bool) -> None:
    assert dry_run.is_close({"estimate_over_export": ratio}) == close
