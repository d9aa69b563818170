"""Compute the layout of a batch: token orders, attention segments, positions and kernel tiles.

The host computes a layout from the grids and the config, never from pixels or weights. A layout
contains every index that depends on the data, and the model only applies the layout. One code path
therefore handles a single image, any mix of images, several frames, and a fixed token budget.

The package uses three token orders:

    raster  patches row by row
    grid    the patches of a merge unit (2 x 2) together; units row by row: what processors emit
    window  merge units grouped by attention window: what the blocks compute on

Source: transformers' `get_vision_window_index` and `get_vision_cu_seqlens`, which pad the unit grid
    to whole windows, permute, and drop the padding. Sorting the units by window gives the same
    order without padding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from qwen_vit.config import Grid, VisionConfig
from qwen_vit.errors import ImageError

__all__ = ["PADDING_ROWS", "Layout", "SegmentTiling", "Segments", "check_grids", "tile_table"]

Integers = npt.NDArray[np.int32]

PADDING_ROWS = 64  # padding rows attend to each other in groups of at most this size
ALIGNED_INTEGERS = 4  # 16 bytes of int32
MAX_ROWS = 2**31 - 1  # rows are indexed in int32; kernels widen to int64 before multiplying


@dataclass(frozen=True, slots=True)
class SegmentTiling:
    """Choose how a kernel cuts segments into tiles.

    `rows` is the largest number of query rows of one tile. All rows of a tile belong to one
    segment.
    """

    rows: int


class _Frame(NamedTuple):
    """Describe one frame of a grid, in the frame's own window order."""

    unit_order: Integers  # [h * w / 4] grid-order merge unit at each window-order place
    window_rows: Integers  # [windows] patches in each window
    row_and_column: Integers  # [h * w, 2] row and column of each patch, in window order


