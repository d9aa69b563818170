"""Test the drawn sheets and panels, and features.show()."""

import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import (
    ImageFeatures,
    VisionEncoder,
    load_features,
    show_features,
    write_features,
)
from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.features import FailedImage
from qwen_vit.show import draw
from qwen_vit.show.page import PageText, feature_page
from qwen_vit.show.sheets import panel_titles
from qwen_vit.show.strips import StripLayout
from qwen_vit.show.views import view_features
from tests.support import IMAGES

CHELSEA = IMAGES / "chelsea.png"


def features(h: int = 6, w: int = 10) -> ImageFeatures:
    rows = torch.randn(h * w, 16, generator=torch.Generator().manual_seed(0))
    return ImageFeatures("a", rows, (1, h, w), (h * 14, w * 14))


def drawn(function: Any) -> Any:
    """Return the axes on which a function has drawn."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    function(axes)
    return axes


def test_a_cell_has_its_colour_in_its_place() -> None:
    colours = np.zeros((2, 4, 3))
    colours[0, 3] = (1, 0, 0)
    colours[1, 0] = (0, 0, 1)
    layout = StripLayout.of(2, 4, 8)
    png = draw.panel_png(layout, lambda axes: draw.draw_array(axes, layout, colours))
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (360, 720, 3)
    assert pixels[90, 630].tolist() == [255, 0, 0]
    assert pixels[270, 90].tolist() == [0, 0, 255]
    assert pixels[90, 90].tolist() == pixels[270, 630].tolist() == [0, 0, 0]
    assert (pixels[:, 539:541] == [0, 0, 0]).any()  # cells have no margin


def test_every_window_is_drawn_and_cut_ones_are_tinted() -> None:
    """36 patches are four windows of 8 patches, and half a window."""
    layout = StripLayout.of(36, 20, 8)
    axes = drawn(lambda axes: draw.draw_windows(axes, layout, 36, 20, 8))
    boxes = [patch for patch in axes.patches if patch.get_hatch() is None]
    tinted = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(boxes) == 2 * 5 * 3  # a dark line and a light line per window
    assert len(tinted) == 5 + 3 - 1
    assert {box.get_width() for box in boxes} == {8, 4}
    assert {(box.get_width(), box.get_height()) for box in tinted} == {(8, 4), (4, 8), (4, 4)}


def test_the_chosen_cell_is_marked_in_its_strip() -> None:
    long = ImageFeatures("a", torch.randn(4 * 200, 16), (1, 4, 200), (56, 2800))
    views = view_features([long], point=(2799, 55))
    [view] = views.views
    layout = StripLayout.of(4, 200, 8)
    axes = drawn(lambda axes: draw.draw_similarity(axes, layout, view, views))
    x, y = axes.lines[0].get_data()
    last = layout.places[-1]
    assert (x[0], y[0]) == (last.left + last.width - 0.5, last.top + 3.5)
    assert {image.get_clim() for image in axes.images} == {views.span}
    assert len(axes.images) == len(layout.sources) > 1


def test_the_same_features_give_the_same_picture() -> None:
    one, other = (show_features([features()], point=(30, 30))[0] for _ in range(2))
    assert one.tobytes() == other.tobytes()
    assert one.info == other.info == {"dpi": one.info["dpi"]}  # neither a version nor a date


def test_panels_stand_beside_each_other_or_below() -> None:
    wide, high = (show_features([features(h, w)])[0] for h, w in ((6, 20), (20, 6)))
    assert wide.height > 0.6 * wide.width
    assert high.width > 0.5 * high.height
    point = show_features([features()], point=(3, 3))[0]
    assert point.height > 1.3 * show_features([features()])[0].height


def test_titles_explain_the_stripes_and_name_the_marked_image() -> None:
    """A title once was "similarity to the first image's cell"."""
    first = replace(features(8, 8), id="p/" + "a" * 40 + ".png")
    second = replace(features(6, 10), id="p/b.png")
    views = view_features([first, second], point=(20, 20))
    complete, cut = (panel_titles(view, views) for view in views.views)
    assert "striped" not in complete[0]
    assert cut[0] == "features and 2 attention windows, striped where the edge cuts them"
    assert cut[1] == "feature map, 10 x 6 cells: equal colours mark similar features"
    assert complete[2] == "similarity to the marked cell"
    assert cut[2] == f"similarity to the marked cell of {'a' * 27}..."


def test_windows_are_drawn_over_the_features_without_a_picture() -> None:
    views = view_features([features()])
    [view] = views.views
    layout = StripLayout.of(6, 10, 8)
    axes = drawn(partial(draw.draw_picture, layout=layout, view=view, views=views))
    assert np.array_equal(axes.images[0].get_array(), view.colours)
    assert axes.patches


@pytest.mark.parametrize(
    ("size_px", "facts"),
    [
        ((84, 140), "140 x 84 pixels: 5 x 3 cells"),
        ((80, 150), "150 x 80 pixels, resized to 140 x 84: 5 x 3 cells"),
        ((0, 0), "resized to 140 x 84 pixels: 5 x 3 cells"),
    ],
)
def test_the_sizes_on_a_page_agree(undrawn: None, size_px: tuple[int, int], facts: str) -> None:
    """A page once named cells of 28 x 28 pixels, and then patches, which are half as wide."""
    rows = torch.randn(3 * 5, 16, generator=torch.Generator().manual_seed(0))
    views = view_features([ImageFeatures("a", rows, (1, 6, 10), size_px)])
    text = PageText("Features", {}, (), "merged token", 28, "112 x 112 pixels", "")
    page = feature_page(views, text).decode()
    assert f'<p class="soft small">{facts}</p>' in page
    assert "one merged token of 28 x 28 pixels" in page
    assert "patches" not in page


def test_features_have_a_show_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=30_000)
    found = encoder.encode(CHELSEA, output="patch")
    shown = found.show(point=(120, 100))
    assert isinstance(shown, Image.Image)
    shown.save(tmp_path / "a.jpg")  # JPEG cannot store an alpha channel
    explicit = found.show(Image.open(CHELSEA), point=(120, 100))
    assert explicit.tobytes() == shown.tobytes()
    monkeypatch.chdir(tmp_path)
    [black] = encoder.encode([np.zeros((56, 84, 3), np.uint8)])
    assert black.show().width > 100


def test_stored_features_are_shown_together(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=30_000)
    found = encoder.encode([CHELSEA, IMAGES / "rocket.jpg"])
    stored = load_features(write_features(tmp_path / "f.safetensors", found, encoder.metadata()))
    [cat, rocket] = stored.show(point=(120, 100))
    assert rocket.tobytes() == show_features(found, point=(120, 100))[1].tobytes()
    [alone] = stored[1:].show()
    assert alone.tobytes() != rocket.tobytes()
    assert cat.tobytes() != rocket.tobytes()


def test_without_the_extra_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    command = re.escape(install_command("show"))
    with pytest.raises(ArgumentError, match=rf"show needs .*: matplotlib\. Run {command}"):
        features().show()


def test_a_failed_image_is_an_error_that_names_it() -> None:
    failed = FailedImage("a.png", ImageError("a truncated PNG", name="a.png"), "decode")
    with pytest.raises(ArgumentError, match=r"a\.png: this image failed: a truncated PNG\. Omit"):
        show_features([failed])  # type: ignore[list-item]
