"""A chart of the towers inside vLLM, from the ledger's rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# the whole encoder at these sizes, in ms, as the article reports it that this package grew from
ARTICLE_MS = {"1 x 448^2": 23.64, "1 x 672^2": 27.69, "1 x 896^2": 40.97, "1 x 1344^2": 79.85}
LABELS = {
    "default": "vLLM, as it comes",
    "graphs": "vLLM, with its graphs",
    "compiled": "vLLM, compiled, with its graphs",
}


def newest_towers(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last row's figures of each of vLLM's settings, and of ours by plugin."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["what"] == "engines towers":
            for variant, figures in row["engines"].items():
                if figures["towers"]:
                    found[variant] = {**figures["towers"], "commit": row["commit"]}
    return found


def draw_towers(towers: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars for each size: vLLM's tower as a multiple of ours, timed in the same process."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = [name for name in LABELS if name in towers]
    sizes = [name for name, cell in towers["default"].items() if "ratio" in cell]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    width = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        ratios = [towers[setting][size]["ratio"] for size in sizes]
        places = [at + (i - (len(settings) - 1) / 2) * width for at in range(len(sizes))]
        bars = axes.bar(places, ratios, width, label=LABELS[setting])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(sizes)), [size.replace("^2", "²") for size in sizes])
    axes.set_ylabel("time as a multiple of ours")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
