"""A comparison as one self-contained page: feature maps, error maps, drift over depth, windows.

matplotlib draws the pictures and Jinja2 fills in the page; both are the `report` extra, imported
only when a page is written. Jinja2 escapes file names.
"""

import base64
import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.atomic_file import atomic_file, cannot_write
from qwen_vit.compare.result import Comparison, FeatureMaps, ImageComparison
from qwen_vit.compare.text import closer_line, reference_line, verdict_lines
from qwen_vit.errors import ArgumentError, ExportError

__all__ = ["check_report", "write_report"]

PAGE = "index.html"
PICTURE = re.compile(r"\d{2,}-[A-Za-z0-9_-]{0,40}-(?:windows|drift|features)\.png")  # of a report
OURS, THEIRS, DISTANCE, LIMIT = "#1668c7", "#d9730d", "#6b7280", "#c0392b"
DOTS_PER_INCH = 150
RC: Any = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab", "xtick.color": "#4b5563", "ytick.color": "#4b5563",
    "axes.labelcolor": "#374151", "text.color": "#1f2937",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG, its file in the folder, and what it shows."""

    file: str
    title: str
    caption: str
    png: bytes

    @property
    def data_uri(self) -> str:
        """The picture inside the page."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def check_report(folder: Path, *, overwrite: bool) -> None:
    """Raise ArgumentError without the extra, ExportError for a folder that cannot be written."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"--report needs packages that are not installed: {', '.join(missing)}",
            remedy="run pip install 'qwen-vit[report]'",
        )
    try:
        if folder.exists() and not folder.is_dir():
            raise ExportError(
                "a file",
                name=str(folder),
                expected="a folder for the report",
                remedy="pass another --report",
            )
        if not folder.absolute().parent.is_dir():
            raise ExportError("not a folder", name=str(folder.parent), remedy="create it first")
        if (folder / PAGE).exists() and not overwrite:
            raise ExportError(
                "already exists",
                name=str(folder / PAGE),
                remedy="pass --overwrite to replace it",
            )
    except OSError as error:
        raise cannot_write(folder, error) from None
    written = folder if folder.exists() else folder.absolute().parent
    if not os.access(written, os.W_OK):
        raise ExportError("not writable", name=str(written), remedy="check its permissions")


def write_report(folder: Path, comparison: Comparison) -> Path:
    """Write the page and its pictures into a folder, replacing an older report; return the page.

    The page holds its pictures, so it can be moved or sent alone. Raises ArgumentError for a
    comparison made without `keep_maps`, and ExportError where the folder cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    sections = []
    for number, image in enumerate(comparison.images, start=1):
        if image.maps is None:
            raise ArgumentError(
                "the comparison holds no feature maps", remedy="make it with keep_maps=True"
            )
        sections.append((image, _pictures(number, image, image.maps, comparison)))
    source = files("qwen_vit.compare").joinpath("report.html.jinja").read_text("utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    page = template.render(
        comparison=comparison,
        facts=comparison.facts,
        reference=reference_line(comparison.facts),
        verdicts=verdict_lines(comparison),
        closer=closer_line(comparison),
        sections=sections,
        is_fp32=comparison.facts["dtype"] == "float32",
    )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    for _, pictures in sections:
        for picture in pictures:
            with atomic_file(folder / picture.file) as file:
                file.write(picture.png)
    with atomic_file(folder / PAGE) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    # pictures of an older report would pass for pictures of this one
    new = {picture.file for _, pictures in sections for picture in pictures}
    for name in os.listdir(folder):
        if PICTURE.fullmatch(name) and name not in new:
            with suppress(OSError):
                (folder / name).unlink()
    return folder / PAGE


