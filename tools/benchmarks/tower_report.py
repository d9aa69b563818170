"""Format the results of `tools.benchmarks.tower` as tables and as a chart."""

import statistics
from pathlib import Path
from typing import Any

WIDTH_IN, DPI = 5.6, 180  # so text of 9 points has 10 px on a page of 470 px
UNFUSED = "RoPE + FA2"  # our tower by graph, with separate kernels


PEERS = ("HF sdpa", "HF FA2 varlen", UNFUSED)


DRAWN = {  # the names of the columns in docs/performance.md
    "HF sdpa": "Hugging Face, default",
    "HF FA2 varlen": "Hugging Face, FlashAttention-2",
    UNFUSED: "qwen_vit, unfused",
}


def tower_text(rows: dict[str, dict[str, float]]) -> str:
    labels = [label for label in PEERS if all(f"{label}_ms" in row for row in rows.values())]
    head = "".join(f"{label:>15}{'speedup':>9}" for label in labels)
    title = (
        f"{'images':<12}{'ours':>9}{'roofline':>9}{'at TF/s':>9}{'x roofline':>12}{'cool':>9}{head}"
    )
    note = "Whole tower, ms; cool: x roofline, each by itself on a cool GPU"
    if all("plain_ms" in row for row in rows.values()):
        note += "; plain: ms with the plain Triton kernels, and x roofline"
        title += f"{'plain':>11}{'x':>6}"
    lines = [note, title]
    for name, row in rows.items():
        against = "".join(
            f"{row[label + '_ms']:>15.1f}{row[label + '_ms'] / row['ours_ms']:>8.1f}x"
            for label in labels
        )
        if "plain_ms" in row:
            x_roofline = row["plain_ms"] / row["plain_roofline_ms"]
            against += f"{row['plain_ms']:>11.2f}{x_roofline:>6.2f}"
        if "compiled_ms" in row:
            against += f"  compiled {row['compiled_ms']:.2f} after {row['compile_s']:.0f} s"
        lines.append(
            f"{name:<12}{row['ours_ms']:>9.2f}{row['roofline_ms']:>9.2f}"
            f"{row['gemm_tflops']:>9.0f}{row['ours_ms'] / row['roofline_ms']:>12.2f}"
            f"{row['cool_ms'] / row['cool_roofline_ms']:>9.2f}{against}"
        )
    for label in labels:
        average = statistics.mean(row[f"{label}_ms"] / row["ours_ms"] for row in rows.values())
        lines.append(f"average speedup against {label}: {average:.1f}x")
    if UNFUSED in labels:
        lines.append(f"{UNFUSED}: our tower with these two in place of the fused kernel, by graph")
    labels = [label for label in labels if label != UNFUSED]
    lines.append(f"\n{'Peak memory, MB':<21}{'ours':>9}" + "".join(f"{x:>15}" for x in labels))
    for name, row in rows.items():
        peaks = "".join(f"{row[label + '_peak_mb']:>15.0f}" for label in labels)
        lines.append(f"{name:<21}{row['peak_mb']:>9.0f}{peaks}")
    return "\n".join(lines)


def attention_text(kernel: dict[str, dict[str, float]]) -> str:
    lines = []
    for kind in ("window", "full"):
        lines += [
            f"Attention of one {kind} block with RoPE, ms",
            f"{'images':<12}{'RoPE + FA2':>12}{'ours':>9}{'speedup':>9}{'TFLOP/s':>9}",
        ]
        speedups = []
        for name, row in kernel.items():
            unfused, ours = row["RoPE"] + row[f"{kind} FA2"], row[f"{kind} ours"]
            speedups.append(unfused / ours)
            lines.append(
                f"{name:<12}{unfused / 1e3:>12.4f}{ours / 1e3:>9.4f}{speedups[-1]:>8.1f}x"
                f"{row[f'{kind} TFLOP/s']:>9.0f}"
            )
        lines.append(f"average speedup: {statistics.mean(speedups):.1f}x\n")
    return "\n".join(lines).rstrip()


