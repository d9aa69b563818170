"""Test that each bar of the chart of towers inside vLLM uses the right ledger row."""

from pathlib import Path
from typing import Any

from PIL import Image

from tools.benchmarks.engines.chart import draw_towers, newest_towers


def row(commit: str, **settings: float) -> dict[str, Any]:
    engines = {
        name: {"towers": {"1 x 448^2": {"ms": 2 * ratio, "ratio": ratio}} if ratio else {}}
        for name, ratio in settings.items()
    }
    return {"what": "engines towers", "commit": commit, "engines": engines}


def test_the_last_row_with_figures_counts() -> None:
    rows = [
        row("a", default=3, graphs=2),
        {"what": "tower"},
        row("b", default=4),
        row("c", graphs=0),
    ]
    found = newest_towers(rows)
    assert {name: figures["commit"] for name, figures in found.items()} == {
        "default": "b", "graphs": "a",
    }  # fmt: skip
    assert found["default"]["1 x 448^2"]["ratio"] == 4


def test_a_chart_of_the_settings_that_were_measured(tmp_path: Path) -> None:
    draw_towers(newest_towers([row("a", default=3, graphs=2)]), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.width > 700
