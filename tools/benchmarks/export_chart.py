"""Draw an export's rate beside what bounds it, and its waiting times."""

from pathlib import Path
from typing import Any

from tools.benchmarks.tower_report import DPI, WIDTH_IN


def draw(line: dict[str, Any], path: Path) -> None:
    """Draw rates as bars, and the waiting times, as a PNG at `path`."""
    from matplotlib import pyplot as plt

    figure, (rates, waits) = plt.subplots(2, 1, figsize=(WIDTH_IN, 4.6), layout="constrained")
    names = list(line["images_per_s"])
    colours = ["#2563eb" if name == "export" else "#cbd5e1" for name in names]
    bars = rates.barh(names, list(line["images_per_s"].values()), color=colours)
    rates.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    rates.set_title(
        f"Images per second: {line['images']:,} JPEGs of {line['sides_px'][0]} to "
        f"{line['sides_px'][1]} px", fontsize=10, loc="left",
    )  # fmt: skip
    seconds = line["waits_s"]
    bars = waits.barh(list(seconds), list(seconds.values()), color="#94a3b8")
    waits.bar_label(bars, fmt="%.1f s", padding=3, fontsize=9)
    waits.set_title(f"What its {line['seconds']:.1f} s waited for", fontsize=10, loc="left")
    for axis in (rates, waits):
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.xaxis.set_visible(False)  # each bar shows its value
        axis.tick_params(labelsize=9, length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(
        f"{line['device']}, {line['cpu_cores']} cores, {line['commit']}, {line['date']}",
        fontsize=9, color="#64748b", x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