def stages_text(staged: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = []
    for name, rows in staged.items():
        total = sum(row["ms"] for row in rows.values())
        lines += [
            f"Stages alone, {name}, all of their blocks",
            f"{'stage':<10}{'blocks':>7}{'ms':>9}{'share':>7}{'roofline':>9}{'x roofline':>12}"
            f"{'TFLOP/s':>9}{'MB':>9}{'TB/s':>7}",
        ]
        lines += [
            f"{stage:<10}{row['blocks']:>7}{row['ms']:>9.3f}{row['ms'] / total:>7.0%}"
            f"{row['roofline_ms']:>9.3f}{row['ms'] / row['roofline_ms']:>12.2f}"
            f"{row['tflops']:>9.0f}{row['mb']:>9.0f}{row['tb_per_s']:>7.2f}"
            for stage, row in rows.items()
        ]
        lines.append(f"{'sum':<17}{total:>9.3f}\n")
    return "\n".join(lines).rstrip()


def starts_text(started: dict[str, dict[str, float]]) -> str:
    lines = ["Seconds from a process's start until (weights in the page cache, 1 x 448^2)"]
    lines.append(f"{'Triton cache':<14}" + "".join(f"{name:>17}" for name in started["cold"]))
    for name, row in started.items():
        lines.append(f"{name:<14}" + "".join(f"{value:>17.2f}" for value in row.values()))
    return "\n".join(lines)


def draw(
    rows: dict[str, dict[str, float]], kernel: dict[str, dict[str, float]], title: str, path: Path
) -> None:
    """Draw the whole tower, and below it the attention alone, readable on a phone."""
    from matplotlib import pyplot as plt

    towers = {"qwen_vit": [row["ours_ms"] / row["roofline_ms"] for row in rows.values()]}
    for label in PEERS:
        if all(f"{label}_ms" in row for row in rows.values()):
            towers[DRAWN[label]] = [
                row[f"{label}_ms"] / row["roofline_ms"] for row in rows.values()
            ]
    panels = [("Whole tower, x roofline", list(rows), towers)] if rows else []
    for kind in ("window", "full") if kernel else ():
        ours = [row[f"{kind} ours"] for row in kernel.values()]
        unfused = [row["RoPE"] + row[f"{kind} FA2"] for row in kernel.values()]
        heading = f"Attention of a {kind} block, us"
        panels.append((heading, list(kernel), {"qwen_vit": ours, "qwen_vit, unfused": unfused}))
    heights = [*([5.2] if rows else []), *([3.0] if kernel else [])]
    figure = plt.figure(figsize=(WIDTH_IN, sum(heights) + 0.3), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    places = [grid[0, :]] if rows else []
    places += [grid[-1, 0], grid[-1, 1]] if kernel else []
    for place, (heading, names, series) in zip(places, panels, strict=True):
        axis = figure.add_subplot(place)
        width = 0.8 / len(series)
        for i, (label, lengths) in enumerate(series.items()):
            colour = ("#2563eb", "#94a3b8", "#cbd5e1", "#93c5fd")[i]
            at = [j + (i - (len(series) - 1) / 2) * width for j in range(len(names))]
            bars = axis.barh(at, lengths, width, color=colour, label=label)
            axis.bar_label(
                bars, fmt=lambda x: f"{x:.3g}" if x < 1e3 else f"{x:,.0f}", fontsize=8.5, padding=2
            )
        if "roofline" in heading:
            axis.axvline(1, color="#0f172a", linewidth=0.8, linestyle=":")
            axis.margins(x=0.1)
        else:  # the sizes span a factor of 40
            axis.set_xscale("log")
            axis.set_xlim(right=4 * max(max(lengths) for lengths in series.values()))
        axis.set_yticks(range(len(names)), [name.replace("^2", "\u00b2") for name in names])
        axis.invert_yaxis()
        axis.xaxis.set_visible(False)  # each bar shows its value
        axis.tick_params(labelsize=9, length=0)
        axis.set_title(heading, fontsize=10, loc="left")
        below: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (0, 0),
        }  # the bars fill the axes
        axis.legend(frameon=False, fontsize=9, ncols=len(series) // 2, **below)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", color="#64748b")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
