"""Compare every index of a layout with transformers' functions, and test the kernel tiles."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen_vit import layout as layout_module
from qwen_vit.config import Grid
from qwen_vit.errors import ImageError
from qwen_vit.layout import PADDING_ROWS, Layout, Segments, SegmentTiling, tile_table
from tests.support.checkpoints import SMALL
from tests.support.layouts import assert_equals_transformers
from tests.support.towers import GridTuple, as_grids, n_patches

EXAMPLES, GRIDS_EACH = 200, 50  # 10,000 grids
# Merged sides with every remainder of a window. Some sides have many windows.
SIDES = st.one_of(st.integers(1, 10), st.integers(1, 10), st.integers(1, 24))
GRIDS = st.tuples(st.sampled_from((1, 1, 2, 3)), SIDES, SIDES)
WINDOWS_PX = (56, 84, 112, 140, 168, 196, 224)
NAMED_GRIDS = {
    "1x1": (1, 1, 1),
    "one-window": (1, 4, 4),
    "0mod4": (1, 8, 12),
    "1mod4": (1, 5, 9),
    "2mod4": (1, 6, 10),
    "3mod4": (1, 7, 11),
    "tall-strip": (1, 23, 4),
    "wide-strip": (1, 3, 30),
    "one-unit-wide": (1, 1, 17),
    "clip": (5, 3, 6),
    "photograph": (1, 32, 21),
}


def in_patches(merged: Sequence[GridTuple], merge: int = 2) -> list[GridTuple]:
    return [(t, h * merge, w * merge) for t, h, w in merged]


def assert_undoes_itself(layout: Layout, grids: Sequence[GridTuple], merge: int = 2) -> None:
    """Check that orders are permutations, that merged_order inverts the window order, and that
    raster_order is raster."""
    unit = merge * merge
    assert torch.equal(layout.grid_index.long().sort().values, torch.arange(layout.n_patches))
    units = layout.grid_index[::unit].long() // unit  # window-order unit -> grid-order unit
    assert torch.equal(units[layout.merged_order.long()], torch.arange(len(units)))
    in_raster_order = layout.positions[layout.raster_order.long()]
    cells = [
        torch.cartesian_prod(torch.arange(h), torch.arange(w)).repeat(t, 1) for t, h, w in grids
    ]
    assert torch.equal(in_raster_order.long(), torch.cat(cells))
    # Each frame keeps its place in the batch.
    frame_of_row = torch.repeat_interleave(layout.frames.cu_seqlens.diff().long())
    assert torch.equal(frame_of_row[layout.raster_order.long()], frame_of_row)


def assert_tiles_cover(segments: Segments, tiling: SegmentTiling, n_rows: int) -> None:
    """Check that tiles cover every row once. A tile is a part of one segment, or has whole segments
    if it may pack."""
    cu = segments.cu_seqlens.numpy()
    q_start, q_end, k_start, k_end = segments.tiles.numpy().T
    assert cu[0] == 0
    assert cu[-1] == n_rows
    assert (np.diff(cu) > 0).all()

    by_place = np.argsort(q_start)
    edges = np.concatenate([[0], q_end[by_place]])
    assert np.array_equal(edges[:-1], q_start[by_place])
    assert edges[-1] == n_rows
    assert (q_end - q_start > 0).all()
    assert (q_end - q_start <= tiling.rows).all()
    assert (k_start <= q_start).all()
    assert (q_end <= k_end).all()

    first = np.searchsorted(cu, k_start)  # the segments of a tile's keys
    last = np.searchsorted(cu, k_end)
    assert np.array_equal(cu[first], k_start)
    assert np.array_equal(cu[last], k_end)
    assert (last - first == 1).all()
    assert (np.diff(k_end - k_start) <= 0).all()  # tiles with many keys come first


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)
@given(
    merged=st.lists(GRIDS, min_size=GRIDS_EACH, max_size=GRIDS_EACH),
    window_px=st.sampled_from(WINDOWS_PX),
    rows=st.sampled_from((16, 32, 64, 128, 1024)),
)
def test_a_layout_equals_transformers_on_random_grids(
    merged: list[GridTuple], window_px: int, rows: int
) -> None:
    config, grids = replace(SMALL, window_px=window_px), in_patches(merged)
    tiling = SegmentTiling(rows)
    layout = Layout.from_grids(as_grids(grids), config, window_tiling=tiling, full_tiling=tiling)
    assert layout.n_rows == layout.n_patches == n_patches(grids)
    assert layout.n_positions == max(max(h, w) for _, h, w in grids)
    assert_equals_transformers(layout, grids, window_px)
    assert_undoes_itself(layout, grids)
    for segments in (layout.windows, layout.frames):
        assert_tiles_cover(segments, tiling, layout.n_rows)


@pytest.mark.parametrize("window_px", WINDOWS_PX)
@pytest.mark.parametrize("name", NAMED_GRIDS)
def test_a_layout_equals_transformers_on_one_grid(name: str, window_px: int) -> None:
    grids = in_patches([NAMED_GRIDS[name]])
    layout = Layout.from_grids(as_grids(grids), replace(SMALL, window_px=window_px))
    assert_equals_transformers(layout, grids, window_px)
    assert_undoes_itself(layout, grids)


@pytest.mark.parametrize("merge", [1, 3, 4])
def test_a_layout_equals_transformers_for_other_merge_sizes(merge: int) -> None:
    config = replace(SMALL, spatial_merge_size=merge, window_px=3 * 14 * merge)
    grids = in_patches(list(NAMED_GRIDS.values()), merge)
    layout = Layout.from_grids(as_grids(grids), config)
    assert_equals_transformers(layout, grids, config.window_px, merge)
    assert_undoes_itself(layout, grids, merge)


def test_a_batch_is_its_images_one_after_the_other() -> None:
    grids = as_grids(in_patches(list(NAMED_GRIDS.values())))
    batch = Layout.from_grids(grids, SMALL)
    row = token = 0
    for grid in grids:
        alone = Layout.from_grids([grid], SMALL)
        rows = slice(row, row + grid.n_patches)
        tokens = slice(token, token + grid.n_patches // 4)
        assert torch.equal(batch.grid_index[rows] - row, alone.grid_index)
        assert torch.equal(batch.positions[rows], alone.positions)
        assert torch.equal(batch.raster_order[rows] - row, alone.raster_order)
        assert torch.equal(batch.merged_order[tokens] - token, alone.merged_order)
        row, token = rows.stop, tokens.stop


@pytest.mark.parametrize("padding", [0, 4, 60, 64, 68, 1000])
def test_padding_rows_attend_among_themselves_and_change_no_index(padding: int) -> None:
    grids = as_grids(in_patches([(1, 5, 9), (3, 2, 3)]))
    n, tiling = n_patches(grids), SegmentTiling(64)
    tilings: dict[str, Any] = {"window_tiling": tiling, "full_tiling": tiling}
    plain = Layout.from_grids(grids, SMALL, **tilings)
    filled = Layout.from_grids(grids, SMALL, n_rows=n + padding, **tilings)
    assert (filled.n_patches, filled.n_rows) == (n, n + padding)
    for name in ("grid_index", "positions"):
        assert torch.equal(getattr(filled, name)[:n], getattr(plain, name))
        assert len(getattr(filled, name)) == n + padding
    assert filled.grid_index.min() >= 0
    assert filled.grid_index.max() < n  # a padding row reads an existing patch
    for name in ("merged_order", "raster_order"):
        assert torch.equal(getattr(filled, name), getattr(plain, name))
    for name in ("windows", "frames"):
        segments, before = getattr(filled, name), getattr(plain, name)
        cu = segments.cu_seqlens
        assert torch.equal(cu[: len(before.cu_seqlens)], before.cu_seqlens)
        own = cu[len(before.cu_seqlens) - 1 :]  # starts after the last patch
        assert own[0] == n
        assert (own.diff() <= PADDING_ROWS).all()
        assert_tiles_cover(segments, tiling, n + padding)


def test_no_images_make_an_empty_layout() -> None:
    layout = Layout.from_grids([], SMALL)
    assert (layout.n_patches, layout.n_rows, len(layout.merged_order)) == (0, 0, 0)
    assert layout.windows.tiles.shape == (0, 4)
    filled = Layout.from_grids([], SMALL, n_rows=128)
    assert filled.windows.cu_seqlens.tolist() == [0, 64, 128]


def test_a_layout_moved_to_a_device_is_the_same() -> None:
    layout = Layout.from_grids([Grid(2, 6, 10)], SMALL, window_tiling=SegmentTiling(64), n_rows=200)
    moved = layout.to(torch.device("cpu"))
    for name in Layout.__slots__:
        old, new = getattr(layout, name), getattr(moved, name)
        if isinstance(old, Segments):
            for part in Segments.__slots__:
                assert_same_tensor(getattr(old, part), getattr(new, part))
        elif isinstance(old, Tensor):
            assert_same_tensor(old, new)
        else:
            assert old == new


def assert_same_tensor(old: Tensor, new: Tensor) -> None:
    assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert torch.equal(old, new)


def test_tiles_of_one_segment_share_its_keys() -> None:
    lengths = np.array([100, 40, 300], np.int32)
    table = tile_table(lengths, SegmentTiling(rows=128)).tolist()
    assert table == [
        [140, 268, 140, 440],
        [268, 396, 140, 440],
        [396, 440, 140, 440],
        [0, 100, 0, 100],
        [100, 140, 100, 140],
    ]


@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        ((1, 3, 4), "multiples of 2 patches"),
        ((1, 4, 5), "multiples of 2 patches"),
        ((0, 4, 4), "at least 1"),
        ((1, 0, 4), "at least 1"),
        ((1, 4, 0), "at least 1"),
        ((1, -4, 4), "at least 1"),
        ((-1, 4, 4), "at least 1"),
    ],
)
def test_an_impossible_grid_is_refused_by_its_place(grid: GridTuple, rule: str) -> None:
    with pytest.raises(ImageError, match=rule) as caught:
        Layout.from_grids(as_grids([(1, 4, 4), grid]), SMALL)
    assert caught.value.code == "grid"
    assert f"grid_thw[1] is {grid}" in str(caught.value)


@pytest.mark.parametrize("budget", [0, 56, 59, 62])
def test_n_rows_that_do_not_fit_are_refused_with_both_numbers(budget: int) -> None:
    with pytest.raises(ImageError, match=rf"n_rows is {budget} for 60 patches") as caught:
        Layout.from_grids([Grid(1, 6, 10)], SMALL, n_rows=budget)
    assert caught.value.code == "too-many-patches"


def test_more_rows_than_int32_can_index_are_refused() -> None:
    message = r"2147483648 patches .* at most 2147483647\. Split the batch"
    with pytest.raises(ImageError, match=message) as caught:
        Layout.from_grids([Grid(1, 2, 2)], SMALL, n_rows=2**31)
    assert caught.value.code == "too-many-patches"


def test_too_many_patches_are_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A grid of 2**20 x 2**20 patches once requested terabytes before the check of its size."""

    def allocates(*_: int) -> None:
        raise MemoryError

    monkeypatch.setattr(layout_module, "_frame", allocates)
    with pytest.raises(ImageError) as caught:
        Layout.from_grids([Grid(1, 2**20, 2**20)], SMALL)
    assert caught.value.code == "too-many-patches"
