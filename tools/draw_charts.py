"""Draw the docs' charts from the ledger rows that the tables name.

python -m tools.draw_charts
"""

from pathlib import Path
from typing import Any

import click

from tools.benchmarks import export_chart, tower_report, video_checks
from tools.benchmarks.engines.chart import draw_towers, newest_towers
from tools.common import ROOT
from tools.write_docs import EXPORT, SPEED, ledger, newest_videos, rows

# Old names of figures, in rows before 2026-11-25, and the current names.
RENAMED = {"floor_ms": "roofline_ms", "frame ours": "full ours", "frame FA2": "full FA2"}


def renamed(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rename the keys of a row's table to the current names.

    >>> renamed({"1 x 448^2": {"floor_ms": 1.8}})
    {'1 x 448^2': {'roofline_ms': 1.8}}
    """
    return {
        size: {RENAMED.get(name, name): value for name, value in row.items()}
        for size, row in figures.items()
    }


def draw_all(folder: Path) -> list[Path]:
    """Draw every chart into a folder, and return their paths."""
    paths = [folder / name for name in ("speed.png", "export.png", "engines.png", "video.png")]
    [tower] = rows("tower", SPEED)
    title = f"{tower['device']}, {tower['date']}, {SPEED}, bf16, 7B shape"
    whole_tower, attention = renamed(tower["rows"]), renamed(tower["attention_us_per_layer"])
    tower_report.draw(whole_tower, attention, title, paths[0])
    export_chart.draw(rows("export", EXPORT)[0], paths[1])
    draw_towers(newest_towers(ledger()), paths[2])
    video_checks.draw(newest_videos(), paths[3])
    return paths


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=ROOT / "docs",
    help="Folder for the charts.  [default: docs]",
)
def main(out: Path) -> None:
    for path in draw_all(out):
        click.echo(path)


if __name__ == "__main__":
    main()
