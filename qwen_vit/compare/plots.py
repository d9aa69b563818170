"""Draw a report's figures: windows, error over depth, and the feature maps of some stages."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.compare.result import Comparison, FeatureMaps, ImageComparison
from qwen_vit.show.colours import PrincipalColours
from qwen_vit.show.draw import (
    BLUE,
    HEAT_MAP,
    draw_array,
    draw_windows,
    figure_png,
    panel_png,
)
from qwen_vit.show.strips import StripLayout

__all__ = [
    "StageMaps", "drift_png", "features_png", "stage_maps", "stage_title", "steps_png",
    "windows_png",
]  # fmt: skip

ORANGE, GREY, RED = "#d9730d", "#8a93a0", "#d64545"  # they also differ in lightness
LIGHT_BLUE = "#62a8f5"
COLUMN_IN, COLUMN_GAP_IN = 1.5, 0.08  # inches, for a pair of frames
DRIFT_IN = (4.9, 3.3)
ROW_IN, MAX_FEATURES_IN = 2.75, 16.0
INK = {False: "#374151", True: "#c3c9d1"}  # text colours on a light and on a dark page
LINES = {False: "#e5e7eb", True: "#363d47"}


@dataclass(frozen=True, slots=True, eq=False)
class StageMaps:
    """Hold our and Hugging Face's features of one stage as colours, and each cell's error."""

    name: str
    ours: NDArray[np.float32]  # (rows, columns, 3)
    theirs: NDArray[np.float32]
    error: NDArray[np.float64]  # (rows, columns), relative

    @classmethod
    def of(
        cls, name: str, ours: Tensor, theirs: Tensor, colours: PrincipalColours | None = None
    ) -> "StageMaps":
        """Colour both maps along the same axes, because separate axes would hide a rotation."""
        colours = PrincipalColours.fit([theirs]) if colours is None else colours
        distance = (ours.double() - theirs.double()).norm(dim=-1)
        error = (distance / theirs.double().norm(dim=-1).clamp_min(1e-300)).nan_to_num(0.0)
        return cls(name, colours.paint(ours), colours.paint(theirs), error.numpy())

    def draws(self, largest: float | None = None) -> dict[str, Callable[..., Any]]:
        """Return a function `draw(layout, axes)` for each panel, by the panel's title.

        `largest` is the error at the end of the scale. The default is the map's largest error.
        """
        largest = float(self.error.max()) if largest is None else largest
        return {
            "ours": partial(_draw, self.ours),
            "Hugging Face": partial(_draw, self.theirs),
            "relative error": partial(
                _draw, self.error, cmap=HEAT_MAP, vmin=0.0, vmax=largest or 1.0
            ),  # one scale for all strips
        }

    def panels(self, layout: StripLayout) -> dict[str, bytes]:
        return {
            title: panel_png(layout, partial(draw, layout)) for title, draw in self.draws().items()
        }


def stage_maps(maps: FeatureMaps) -> list[StageMaps]:
    return [StageMaps.of(name, *pair) for name, pair in maps.stages.items()]


def steps_png(maps: FeatureMaps, layout: StripLayout) -> list[bytes]:
    """Draw a column for each pair in `maps.steps`: the image, our map, Hugging Face's map and the
    error.

    All columns share the same colours and error scale, so that readers can compare them.
    """
    colours = PrincipalColours.fit([each.theirs for each in maps.steps])
    drawn = [StageMaps.of("merger", each.ours, each.theirs, colours) for each in maps.steps]
    largest = max(float(each.error.max()) for each in drawn)
    width, height = layout.size
    size = (COLUMN_IN, 4 * COLUMN_IN * height / width + 3 * COLUMN_GAP_IN)
    return [
        figure_png(size, partial(_column, layout, step.rgb.numpy(), found.draws(largest)),
                   layout="none", transparent=True)
        for step, found in zip(maps.steps, drawn, strict=True)
    ]  # fmt: skip


def _column(
    layout: StripLayout, rgb: NDArray[Any], draws: dict[str, Callable[..., Any]], figure: Any
) -> None:
    rows = figure.subplots(
        1 + len(draws), 1, squeeze=False,
        gridspec_kw={"left": 0, "right": 1, "bottom": 0, "top": 1, "hspace": COLUMN_GAP_IN / 2},
    )[:, 0]  # fmt: skip
    draw_array(rows[0], layout, rgb, interpolation="antialiased")
    for axes, draw in zip(rows[1:], draws.values(), strict=True):
        draw(layout, axes)


def stage_title(name: str, comparison: Comparison) -> str:
    """Return a stage's title.

    >>> from qwen_vit.compare.result import Comparison
    >>> facts = {"vision_config": {"fullatt_block_indexes": [7]}}
    >>> stage_title("block.7", Comparison(facts, (), ()))
    'block 7 (full attention)'
    """
    full = " (full attention)" if name in _full_blocks(comparison) else ""
    words = {"patch_embed": "patch embedding", "merger": "merged tokens"}
    return words.get(name, name.replace(".", " ")) + full


def windows_png(maps: FeatureMaps, layout: StripLayout, image: ImageComparison, side: int) -> bytes:
    def draw(axes: Any) -> None:
        draw_array(axes, layout, maps.rgb.numpy(), interpolation="antialiased")
        draw_windows(axes, layout, image.grid.h, image.grid.w, side)

    return panel_png(layout, draw)


def drift_png(image: ImageComparison, comparison: Comparison, *, is_dark: bool | None) -> bytes:
    """Plot each stage's relative error for a light or a dark page, or on white for None."""
    ink = INK[bool(is_dark)]
    style = {
        "axes.edgecolor": ink, "axes.labelcolor": ink, "text.color": ink, "xtick.color": ink,
        "ytick.color": ink,
    }  # fmt: skip
    draw = partial(
        _drift, image=image, comparison=comparison, grid=LINES[bool(is_dark)],
        blue=LIGHT_BLUE if is_dark else BLUE,
    )  # fmt: skip
    return figure_png(DRIFT_IN, draw, style=style, transparent=is_dark is not None)


