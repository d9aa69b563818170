"""Write a comparison as one self-contained page with verdict, maps and all measurements.

As for `qwen-vit show`, matplotlib draws the pictures and Jinja2 fills in the page. The extra `show`
installs both libraries. The module imports them only to write a page.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path

from qwen_vit.common.atomic_file import atomic_file, cannot_write, check_parent
from qwen_vit.compare.plots import (
    StageMaps,
    drift_png,
    features_png,
    stage_maps,
    stage_title,
    steps_png,
    windows_png,
)
from qwen_vit.compare.result import Comparison, FeatureMaps, ImageComparison
from qwen_vit.compare.text import (
    closer_line,
    computed_in,
    frame_lines,
    reference_line,
    verdict_lines,
)
from qwen_vit.compare.tolerance import max_ratio
from qwen_vit.errors import ArgumentError, ExportError, Wording, plural, with_options
from qwen_vit.show.draw import check_packages, heat_colours
from qwen_vit.show.page import data_uri, render_page
from qwen_vit.show.strips import StripLayout

__all__ = ["check_report", "write_report"]

PAGE = "index.html"
PICTURE = re.compile(r"\d{2,}-[A-Za-z0-9_-]{0,40}-(?:windows|drift|features)\.png")  # a report's


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold a stage's panels on the page, by title, and the largest error of a cell."""

    title: str
    panels: dict[str, str]
    largest_error: float


@dataclass(frozen=True, slots=True)
class Column:
    """Hold one pair of a video's frames for the page."""

    png: str
    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """Hold one image's section of the page, with pictures as data URIs."""

    image: ImageComparison
    windows: str
    windows_caption: str
    is_wide: bool
    drift: str
    drift_in_the_dark: str
    stages: list[Stage]
    frames: list[str]  # for a video: lines about the frames
    columns: list[Column]
    files: dict[str, bytes]  # PNG to put beside the page, by name


def check_report(folder: Path, *, overwrite: bool) -> None:
    """Check before the comparison that a report can be written."""
    check_packages("--report", "jinja2", "matplotlib")
    try:
        if folder.exists() and not folder.is_dir():
            raise ExportError(
                "a file",
                name=str(folder),
                expected="a folder for the report",
                remedy=Wording("pass another folder", shell="pass another --report"),
            )
        check_parent(folder)
        if not overwrite and folder.exists() and any(folder.iterdir()):
            raise ExportError(
                "the folder already contains files",
                name=str(folder),
                expected="a new or empty folder",
                remedy=with_options("pass {} to write into this folder", ("overwrite", True)),
            )
    except OSError as error:
        raise cannot_write(folder, error) from None
    written = folder if folder.exists() else folder.absolute().parent
    if not os.access(written, os.W_OK):
        raise ExportError("not writable", name=str(written), remedy="check its permissions")


def write_report(
    folder: Path, comparison: Comparison, *, command: str = "", today: date | None = None
) -> Path:
    """Write the page and the pictures into a folder, and return the page's path.

    The report replaces an older report. The page contains all pictures, so that you can send it
    alone, and shows `command`, so that readers can regenerate it.
    """
    sections = []
    for number, image in enumerate(comparison.images, start=1):
        if image.maps is None:
            raise ArgumentError(
                "the comparison has no feature maps", remedy="compare with keep_maps=True"
            )
        sections.append(_section(number, image, image.maps, comparison))
    page = render_page(
        files("qwen_vit.compare").joinpath("report.html.jinja").read_text("utf-8"),
        today=today,
        command=command,
        comparison=comparison,
        facts=comparison.facts,
        computed_in=computed_in(comparison.facts),
        reference=reference_line(comparison.facts),
        verdicts=verdict_lines(comparison),
        closer=closer_line(comparison),
        sections=sections,
        heat=", ".join(heat_colours()),
        is_fp32=comparison.facts["dtype"] == "float32",
        max_ratio=max_ratio(comparison.facts["quantization"]),
        has_ratios=comparison.has_same_weights,
        has_strips=any(section.is_wide for section in sections),
    )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    for section in sections:
        for name, png in section.files.items():
            with atomic_file(folder / name) as file:
                file.write(png)
    with atomic_file(folder / PAGE) as file:
        file.write(page)
    # an older report's pictures would look like this report's pictures
    new = {name for section in sections for name in section.files}
    for name in os.listdir(folder):
        if PICTURE.fullmatch(name) and name not in new:
            with suppress(OSError):
                (folder / name).unlink()
    return folder / PAGE


def _section(
    number: int, image: ImageComparison, maps: FeatureMaps, comparison: Comparison
) -> Section:
    config, grid = comparison.facts["vision_config"], image.grid
    window_px, patch_px = config["window_size"], config["patch_size"]
    side = window_px // patch_px
    layout = StripLayout.of(grid.h, grid.w, side)
    n_windows = -(-grid.h // side) * -(-grid.w // side)
    stages = stage_maps(maps)
    windows = windows_png(maps, layout, image, side)
    stem = f"{number:02}-" + re.sub(r"[^A-Za-z0-9-]+", "_", Path(image.id).stem)[:40]
    return Section(
        image,
        data_uri(windows),
        f"{grid.w} x {grid.h} patches of {patch_px} px in {plural(n_windows, 'window')} of "
        f"{window_px} px. Striped windows are cut by the edge. Blocks with full attention see "
        "the whole image.",
        layout.is_cut,
        data_uri(drift_png(image, comparison, is_dark=False)),
        data_uri(drift_png(image, comparison, is_dark=True)),
        [_stage(stage, layout, comparison) for stage in stages],
        [] if image.frames is None else frame_lines(image.frames),
        _columns(image, maps, layout),
        {
            f"{stem}-windows.png": windows,
            f"{stem}-drift.png": drift_png(image, comparison, is_dark=None),
            f"{stem}-features.png": features_png(stages, layout, comparison),
        },
    )


def _columns(image: ImageComparison, maps: FeatureMaps, layout: StripLayout) -> list[Column]:
    if not maps.steps:
        return []
    moments = image.frames.seconds[::2] if image.frames else ()
    columns = []
    for each, png in zip(maps.steps, steps_png(maps, layout), strict=True):
        at = f"{moments[each.step]:.6g} s" if each.step < len(moments) else f"step {each.step}"
        error = f"{image.steps[each.step].difference:.1e}"
        columns.append(Column(data_uri(png), f"step {each.step}", f"{at}, error {error}"))
    return columns


def _stage(stage: StageMaps, layout: StripLayout, comparison: Comparison) -> Stage:
    panels = {title: data_uri(png) for title, png in stage.panels(layout).items()}
    return Stage(stage_title(stage.name, comparison), panels, float(stage.error.max()))
