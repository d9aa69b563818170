"""Test the views of an image: its picture, its cells, and the cell of a pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.features import ImageFeatures
from qwen_vit.show.views import view_features


def features(
    name: str = "a", h: int = 6, w: int = 10, size_px: tuple[int, int] = (80, 140), t: int = 1
) -> ImageFeatures:
    rows = torch.randn(t * h * w, 16, generator=torch.Generator().manual_seed(0))
    return ImageFeatures(name, rows, (t, h, w), size_px)


@pytest.mark.parametrize(
    ("point", "cell"),
    [((0, 0), (0, 0)), ((139, 79), (5, 9)), ((14, 13), (0, 1)), ((13.9, 26.7), (2, 0))],
)
def test_a_pixel_of_the_original_image_selects_its_cell(
    point: tuple[float, float], cell: tuple[int, int]
) -> None:
    """The image is resized from 80 x 140 pixels to 6 x 10 patches, so the point must be scaled."""
    [view] = view_features([features()], point=point).views
    assert view.similarity is not None
    assert tuple(map(int, np.unravel_index(view.similarity.argmax(), (6, 10)))) == cell
    assert view.mark == (cell[1] + 0.5, cell[0] + 0.5)


def test_merged_cells_are_marked_in_patches() -> None:
    merged = ImageFeatures("a", torch.randn(15, 16), (1, 6, 10), (80, 140))
    [view] = view_features([merged], point=(139, 79)).views
    assert view.colours.shape == (3, 5, 3)
    assert view.mark == (9.0, 5.0)


def test_other_images_are_compared_with_the_first_ones_cell() -> None:
    one, other = features("a"), features("b", h=4, w=4, size_px=(56, 56))
    other.embeds[5] = 2 * one.embeds[13]  # row 1, column 1; in `one`, row 1, column 3
    views = view_features([one, other], point=(3.5 * 14, 1.5 * 80 / 6))
    first, second = views.views
    assert second.similarity is not None
    assert tuple(map(int, np.unravel_index(second.similarity.argmax(), (4, 4)))) == (1, 1)
    assert second.similarity.max() == pytest.approx(1)
    assert (first.mark is None, second.mark is None) == (False, True)
    assert views.span is not None
    assert views.span[1] == 1.0


@pytest.mark.parametrize("point", [(140, 0), (0, 80), (-1, 3), (1e9, 1e9)])
def test_a_point_outside_is_refused(point: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match=r"outside the image\. Expected x from 0 to 139 and"):
        view_features([features()], point=point)


@pytest.mark.parametrize(
    "given",
    [
        {"point": 3}, {"point": (1,)}, {"point": "12,3"}, {"point": "12"}, {"point": (None, 1)},
        {"pictures": 3}, {"pictures": ["a.png"]}, {"frame": None}, {"frame": 0.5}, {"layer": []},
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused(given: dict[str, Any]) -> None:
    """A TypeError or a ValueError once named no argument."""
    [name] = given
    with pytest.raises(ArgumentError, match=rf"{name} (is )?.*\. (Expected|Encode it again)"):
        view_features([features()], **given)


def test_a_point_outside_is_shown_in_full() -> None:
    with pytest.raises(ArgumentError, match=r"the point 1000000,2\.5 is outside"):
        view_features([features()], point=(10**6, 2.5))


@pytest.mark.parametrize(("given", "text"), [(3, r"3 \(int\)"), ([3], r"3 \(int\)"), ("ab", "'a'")])
def test_other_values_than_features_are_refused(given: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=f"features contains {text}. Expected ImageFeatures"):
        view_features(given)


def test_a_point_needs_the_size_of_the_image() -> None:
    unknown = features(size_px=(0, 0))
    with pytest.raises(ArgumentError, match="the image's size is unknown"):
        view_features([unknown], point=(3, 3))
    picture = np.zeros((80, 140, 3), np.uint8)
    [view] = view_features([unknown], {"a": picture}, point=(139, 79)).views
    assert view.mark == (9.5, 5.5)
    assert view.size_px == (80, 140)


def test_the_picture_covers_whole_patches() -> None:
    picture = np.zeros((80, 140, 3), np.uint8)
    picture[:, 70:] = 255
    [view] = view_features([features()], {"a": picture}).views
    assert view.picture is not None
    assert view.picture.shape == (84, 140, 3)
    assert (view.picture[:, :60] == 0).all()
    assert (view.picture[:, 80:] == 255).all()
    large = features(h=400, w=400, size_px=(5600, 5600))
    [view] = view_features([large], {"a": np.zeros((5600, 5600, 3), np.uint8)}).views
    assert view.picture is not None
    assert view.picture.shape == (1600, 1600, 3)


def test_a_picture_of_another_image_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"a: the image is 90 x 80, but .* 140 x 80 pixels\. Pass"
    ):
        view_features([features()], {"a": np.zeros((80, 90, 3), np.uint8)})
    with pytest.raises(ArgumentError, match="an image of another shape"):
        view_features([features(size_px=(0, 0))], {"a": np.zeros((80, 90, 3), np.uint8)})
    with pytest.raises(ImageError, match=r"^gone\.png: does not exist"):
        view_features([features()], {"a": "gone.png"})


def test_an_image_is_found_by_its_id_if_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (140, 80)).save(path)
    [view] = view_features([features(str(path))]).views
    assert view.picture is not None
    Image.new("RGB", (80, 140)).save(path)  # another image with the same name
    [view] = view_features([features(str(path))]).views
    assert view.picture is None
    path.write_bytes(b"")
    [view] = view_features([features(str(path))]).views
    assert view.picture is None


def test_a_frame_of_a_video_is_chosen() -> None:
    video = features(t=3)
    first, last = (view_features([video], frame=frame).views[0] for frame in (0, 2))
    assert not np.array_equal(first.colours, last.colours)
    with pytest.raises(ArgumentError, match=r"frame is 3\. Expected from 0 to 2"):
        view_features([video], frame=3)


def test_a_layer_is_drawn_in_place_of_the_output() -> None:
    rows = torch.randn(60, 24)
    deep = ImageFeatures("a", torch.randn(15, 16), (1, 6, 10), (84, 140), layers={7: rows})
    [view] = view_features([deep], layer=7, point=(139, 83)).views
    assert view.colours.shape == (6, 10, 3)
    same = ImageFeatures("a", rows, (1, 6, 10), (84, 140))
    [expected] = view_features([same], point=(139, 83)).views
    assert np.array_equal(view.colours, expected.colours)
    with pytest.raises(ArgumentError, match=r"no features of layer 3\. Expected one of its .*: 7"):
        view_features([deep], layer=3)
    with pytest.raises(ArgumentError, match=r"of layer 7\. Encode it again.* layers=\(7,\)\."):
        view_features([same], layer=7)


def test_features_that_do_not_compare_are_refused() -> None:
    other = ImageFeatures("b", torch.ones(16, 8), (1, 4, 4))
    with pytest.raises(ArgumentError, match="the widths 8, 16"):
        view_features([features(), other])
    with pytest.raises(ArgumentError, match="features is empty"):
        view_features([])
    mean = ImageFeatures("m", torch.ones(1, 16), (1, 6, 10))
    with pytest.raises(ArgumentError, match="a row for each merged token or each patch"):
        view_features([mean])


def test_windows_are_counted_with_those_that_an_edge_cuts() -> None:
    [view] = view_features([features(h=36, w=36)]).views
    assert view.n_windows(8) == 25
    assert view_features([features(h=8, w=16)]).views[0].n_windows(8) == 2
