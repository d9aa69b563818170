"""Draw a chart of the towers inside vLLM, from the ledger's rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.benchmarks.tower_report import DPI, WIDTH_IN

# Milliseconds of the whole encoder in the article that led to this package.
ARTICLE_MS = {"1 x 448^2": 23.64, "1 x 672^2": 27.69, "1 x 896^2": 40.97, "1 x 1344^2": 79.85}
LABELS = {
    "default": "vLLM, default",
    "graphs": "vLLM, CUDA graphs",
    "compiled": "vLLM, compiled, CUDA graphs",
}


def newest_towers(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last row of each vLLM setting, and of our tower with the plugin."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["what"] == "engines towers":
            for variant, figures in row["engines"].items():
                if figures["towers"]:
                    found[variant] = {**figures["towers"], "commit": row["commit"]}
    return found


def draw_towers(towers: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw bars for each size. A bar is vLLM's time as a multiple of our time in the same
    process."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = [name for name in LABELS if name in towers]
    sizes = [name for name, cell in towers["default"].items() if "ratio" in cell]
    figure, axes = plt.subplots(figsize=(WIDTH_IN, 4.2), layout="constrained")
    width = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        ratios = [towers[setting][size]["ratio"] for size in sizes]
        places = [at + (i - (len(settings) - 1) / 2) * width for at in range(len(sizes))]
        bars = axes.barh(
            places, ratios, width, label=LABELS[setting], color=("#94a3b8", "#cbd5e1", "#93c5fd")[i]
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    axes.axvline(1, color="#2563eb", linewidth=1.2, label="ours")
    axes.set_yticks(range(len(sizes)), [size.replace("^2", "\u00b2") for size in sizes], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.xaxis.set_visible(False)  # each bar shows its value
    axes.tick_params(length=0)
    axes.set_title("Time of vLLM's tower as a multiple of ours", fontsize=10, loc="left")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
