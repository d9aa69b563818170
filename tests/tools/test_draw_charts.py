"""Test that the charts of the docs use the rows that the tables name."""

from pathlib import Path

from PIL import Image

from tests.support import ROOT
from tools.draw_charts import draw_all


def test_every_chart_of_the_docs_is_drawn_from_the_ledger(tmp_path: Path) -> None:
    """speed.png once showed names that the tables no longer had."""
    for path in draw_all(tmp_path):
        with Image.open(path) as drawn, Image.open(ROOT / "docs" / path.name) as shown:
            assert drawn.size == shown.size, f"{path.name}: run python -m tools.draw_charts"
            assert drawn.width == 1008  # text of 9 points has 10 px on a page of 470 px