@lru_cache(maxsize=256)
def _frame(h: int, w: int, merge: int, window_units: int) -> _Frame:
    unit_h, unit_w = h // merge, w // merge
    unit_row, unit_column = np.divmod(np.arange(unit_h * unit_w, dtype=np.int32), unit_w)
    windows_per_row = -(-unit_w // window_units)
    window = unit_row // window_units * windows_per_row + unit_column // window_units
    unit_order = np.argsort(window, kind="stable").astype(np.int32)
    inner_row, inner_column = np.divmod(np.arange(merge * merge, dtype=np.int32), merge)
    row = unit_row[unit_order, None] * merge + inner_row
    column = unit_column[unit_order, None] * merge + inner_column
    return _Frame(
        unit_order,
        np.bincount(window).astype(np.int32) * (merge * merge),
        np.stack([row.ravel(), column.ravel()], axis=1),
    )


def check_grids(grids: Iterable[Grid], config: VisionConfig, image: str = "") -> None:
    """Reject a grid that no image can have. Errors name `image`, if given."""
    merge = config.spatial_merge_size
    for index, grid in enumerate(grids):
        if min(grid.t, grid.h, grid.w) < 1:
            expected = "every number to be at least 1"
        elif grid.h % merge or grid.w % merge:
            expected = f"height and width to be multiples of {merge} patches"
        else:
            continue
        raise ImageError(
            f"grid_thw[{index}] is ({grid.t}, {grid.h}, {grid.w})",
            name=image,
            expected=expected,
            remedy="pass the grid that the processor returned with these pixels",
            code="grid",
        )


def tile_table(lengths: Integers, tiling: SegmentTiling) -> Integers:
    """Cut consecutive segments into kernel tiles: rows of (q_start, q_end, k_start, k_end).

    >>> tile_table(np.array([100, 40], np.int32), SegmentTiling(rows=64))
    array([[  0,  64,   0, 100],
           [ 64, 100,   0, 100],
           [100, 140, 100, 140]], dtype=int32)

    Tiles with the longest key range come first, so that the GPU runs short tiles last.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    counts = -(-lengths // tiling.rows)
    segment = np.repeat(np.arange(len(lengths)), counts)
    index_in_segment = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    q_start = starts[segment] + index_in_segment * tiling.rows
    q_end = np.minimum(q_start + tiling.rows, ends[segment])
    table = np.stack([q_start, q_end, starts[segment], ends[segment]], axis=1)
    return table[np.argsort(-lengths[segment], kind="stable")].astype(np.int32)


@dataclass(frozen=True, slots=True)
class Segments:
    """Describe runs of rows that attend to each other, and the tiles that cover them."""

    cu_seqlens: torch.Tensor  # (S + 1,) int32: segment s is rows cu_seqlens[s] : cu_seqlens[s + 1]
    tiles: torch.Tensor  # (tiles, 4) int32: q_start, q_end, k_start, k_end


@dataclass(frozen=True, slots=True)
class Layout:
    """Hold every data-dependent index of one forward pass.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> layout = Layout.from_grids([Grid(1, 6, 10)], config)
    >>> layout.n_patches, layout.windows.cu_seqlens.tolist()
    (60, [0, 48, 60])

    Shapes: N patches, `n_rows` >= N rows including padding to a token budget, M merged tokens.
    """

    grids: tuple[Grid, ...]
    n_patches: int  # N
    n_rows: int
    window_tiling: SegmentTiling
    full_tiling: SegmentTiling
    grid_index: torch.Tensor  # (n_rows,) int32: the grid-order patch of each window-order row
    positions: torch.Tensor  # (n_rows, 2) int32: patch row and column of each window-order row
    merged_order: torch.Tensor  # (M,) int32: the window-order unit of each row-major merged token
    raster_order: torch.Tensor  # (N,) int32: the window-order row of each raster-order patch
    windows: Segments  # the segments of a window block
    frames: Segments  # the segments of a full-attention block: one frame, never a whole clip

    @classmethod
    def from_grids(
        cls,
        grids: Sequence[Grid],
        config: VisionConfig,
        *,
        window_tiling: SegmentTiling = SegmentTiling(rows=64),
        full_tiling: SegmentTiling = SegmentTiling(rows=128),
        n_rows: int | None = None,
    ) -> "Layout":
        check_grids(grids, config)
        merge, unit = config.spatial_merge_size, config.merge_unit
        n_patches = sum(grid.n_patches for grid in grids)
        total = n_patches if n_rows is None else n_rows
        _check_budget(n_patches, total, unit)
        frame_sizes = [(grid.h, grid.w) for grid in grids for _ in range(grid.t)]
        frame_rows = np.array([h * w for h, w in frame_sizes], dtype=np.int64)
        parts = [_frame(h, w, merge, config.window_units) for h, w in frame_sizes]
        padding_rows = _padding_rows(total - n_patches)

        unit_starts = np.repeat(
            (np.cumsum(frame_rows) - frame_rows) // unit, frame_rows // unit
        ).astype(np.int32)
        unit_order = _concatenate([part.unit_order for part in parts]) + unit_starts
        merged_order = np.empty_like(unit_order)
        merged_order[unit_order] = np.arange(len(unit_order), dtype=np.int32)

        positions = np.zeros((total, 2), dtype=np.int32)
        positions[:n_patches] = _concatenate([part.row_and_column for part in parts]).reshape(-1, 2)
        grid_index = np.zeros(total, dtype=np.int32)  # a padding row repeats the first patch
        grid_index[:n_patches] = (
            unit_order[:, None] * unit + np.arange(unit, dtype=np.int32)
        ).ravel()

        widths = np.array([w for _, w in frame_sizes], dtype=np.int64)
        raster = (
            np.repeat(np.cumsum(frame_rows) - frame_rows, frame_rows)
            + positions[:n_patches, 0] * np.repeat(widths, frame_rows)
            + positions[:n_patches, 1]
        )
        raster_order = np.empty(n_patches, dtype=np.int32)
        raster_order[raster] = np.arange(n_patches, dtype=np.int32)

        window_rows = _concatenate([part.window_rows for part in parts])
        return cls(
            grids=tuple(grids),
            n_patches=n_patches,
            n_rows=total,
            window_tiling=window_tiling,
            full_tiling=full_tiling,
            grid_index=torch.from_numpy(grid_index),
            positions=torch.from_numpy(positions),
            merged_order=torch.from_numpy(merged_order),
            raster_order=torch.from_numpy(raster_order),
            windows=_segments(np.concatenate([window_rows, padding_rows]), window_tiling),
            frames=_segments(
                np.concatenate([frame_rows.astype(np.int32), padding_rows]), full_tiling
            ),
        )

    @property
    def n_positions(self) -> int:
        """Return the largest row or column plus one: the number of positions that need angles."""
        return max((max(grid.h, grid.w) for grid in self.grids), default=1)

    def to(self, device: torch.device) -> "Layout":
        """Move a host layout to a device in one copy.

        For a GPU, the method pins the host's buffer, so that the copy does not wait for the GPU.
        """
        flat = self.flat(pinned=device.type == "cuda")
        return self.viewing(flat.to(device, non_blocking=True))

    def flat(self, *, pinned: bool = False) -> torch.Tensor:
        """Return every tensor in one buffer. Each tensor begins at a multiple of 16 bytes.

        For pointers that are not aligned to 16 bytes, Triton would compile a second kernel.
        """
        tensors = self.tensors()
        lengths = [_aligned(tensor.numel()) for tensor in tensors]
        flat = torch.empty(sum(lengths), dtype=torch.int32, device="cpu", pin_memory=pinned)
        # use NumPy: torch's threads would wait for cores that decode images
        rest = flat.numpy()
        for tensor, length in zip(tensors, lengths, strict=True):
            part, rest = rest[:length], rest[length:]
            part[: tensor.numel()] = tensor.numpy().reshape(-1)
        return flat

    def viewing(self, flat: torch.Tensor) -> "Layout":
        """Return the same layout with tensors that are views of a buffer from `flat()`."""
        old = self.tensors()
        parts = flat.split([_aligned(tensor.numel()) for tensor in old])
        new = [
            part[: tensor.numel()].view(tensor.shape)
            for part, tensor in zip(parts, old, strict=True)
        ]
        return replace(
            self,
            grid_index=new[0],
            positions=new[1],
            merged_order=new[2],
            raster_order=new[3],
            windows=Segments(*new[4:6]),
            frames=Segments(*new[6:8]),
        )

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor of the layout, in a fixed order."""
        orders = [self.grid_index, self.positions, self.merged_order, self.raster_order]
        segments = [
            tensor
            for part in (self.windows, self.frames)
            for tensor in (part.cu_seqlens, part.tiles)
        ]
        return orders + segments


def _check_budget(n_patches: int, total: int, unit: int) -> None:
    if total > MAX_ROWS:
        raise ImageError(
            f"{total} patches in one call",
            expected=f"at most {MAX_ROWS}",
            remedy="split the batch",
            code="too-many-patches",
        )
    if total < n_patches or (total - n_patches) % unit:
        raise ImageError(
            f"n_rows is {total} for {n_patches} patches",
            expected=f"at least {n_patches}, with a multiple of {unit} padding rows",
            code="too-many-patches",
        )


def _padding_rows(n_rows: int) -> Integers:
    lengths = np.full(-(-n_rows // PADDING_ROWS), PADDING_ROWS, dtype=np.int32)
    if n_rows % PADDING_ROWS:
        lengths[-1] = n_rows % PADDING_ROWS
    return lengths


def _aligned(length: int) -> int:
    return length + -length % ALIGNED_INTEGERS


def _concatenate(arrays: list[Integers]) -> Integers:
    # np.concatenate would release the GIL to threads that decode images
    memories: list[Any] = list(arrays)
    return np.frombuffer(b"".join(memories), dtype=np.int32)


def _segments(lengths: Integers, tiling: SegmentTiling) -> Segments:
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return Segments(torch.from_numpy(cu_seqlens), torch.from_numpy(tile_table(lengths, tiling)))
