"""Test that strips of long pictures show every part once, cut between windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit.show.strips import Box, StripLayout

SIDES = st.integers(1, 450).map(lambda units: 2 * units)


@given(SIDES, SIDES)
def test_every_patch_is_drawn_once_and_in_its_place(h: int, w: int) -> None:
    layout = StripLayout.of(h, w, 8)
    seen = np.zeros((h, w), int)
    for source in layout.sources:
        left, top, n_columns, n_rows = map(int, source)
        seen[top : top + n_rows, left : left + n_columns] += 1
        assert left % 8 == 0
        assert top % 8 == 0
    assert (seen == 1).all()
    width, height = layout.size
    for place, other in zip(layout.places, layout.places[1:], strict=False):
        is_above = place.top + place.height <= other.top
        assert is_above or place.left + place.width <= other.left
    assert max(width, height) <= 4.5 * min(width, height)


@given(SIDES, SIDES, st.data())
def test_a_patch_moves_with_its_part_of_an_array(h: int, w: int, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    array = np.zeros((h, w))
    array[row, column] = 1
    layout = StripLayout.of(h, w, 8)
    x, y, _, _ = layout.move(Box(column, row, 1, 1))
    found = [
        (place.left + at[1], place.top + at[0])
        for part, place in layout.crops(array)
        for at in np.argwhere(part)
    ]
    assert found == [(x, y)]


@pytest.mark.parametrize("scale", [14, 1, 0.5])
def test_arrays_of_pixels_patches_and_tokens_are_cut_alike(scale: float) -> None:
    h, w = 4, 858
    array = np.arange(int(h * scale) * int(w * scale)).reshape(int(h * scale), -1)
    layout = StripLayout.of(h, w, 8)
    parts = [part for part, _ in layout.crops(array)]
    assert np.array_equal(np.concatenate(parts, axis=1), array)
    assert parts[0].shape == (int(4 * scale), int(72 * scale))


def test_a_picture_of_a_usual_shape_is_whole() -> None:
    for h, w in ((30, 46), (46, 30), (2, 2), (10, 40)):
        layout = StripLayout.of(h, w, 8)
        assert not layout.is_cut
        assert layout.size == (w, h)
    assert StripLayout.of(10, 42, 8).is_cut


def test_a_place_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="outside"):
        StripLayout.of(4, 6, 8).move(Box(6, 0, 1, 1))
