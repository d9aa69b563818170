"""Compare a layout with transformers' own functions."""

from collections.abc import Sequence

import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from qwen_vit.layout import Layout
from tests.support.towers import GridTuple


def assert_equals_transformers(
    layout: Layout, grids: Sequence[GridTuple], window_px: int, merge: int = 2
) -> None:
    unit = merge * merge
    grid_thw = torch.tensor(grids)
    order, cu_windows = get_vision_window_index(grid_thw, merge, window_px, 14)
    positions = get_vision_position_ids(grid_thw, merge)
    in_window_order = positions.view(-1, unit, 2)[order].view(-1, 2)
    expected_index = (order[:, None] * unit + torch.arange(unit)).flatten()
    assert torch.equal(layout.grid_index.long(), expected_index)
    assert torch.equal(layout.merged_order.long(), order.argsort())
    assert torch.equal(layout.positions.long(), in_window_order)
    assert torch.equal(layout.windows.cu_seqlens, cu_windows)
    assert torch.equal(layout.frames.cu_seqlens, get_vision_cu_seqlens(grid_thw))
