"""Run a sample of tools.checks.trust, and test that each check finds injected faults."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor

from qwen_vit.layout import Layout
from tests.support.towers import layout_for, tower_trace
from tools.checks import trust, trust_values
from tools.checks.trust_values import CheckCounts

CPU = torch.device("cpu")


def test_the_error_for_an_unknown_check_lists_the_checks() -> None:
    with pytest.raises(click.UsageError, match=r"no check on cpu has 'nosuch' .*photographs, fp32"):
        trust.main.main(["--device=cpu", "--only=nosuch"], standalone_mode=False)


@pytest.mark.slow
def test_a_fiftieth_of_the_trust_suite_holds(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    options = ["--device=cpu", "--fraction=0.02", "--seed=1", "--commit=abc", f"--ledger={ledger}"]
    with pytest.raises(SystemExit) as stop:
        trust.main.main(options, standalone_mode=False)
    assert stop.value.code == 0
    row = json.loads(ledger.read_text())
    assert (row["what"], row["commit"], row["good"]) == ("trust", "abc", True)
    assert row["rows"]["random layouts, small tower, fp32"]["runs"] == 200
    assert len(row["rows"]) == 5
    assert all(check["failures"] == 0 < check["runs"] for check in row["rows"].values())


def test_a_layout_out_of_order_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*arguments: Any) -> Layout:
        layout: Layout = layout_for(*arguments)
        layout.positions[[0, -1]] = layout.positions[[-1, 0]]
        return layout

    monkeypatch.setattr(trust_values, "layout_for", swapped)
    counts = trust_values.layouts(3, 0, CPU)
    assert (counts.runs, len(counts.failures)) == (3, 3)
    assert "orders or segments differ" in counts.failures[0]


def nudged(trace: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {**trace, "merger": trace["merger"] * factor}


@pytest.mark.parametrize(
    ("check", "factor"),
    [
        ("layouts", 1 + 3e-5), ("layouts", float("nan")), ("configs", 1 + 3e-5),
        ("adversarial", 1 + 3e-5),
    ],
)  # fmt: skip
def test_values_out_of_bounds_fail(
    monkeypatch: pytest.MonkeyPatch, check: str, factor: float
) -> None:
    monkeypatch.setattr(
        trust_values, "trace_of", lambda *a, **k: nudged(tower_trace(*a, **k), factor)
    )
    run = getattr(trust_values, check)
    if check != "layouts":
        run = partial(run, dtype=torch.float32)
    counts = run(1, 0, CPU)
    assert (counts.runs, len(counts.failures)) == (1, 1)
    assert "merger" in counts.failures[0]


def test_a_fault_that_is_not_found_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_values, "inject_fault", lambda encoder, *_: encoder)
    counts = trust_values.weight_faults(2, 0, CPU)
    assert len(counts.failures) == 2
    assert "found in nothing" in counts.failures[0]


def test_a_check_that_raises_fails_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(*_: Any) -> CheckCounts:
        raise RuntimeError("no such thing")

    good = CheckCounts("relative", "1", runs=1)
    rows = [trust.Check("one", "cpu", 1, dies), trust.Check("two", "cpu", 1, lambda *_: good)]
    monkeypatch.setattr(trust, "checks", lambda: rows)
    with pytest.raises(SystemExit) as stop:
        trust.main.main(["--device", "cpu"], standalone_mode=False)
    assert stop.value.code == 1
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["rows"]["one"]["examples"] == ["died: RuntimeError: no such thing"]
    assert (line["rows"]["two"]["failures"], line["good"]) == (0, False)


def test_the_unpublished_architectures_take_every_value_of_every_axis() -> None:
    found = list(trust_values.unpublished(400, 0))
    assert {config.num_heads for config in found} == set(range(1, 21))
    assert {config.head_dim for config in found} == {64, 72, 80, 96, 128}
    assert {config.window_px for config in found} == {56, 84, 112, 140, 168, 196, 224}
    mixes = {
        tuple(i in config.fullatt_block_indexes for i in range(config.depth)) for config in found
    }
    assert len(mixes) == 2 + 4 + 8
    assert {config.intermediate_size % 2 for config in found} == {0, 1}