def features_png(stages: list[StageMaps], layout: StripLayout, comparison: Comparison) -> bytes:
    def draw(figure: Any) -> None:
        grid = figure.subplots(len(stages), 3, squeeze=False)
        for row, stage in zip(grid, stages, strict=True):
            for axes, (title, fill) in zip(row, stage.draws().items(), strict=True):
                drawn = fill(layout, axes)
                is_first = axes is row[0]
                axes.set_title(
                    f"{stage_title(stage.name, comparison)}: {title}" if is_first else title
                )
            bar = figure.colorbar(drawn, cax=row[-1].inset_axes((1.02, 0, 0.04, 1)), format="%.1e")
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7, length=2)

    width, height = layout.size
    row_in = ROW_IN * height / width + 0.32
    size_in = (9.0, min(row_in * len(stages), MAX_FEATURES_IN))
    return figure_png(size_in, draw, bbox_inches="tight", pad_inches=0.06)


def _draw(array: NDArray[Any], layout: StripLayout, axes: Any, **style: Any) -> Any:
    return draw_array(axes, layout, array, interpolation="nearest", **style)


def _drift(
    figure: Any, image: ImageComparison, comparison: Comparison, grid: str, blue: str
) -> None:
    axes = figure.subplots()
    places = range(len(image.stages))
    full = _full_blocks(comparison)
    for place, stage in enumerate(image.stages):
        if stage.name in full:
            axes.axvspan(place - 0.5, place + 0.5, color=grid, zorder=0, linewidth=0, alpha=0.6)
    lines = [
        ("Hugging Face - float64", ORANGE, "-", [stage.theirs for stage in image.stages]),
        ("ours - float64", blue, "-", [stage.ours for stage in image.stages]),
        ("ours - Hugging Face", GREY, ":", [s.difference.relative for s in image.stages]),
    ]
    if comparison.facts["dtype"] == "float32":
        allowed = [stage.verdict.allowed for stage in image.stages]
        lines.append(("ours - Hugging Face, allowed", RED, "--", allowed))
    marker = "o" if len(image.stages) <= 12 else None
    for label, colour, dashes, values in lines:
        plotted = [value if 0 < value < float("inf") else float("nan") for value in values]
        axes.plot(
            places, plotted, dashes, color=colour, label=label, linewidth=1.5,
            marker=marker if dashes != "--" else None, markersize=3.5,
        )  # fmt: skip
    axes.set_yscale("log")
    every = max(1, len(image.stages) // 12)
    ticks = sorted({0, len(image.stages) - 1, *range(1, len(image.stages) - every, every)})
    names = [image.stages[tick].name.removeprefix("block.") for tick in ticks]
    axes.set_xticks(ticks, [name.replace("patch_embed", "patches") for name in names])
    axes.set_xlim(-0.5, len(image.stages) - 0.5)
    axes.set_xlabel("stage")
    axes.set_ylabel("relative error")
    axes.grid(axis="y", color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)


def _full_blocks(comparison: Comparison) -> set[str]:
    return {f"block.{i}" for i in comparison.facts["vision_config"]["fullatt_block_indexes"]}
