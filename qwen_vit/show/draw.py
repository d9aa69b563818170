"""Draw views of features as PNG with matplotlib, as page panels or as one sheet for an image."""

import io
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError
from qwen_vit.show.strips import Box, StripLayout
from qwen_vit.show.views import FeatureView, FeatureViews

__all__ = [
    "BLUE",
    "HEAT_MAP",
    "check_packages",
    "draw_array",
    "draw_colours",
    "draw_picture",
    "draw_similarity",
    "draw_windows",
    "figure_png",
    "heat_colours",
    "panel_png",
    "sheet_png",
]

DOTS_PER_INCH = 150
PANEL_IN = 4.8  # inches: the longer side
TITLE_IN = 0.3
LETTERS_PER_IN, MIN_TITLE = 14, 24  # letters of a title's line; a longer title is wrapped
BLUE = "#1668c7"
HEAT_MAP = "cividis"  # readable for colour-blind readers
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlecolor": "#374151", "hatch.linewidth": 0.6,
}  # fmt: skip


def check_packages(what: str, *packages: str) -> None:
    """Raise ArgumentError if a drawing package is not installed.

    >>> check_packages("--report", "matplotlib", "jinja2")
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"{what} needs packages that are not installed: {', '.join(missing)}",
            remedy=f"run {install_command('show')}",
        )


def draw_array(axes: Any, layout: StripLayout, array: NDArray[Any], **style: Any) -> Any:
    """Draw an array over the whole image, in units of patches, and return the input for a colour
    bar."""
    drawn = None
    for part, place in layout.crops(array):
        extent = (place.left, place.left + place.width, place.top + place.height, place.top)
        drawn = axes.imshow(part, extent=extent, **style)
    width, height = layout.size
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return drawn


def draw_windows(axes: Any, layout: StripLayout, h: int, w: int, window: int) -> None:
    """Draw the attention windows of h x w patches, and stripe windows that an edge cuts."""
    from matplotlib.patches import Rectangle

    rows, columns = -(-h // window), -(-w // window)
    thin = min(1.0, 12 / max(layout.size[0] / window, layout.size[1] / window))
    for row in range(rows):
        for column in range(columns):
            top, left = row * window, column * window
            box = Box(left, top, min(window, w - left), min(window, h - top))
            place = layout.move(box)
            corner = (place.left, place.top)
            if place.width < window or place.height < window:
                axes.add_patch(
                    Rectangle(
                        corner, place.width, place.height, facecolor=BLUE + "33",
                        edgecolor="#ffffff59", hatch="//", linewidth=0,
                    )
                )  # fmt: skip
            for colour, line in (("#00000080", 2.2), ("#ffffff", 0.9)):  # visible on any image
                axes.add_patch(
                    Rectangle(
                        corner, place.width, place.height, facecolor="none", edgecolor=colour,
                        linewidth=line * thin,
                    )
                )  # fmt: skip


def draw_picture(axes: Any, layout: StripLayout, view: FeatureView, views: FeatureViews) -> None:
    """Draw windows over the image, or over the features' colours if there is no image."""
    if view.picture is None:
        draw_array(axes, layout, view.colours, interpolation="nearest")
    else:
        draw_array(axes, layout, view.picture, interpolation="antialiased")
    draw_windows(axes, layout, view.h, view.w, views.window)
    _draw_mark(axes, layout, view)


def draw_colours(axes: Any, layout: StripLayout, view: FeatureView, views: FeatureViews) -> None:
    draw_array(axes, layout, view.colours, interpolation="nearest")


def draw_similarity(axes: Any, layout: StripLayout, view: FeatureView, views: FeatureViews) -> Any:
    if view.similarity is None or views.span is None:
        raise ValueError("the view has no similarities")
    low, high = views.span
    drawn = draw_array(
        axes, layout, view.similarity, cmap=HEAT_MAP, vmin=low, vmax=high, interpolation="nearest"
    )
    _draw_mark(axes, layout, view)
    return drawn


def _draw_mark(axes: Any, layout: StripLayout, view: FeatureView) -> None:
    if view.mark is None:
        return
    x, y, _, _ = layout.move(Box(*view.mark, 0, 0))
    for colour, size, width in (("#000000", 11, 3.4), ("#ffffff", 10, 1.6)):
        axes.plot(x, y, "o", markersize=size, markerfacecolor="none", markeredgecolor=colour,
                  markeredgewidth=width)  # fmt: skip


def figure_png(size_in: tuple[float, float], draw: Callable[[Any], None], **options: Any) -> bytes:
    """Call `draw` with a figure of this size in inches, and return a PNG with reproducible
    bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style, layout = options.pop("style", {}), options.pop("layout", "constrained")
    with rc_context({**STYLE, **style}):
        figure = Figure(figsize=size_in, dpi=DOTS_PER_INCH, layout=layout)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None}, **options)
    return buffer.getvalue()


def panel_png(layout: StripLayout, draw: Callable[[Any], None]) -> bytes:
    """Draw one panel without text or margins, transparent between the strips."""

    def fill(figure: Any) -> None:
        draw(figure.add_axes((0, 0, 1, 1)))

    return figure_png(_panel_size(layout), fill, layout="none", transparent=True)


def sheet_png(view: FeatureView, views: FeatureViews, titles: Sequence[str]) -> bytes:
    """Draw an image's panels with titles side by side, or in a column for a wide image.

    The PNG has no alpha channel, so that users can save the picture as JPEG.
    """
    layout = StripLayout.of(view.h, view.w, views.window)
    draws: list[Callable[..., Any]] = [draw_picture, draw_colours]
    if view.similarity is not None:
        draws.append(draw_similarity)
    width, height = _panel_size(layout)
    is_column = width > 1.6 * height

    def fill(figure: Any) -> None:
        grid = figure.subplots(*((len(draws), 1) if is_column else (1, len(draws))), squeeze=False)
        for axes, draw, title in zip(grid.flat, draws, titles, strict=False):
            drawn = draw(axes, layout, view, views)
            title = title[:1].upper() + title[1:]
            axes.set_title(textwrap.fill(title, max(MIN_TITLE, int(LETTERS_PER_IN * width))))
            if draw is draw_similarity:
                bar = figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.03, 1)))
                bar.outline.set_visible(False)

    across, down = (1, len(draws)) if is_column else (len(draws), 1)
    size = (across * width + 0.1 * across, down * (height + TITLE_IN))
    png = figure_png(size, fill, bbox_inches="tight", pad_inches=0.06)
    opaque = io.BytesIO()
    with Image.open(io.BytesIO(png)) as sheet:
        sheet.convert("RGB").save(opaque, "PNG", dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return opaque.getvalue()


def heat_colours(count: int = 9) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[HEAT_MAP](value)) for value in np.linspace(0, 1, count)]


def _panel_size(layout: StripLayout) -> tuple[float, float]:
    width, height = layout.size
    scale = PANEL_IN / max(width, height)
    return width * scale, height * scale