def _pictures(
    number: int, image: ImageComparison, maps: FeatureMaps, comparison: Comparison
) -> list[Picture]:
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", Path(image.id).stem)[:40]
    window_px = comparison.facts["vision_config"]["window_size"]
    patch_px = comparison.facts["vision_config"]["patch_size"]
    rows, columns = (-(-side // (window_px // patch_px)) for side in (image.grid.h, image.grid.w))

    def shape(least: float, most: float) -> float:
        """Return the height of a picture with the image's ratio, within limits."""
        return min(max(5.2 * image.grid.h / image.grid.w, least), most)

    return [
        Picture(
            f"{number:02}-{stem}-windows.png",
            "What the tower sees",
            f"{image.grid.w} x {image.grid.h} patches of {patch_px} px in {rows * columns} windows "
            f"of {window_px} px; striped ones are cut by the edge. Full-attention blocks see all.",
            _drawn((5.2, shape(1.2, 12.0)), _windows, maps, window_px),
        ),
        Picture(
            f"{number:02}-{stem}-drift.png",
            "Drift over depth",
            "Relative error, |a - b| / |b|, at each stage, on a logarithmic scale. Shaded: blocks "
            "with full attention.",
            _drawn((4.9, shape(3.0, 4.7)), _drift, image, comparison),
        ),
        Picture(
            f"{number:02}-{stem}-features.png",
            "Feature maps",
            "The first three principal components as red, green and blue. The axes are those of "
            "Hugging Face's features, the same for both. Right: each token's relative error, ours "
            "from Hugging Face's; each stage has a scale of its own.",
            _feature_picture(maps, comparison),
        ),
    ]


def _drawn(size: tuple[float, float], draw: Callable[..., None], *arguments: Any) -> bytes:
    """Return a figure of `size` inches, filled by `draw(figure, ...)`, as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        draw(figure, *arguments)
        buffer = io.BytesIO()
        # without the version of matplotlib: the same figures give the same bytes
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _windows(figure: Any, maps: FeatureMaps, window_px: int) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    height, width, _ = maps.rgb.shape
    axes.imshow(maps.rgb.numpy(), interpolation="lanczos")
    for top in range(0, height, window_px):
        for left in range(0, width, window_px):
            h, w = min(window_px, height - top), min(window_px, width - left)
            is_cut = h < window_px or w < window_px
            if is_cut:  # blue, and striped where the picture itself is blue
                axes.add_patch(
                    Rectangle(
                        (left - 0.5, top - 0.5), w, h,
                        facecolor=OURS + "4d", edgecolor="#ffffff66", hatch="///", linewidth=0,
                    )
                )  # fmt: skip
            for colour, line in (("#00000080", 2.2), ("#ffffff", 0.9)):
                axes.add_patch(
                    Rectangle(
                        (left - 0.5, top - 0.5), w, h,
                        facecolor="none", edgecolor=colour, linewidth=line,
                    )
                )  # fmt: skip
    axes.set_axis_off()


def _drift(figure: Any, image: ImageComparison, comparison: Comparison) -> None:
    axes = figure.subplots()
    places = range(len(image.stages))
    full = _full_blocks(comparison)
    for place, stage in enumerate(image.stages):
        if stage.name in full:
            axes.axvspan(place - 0.5, place + 0.5, color="#eef1f5", zorder=0, linewidth=0)
    is_fp32 = comparison.facts["dtype"] == "float32"
    lines = [
        ("Hugging Face - float64", THEIRS, "-", [stage.theirs for stage in image.stages]),
        ("ours - float64", OURS, "-", [stage.ours for stage in image.stages]),
        (
            "ours - Hugging Face",
            DISTANCE,
            ":",
            [stage.difference.relative for stage in image.stages],
        ),
    ]
    if is_fp32:
        allowed = [stage.verdict.allowed for stage in image.stages]
        lines.append(("ours - Hugging Face, allowed", LIMIT, "--", allowed))
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
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)


def _full_blocks(comparison: Comparison) -> set[str]:
    return {f"block.{i}" for i in comparison.facts["vision_config"]["fullatt_block_indexes"]}


def _feature_picture(maps: FeatureMaps, comparison: Comparison) -> bytes:
    height, width, _ = next(iter(maps.stages.values()))[1].shape
    row = 2.75 * height / width + 0.32
    return _drawn((9.0, min(row * len(maps.stages), 16.0)), _features, maps, comparison)


def _features(figure: Any, maps: FeatureMaps, comparison: Comparison) -> None:
    full = _full_blocks(comparison)
    grid = figure.subplots(len(maps.stages), 3, squeeze=False)
    for axes, (name, (ours, theirs)) in zip(grid, maps.stages.items(), strict=True):
        basis = _Basis.of(theirs)
        for column, values in enumerate((ours, theirs)):
            axes[column].imshow(basis.colours(values), interpolation="nearest")
        distance = (ours.double() - theirs.double()).norm(dim=-1)
        error = (distance / theirs.double().norm(dim=-1).clamp_min(1e-300)).nan_to_num(0.0)
        picture = axes[2].imshow(error.numpy(), cmap="viridis", vmin=0.0, interpolation="nearest")
        bar = figure.colorbar(picture, ax=axes[2], fraction=0.046, pad=0.02, format="%.1e")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=2)
        stage = {"patch_embed": "patch embedding", "merger": "merged tokens"}.get(name, name)
        stage = stage.replace(".", " ") + (" (full attention)" if name in full else "")
        titles = (f"{stage}: ours", "Hugging Face", "relative error")
        for each, title in zip(axes, titles, strict=True):
            each.set_axis_off()
            each.set_title(title)


@dataclass(frozen=True, slots=True, eq=False)
class _Basis:
    """Three principal axes of one set of features, and the range along each."""

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "_Basis":
        values = features.flatten(0, 1).float().nan_to_num(0.0)
        mean = values.mean(0)
        with torch.random.fork_rng(devices=[]):  # the method is randomised; pages are not
            torch.manual_seed(0)
            rank = min(3, *values.shape)
            _, _, axes = torch.pca_lowrank(values - mean, q=rank, center=False, niter=4)
        along = (values - mean) @ axes
        return cls(mean, axes, along.quantile(0.01, dim=0), along.quantile(0.99, dim=0))

    def colours(self, features: Tensor) -> NDArray[np.float32]:
        along = (features.float().nan_to_num(0.0) - self.mean) @ self.axes
        along = (along - self.low) / (self.high - self.low).clamp_min(1e-30)
        missing = 3 - along.shape[-1]
        padded = torch.nn.functional.pad(along, (0, missing), value=0.5)
        colours: NDArray[np.float32] = padded.clamp(0, 1).numpy()
        return colours
