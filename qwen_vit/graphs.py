"""CUDA graphs per bucket of patches: one replay instead of about 170 launches.

A graph is captured for a number of rows, not for a shape of image. Its indices live in one buffer
that every call fills before the replay, its padding rows attend among themselves, and its padding
tiles are empty: so one graph serves every mix of images that fits its bucket. The model knows
nothing of this. An image's embedding has the same bits as without graphs, because no row depends on
another image's rows, nor on how many there are.
"""

import logging
import math
import threading
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_vit.config import Grid
from qwen_vit.layout import Layout
from qwen_vit.model import ROTARY_POSITIONS, LayerTaps, Output, VisionTower, plan_layout

__all__ = ["MAX_BUCKET", "MIN_STEP", "GraphRunner", "bucket_for", "run_tower"]

logger = logging.getLogger("qwen_vit")

MAX_BUCKET = 32_768  # patches; above it the launches are a small share of the time
MIN_STEP = 256  # patches
CAPTURE_COST_ROWS = 16_384  # what a GPU computes while a graph is captured: about 40 ms on an H200
TILE_HEADROOM = (
    2  # times the tiles that whole windows and frames need; smaller pieces run without a graph
)


def bucket_for(n_patches: int) -> int | None:
    """The rows of the graph that serves this many patches, or None if none does.

    >>> bucket_for(1000), bucket_for(4097), bucket_for(9216), bucket_for(40_000)
    (1024, 4352, 9216, None)
    """
    if not 0 < n_patches <= MAX_BUCKET:
        return None
    # steps of a 16th of the power of two below, so 6 % padding at most above 4,096
    step = max(MIN_STEP, 1 << max(0, (n_patches - 1).bit_length() - 5))
    return -(-n_patches // step) * step


@dataclass(frozen=True, slots=True, eq=False)
class CapturedGraph:
    graph: torch.cuda.CUDAGraph
    patches: Tensor  # (rows, P / 2) uint8 or (rows, P): the first rows of what all graphs read
    indices: Tensor  # every integer of the layout, one after the other
    angles: Any  # the rotary tables that the graph reads, kept while it may
    merged: Tensor  # (rows / merge unit, O): the first rows of what all graphs write


class GraphRunner:
    """Runs a tower by graph where one fits; every graph of a tower shares one memory pool."""

    def __init__(self, tower: VisionTower, device: torch.device) -> None:
        self._tower = tower
        self._device = device
        self._captured: dict[tuple[int, torch.dtype], CapturedGraph] = {}
        # every graph reads the first rows of one buffer: one replay runs at a time
        self._patches: dict[torch.dtype, Tensor] = {}
        self._merged_rows: Tensor | None = None  # and writes the first rows of another
        self._pool: Any = None  # torch's handle of it
        # one stream for every capture: the pool's memory is shared within a stream only
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()  # after a replay and the copy of what it gave
        self._lock = threading.Lock()
        self._rows_saved: Counter[int] = Counter()  # rows, by bucket, that its own graph would have

    def __reduce__(self) -> Any:  # a copy, or another process, captures graphs of its own
        return GraphRunner, (self._tower, self._device)

    def graph_bucket(self, patches: Tensor) -> int | None:
        """The rows of the graph for these patches, captured or to be, or None if none serves.

        `bucket_for`'s, unless a larger graph is there: that one serves until the rows which a
        smaller one would have spared come to what its capture costs. Sizes that hardly ever come,
        such as what is left over when images are packed, are not worth a graph of their own.
        """
        own = bucket_for(len(patches))
        with self._lock:
            captured = {rows for rows, dtype in self._captured if dtype == patches.dtype}
            if own is None or own in captured:
                return own
            larger = min((rows for rows in captured if rows > own), default=None)
            if larger is None:
                return own
            self._rows_saved[own] += larger - own
            return larger if self._rows_saved[own] <= CAPTURE_COST_ROWS else own

    def run(self, patches: Tensor, layout: Layout) -> Tensor | None:
        """The merged tokens (M, O) of `patches` as the tower takes them, or None if no graph fits.

        `layout` lies on the host, padded to `graph_bucket(patches)` rows. Nothing waits for the
        GPU; the first call of that many rows captures their graph.
        """
        static = pad_to_graph(layout)
        if static is None:
            return None
        indices = static.flat(pinned=True)
        with (
            self._lock,
            torch.cuda.device(self._device),
            torch.inference_mode(False),  # what is kept here outlives the caller's mode
            torch.no_grad(),
        ):
            current = torch.cuda.current_stream()
            current.wait_event(self._done)  # the lock orders threads, this orders their streams
            if not self._has_room_for(patches):
                return None
            try:
                merged = self._replay_or_capture(static, indices, patches)
                # the next replay overwrites it: the caller gets its own
                return merged[: len(layout.merged_order)].clone()
            finally:  # after an error as well: the next call writes what this one may still read
                self._done.record()

    def _replay_or_capture(self, static: Layout, indices: Tensor, patches: Tensor) -> Tensor:
        """What a replay gives, in memory that the next one writes; or what a capture saw."""
        kind = static.n_rows, patches.dtype
        captured = self._captured.get(kind)
        if captured is not None:
            captured.patches[: len(patches)].copy_(patches, non_blocking=True)
            captured.indices.copy_(indices, non_blocking=True)
            captured.graph.replay()
            return captured.merged
        captured, answer = self._capture_and_run(static, indices, patches)
        if captured is None:
            logger.warning(
                "out of memory on %s: no graph of %d patches", self._device, static.n_rows
            )
            torch.cuda.empty_cache()  # which nobody can while one is captured
        else:
            self._captured[kind] = captured
        return answer

    def _has_room_for(self, patches: Tensor) -> bool:
        """Whether the buffer that all graphs of a dtype read is there, or could be made."""
        if patches.dtype not in self._patches:
            shape = (MAX_BUCKET, patches.shape[1])
            try:
                self._patches[patches.dtype] = patches.new_zeros(shape, device=self._device)
            except torch.cuda.OutOfMemoryError:
                logger.warning("out of memory on %s: no graphs of %s", self._device, patches.dtype)
                return False
        return True

    def _capture_and_run(
        self, static: Layout, indices: Tensor, patches: Tensor
    ) -> tuple[CapturedGraph | None, Tensor]:
        """A graph, and the tower's answer without it: which compiles what is not compiled yet.

        While the GPU works at that answer, the host records; no graph, if that takes more memory
        than there is.
        """
        filled = self._patches[patches.dtype][: static.n_rows]
        filled[: len(patches)].copy_(patches, non_blocking=True)
        on_device = indices.to(self._device, copy=True, non_blocking=True)
        layout = static.viewing(on_device)
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                answer = self._tower(filled, layout)
                merged = self._capture(graph, filled, layout, answer)
        finally:  # after an error as well: the memory is freed then, and the GPU may still read it
            current.wait_stream(self._stream)
        answer.record_stream(current)
        if merged is None:
            return None, answer
        self._pool = graph.pool()
        return CapturedGraph(graph, filled, on_device, self._tower.angles, merged), answer

    def _capture(
        self, graph: torch.cuda.CUDAGraph, pixels: Tensor, layout: Layout, like: Tensor
    ) -> Tensor | None:
        """What the graph writes, of the shape of `like`; None if memory is short."""
        if self._merged_rows is None:
            try:
                n_rows = MAX_BUCKET * len(like) // layout.n_rows
                self._merged_rows = like.new_empty(n_rows, *like.shape[1:])
            except torch.cuda.OutOfMemoryError:
                return None
        merged = self._merged_rows[: len(like)]
        # Not torch.cuda.graph, which waits for the GPU and empties the allocator's cache.
        # thread_local: CUDA calls in other threads must not invalidate the capture
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            # a copy, 0.1 % of the time, so that each graph gives all its memory to the next one:
            # outputs of their own took 1.3 GB for all buckets of the 7B tower
            return merged.copy_(self._tower(pixels, layout))
        except torch.cuda.OutOfMemoryError:  # though there was enough for the answer
            return None
        finally:
            graph.capture_end()

    def capture_buckets(self, dtype: torch.dtype, width: int, largest: int) -> None:
        """Compile every kernel and capture the graph of every bucket, ahead of the first request.

        Args:
            dtype: of the patches that `run` will get: uint8 or a float.
            width: of a patch: P / 2 for uint8, P for a float.
            largest: the most patches that a call will bring.
        """
        largest = bucket_for(min(largest, MAX_BUCKET)) or MIN_STEP
        buckets = [bucket_for(1) or MIN_STEP]
        while buckets[-1] < largest:
            buckets.append(bucket_for(buckets[-1] + 1) or largest)
        side = math.isqrt(MIN_STEP)
        for rows in reversed(buckets):  # the largest first: its memory serves all others
            grids = (Grid(rows // MIN_STEP, side, side),)
            patches = torch.zeros(rows, width, dtype=dtype, device=self._device)
            tower_dtype = self._tower.merger.fc1.weight.dtype
            self.run(patches, _layout(grids, self._tower.config, self._device, tower_dtype, rows))


def run_tower(
    tower: VisionTower,
    graphs: GraphRunner | None,
    patches: Tensor,
    grids: tuple[Grid, ...],
    device: torch.device,
    dtype: torch.dtype,
    output: Output,
    taps: LayerTaps | None = None,
) -> Tensor:
    """Run a tower on uint8 or float rows in grid order, by graph where one fits.

    Graphs serve merged output without taps; the bits are the same with and without.
    """
    config = tower.config
    if device.type == "cuda" and patches.device.type == "cpu":
        patches = patches.pin_memory()  # itself, where it is pinned already
    has_whole_units = MIN_STEP % config.merge_unit == 0
    if graphs is not None and output == "merged" and taps is None and has_whole_units:
        n_rows = graphs.graph_bucket(patches)
        if n_rows is not None:
            merged = graphs.run(patches, _layout(grids, config, device, dtype, n_rows))
            if merged is not None:
                return merged
    layout = _layout(grids, config, device, dtype)
    with torch.no_grad():
        on_device = patches.to(device, non_blocking=True)
        return tower(on_device, layout.to(device), output, taps)  # type: ignore[no-any-return]


# computed from integers, so that repeated sizes cost nothing
_layout = lru_cache(maxsize=32)(plan_layout)


def pad_to_graph(layout: Layout) -> Layout | None:
    """The layout with every tensor at the size that its bucket's graph has; None if one is larger.

    Spare tiles are rows of zeros; padding merged tokens fetch the first one and are never read.
    """
    rows, unit = layout.n_rows, layout.n_patches // len(layout.merged_order)
    window_tiles = _zero_padded(
        layout.windows.tiles, TILE_HEADROOM * rows // layout.window_tiling.rows
    )
    frame_tiles = _zero_padded(layout.frames.tiles, TILE_HEADROOM * rows // layout.full_tiling.rows)
    merged_order = _zero_padded(layout.merged_order, rows // unit)
    if window_tiles is None or frame_tiles is None or merged_order is None:
        return None
    if layout.n_positions > ROTARY_POSITIONS:
        return None
    none = layout.merged_order[:0]
    return replace(
        layout,
        merged_order=merged_order,
        raster_order=none,
        windows=replace(layout.windows, cu_seqlens=none, tiles=window_tiles),
        frames=replace(layout.frames, cu_seqlens=none, tiles=frame_tiles),
    )


def _zero_padded(tensor: Tensor, length: int) -> Tensor | None:
    if len(tensor) > length:
        return None
    filled = np.zeros((length, *tensor.shape[1:]), dtype=np.int32)
    filled[: len(tensor)] = tensor.numpy()
    return torch.from_numpy(filled)
