"""Write views of features as one self-contained page, readable on a phone and in dark mode."""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from PIL import Image

from qwen_vit.show.colours import COMPONENTS, component_colours
from qwen_vit.show.draw import (
    draw_colours,
    draw_picture,
    draw_similarity,
    heat_colours,
    panel_png,
)
from qwen_vit.show.sheets import panel_titles
from qwen_vit.show.strips import StripLayout
from qwen_vit.show.views import UNKNOWN_SIZE, FeatureView, FeatureViews

__all__ = ["PageText", "data_uri", "feature_page", "render_page"]

WEBP_QUALITY = 90  # for photographs; a map is usually smaller as PNG, and then stays lossless


@dataclass(frozen=True, slots=True)
class PageText:
    """Hold the text of a feature page.

    Attributes:
        title: the heading.
        facts: one name and value per line, such as the model and the output.
        notices: warnings at the top of the page, for example that weights are random.
        cell: the name of a map's cell: "merged token" or "patch".
        cell_px: the side of a cell, in pixels of the resized image.
        window_px: the size of a window, such as "112 x 112 pixels".
        full_attention: a sentence on the blocks that attend to the whole image.
        command: the command that creates the page again, or an empty string.
    """

    title: str
    facts: Mapping[str, str]
    notices: tuple[str, ...]
    cell: str
    cell_px: int
    window_px: str
    full_attention: str
    command: str = ""


def feature_page(views: FeatureViews, text: PageText, *, today: date | None = None) -> bytes:
    layouts = [StripLayout.of(view.h, view.w, views.window) for view in views.views]
    ramps = zip(COMPONENTS, component_colours(), views.explained, strict=False)
    return render_page(
        _template("page.html.jinja"),
        today=today,
        command=text.command,
        title=text.title,
        facts=text.facts,
        notices=text.notices,
        images=[
            _image(view, views, layout, text.cell_px)
            for view, layout in zip(views.views, layouts, strict=True)
        ],
        cell=text.cell,
        cell_px=text.cell_px,
        window_px=text.window_px,
        full_attention=text.full_attention,
        components=[
            {"name": name, "colours": ", ".join(map(_hex, ramp)), "share": f"{share:.0%}"}
            for name, ramp, share in ramps
        ],
        heat=None if views.span is None else {
            "colours": ", ".join(heat_colours()),
            "low": f"{views.span[0]:.2f}", "high": f"{views.span[1]:.2f}",
        },
        has_strips=any(layout.is_cut for layout in layouts),
    )  # fmt: skip


def render_page(template: str, *, today: date | None = None, command: str, **values: Any) -> bytes:
    """Render a page from a Jinja2 template that extends `base.html.jinja`, as UTF-8.

    The page shows `command` as the command that creates it again.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    base = {"base.html.jinja": _template("base.html.jinja")}
    environment = Environment(
        loader=DictLoader(base), autoescape=True, undefined=StrictUndefined
    )  # Jinja2 then escapes file names
    text = environment.from_string(template).render(
        date=(today or date.today()).isoformat(),
        version=version("qwen-vit"),
        command=command,
        **values,
    )
    return text.encode("utf-8", "backslashreplace")


def data_uri(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _template(name: str) -> str:
    return files("qwen_vit.show").joinpath(name).read_text("utf-8")


def _image(
    view: FeatureView, views: FeatureViews, layout: StripLayout, cell_px: int
) -> dict[str, Any]:
    draws: list[Any] = [draw_picture, draw_colours]
    if view.similarity is not None:
        draws.append(draw_similarity)
    titles = panel_titles(view, views)
    return {
        "id": view.id,
        "facts": _facts(view, cell_px),
        "is_wide": layout.size[0] > 2 * layout.size[1],
        "panels": [
            _panel(layout, partial(draw, layout=layout, view=view, views=views), title)
            for draw, title in zip(draws, titles, strict=False)
        ],
    }


def _facts(view: FeatureView, cell_px: int) -> str:
    """Return the image's size, its cells and a video's frames, for example "512 x 512 pixels,
    resized to 504 x 504: 18 x 18 cells"."""
    rows, columns = view.colours.shape[:2]
    resized_px = rows * cell_px, columns * cell_px
    size = "{1} x {0} pixels".format(*view.size_px)
    if view.size_px == UNKNOWN_SIZE:
        size = "resized to {1} x {0} pixels".format(*resized_px)
    elif view.size_px != resized_px:
        size += ", resized to {1} x {0}".format(*resized_px)
    of_video = f", pair {view.frame + 1} of {view.n_frames:,} pairs of frames"
    return f"{size}: {columns} x {rows} cells" + of_video * (view.n_frames > 1)


def _panel(layout: StripLayout, draw: Any, title: str) -> dict[str, Any]:
    png = panel_png(layout, draw)
    with Image.open(io.BytesIO(png)) as picture:
        width, height = picture.size
        webp = io.BytesIO()
        picture.save(webp, "WEBP", quality=WEBP_QUALITY)
    kind, smaller = ("webp", webp.getvalue()) if len(webp.getvalue()) < len(png) else ("png", png)
    return {
        "uri": data_uri(smaller, kind), "width": width, "height": height,
        "title": title[:1].upper() + title[1:],
    }  # fmt: skip


def _hex(colour: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * float(value)):02x}" for value in colour)
