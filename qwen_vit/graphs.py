"""Replay a CUDA graph per bucket of patches, with one launch instead of about 170.

A graph is captured for a number of rows, not for image shapes. Every call fills one buffer of
indices before the replay. Padding rows attend to each other, and padding tiles are empty, so one
graph handles every mix of images that fits its bucket. The model contains no code for graphs. An
image's embedding has the same bits with and without graphs, because no row depends on other images'
rows or on the number of rows.
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

MAX_BUCKET = 32_768  # patches; above it the launches take a small share of the time
MIN_STEP = 256  # patches
CAPTURE_COST_ROWS = 16_384  # the GPU's work during a capture: about 40 ms on an H200
# a graph has room for twice the tiles of whole windows and frames; many small pieces do not fit it
TILE_HEADROOM = 2


def bucket_for(n_patches: int) -> int | None:
    """Return the number of rows of the graph for this many patches, or None if no graph fits.

    >>> bucket_for(1000), bucket_for(4097), bucket_for(9216), bucket_for(40_000)
    (1024, 4352, 9216, None)
    """
    if not 0 < n_patches <= MAX_BUCKET:
        return None
    # steps of a 16th of the power of two below: at most 6.25 % padding above 4,096
    step = max(MIN_STEP, 1 << max(0, (n_patches - 1).bit_length() - 5))
    return -(-n_patches // step) * step


@dataclass(frozen=True, slots=True, eq=False)
class CapturedGraph:
    graph: torch.cuda.CUDAGraph
    patches: Tensor  # (rows, P / 2) uint8 or (rows, P): the first rows of the graphs' input
    indices: Tensor  # every integer of the layout, in one buffer
    angles: Any  # the rotary tables that the graph reads, kept while the graph may read them
    merged: Tensor  # (rows / merge unit, O): the first rows of the graphs' output


class GraphRunner:
    """Run a tower with a graph if a graph fits. All graphs of a tower share one memory pool."""

    def __init__(self, tower: VisionTower, device: torch.device) -> None:
        self._tower = tower
        self._device = device
        self._captured: dict[tuple[int, torch.dtype], CapturedGraph] = {}
        # every graph reads the first rows of one buffer, because one replay runs at a time
        self._patches: dict[torch.dtype, Tensor] = {}
        self._merged_rows: Tensor | None = None  # and writes the first rows of another buffer
        self._pool: Any = None  # torch's handle of the pool
        # one stream for every capture, because the pool shares memory only within a stream
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()  # after a replay and the copy of its result
        self._lock = threading.Lock()
        # rows that a separate graph would have saved, by bucket
        self._rows_saved: Counter[int] = Counter()

    def __reduce__(self) -> Any:  # a copy or another process captures new graphs
        return GraphRunner, (self._tower, self._device)

    def graph_bucket(self, patches: Tensor) -> int | None:
        """Return the number of rows of the graph for these patches, captured or not, or None if
        none fits.

        `bucket_for` chooses the number, unless only a larger graph exists. The larger graph runs
        until its extra padding rows, summed over all calls, exceed CAPTURE_COST_ROWS. This rule
        avoids captures for rare sizes, such as the last batch's size.
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
        """Return the merged tokens (M, O) of `patches`, or None if no graph fits or memory is too
        small for the input buffer of the graphs.

        `layout` is on the host, padded to `graph_bucket(patches)` rows. A replay does not wait for
        the GPU. The first call with that many rows captures the graph.
        """
        padded = _graph_indices(layout)
        if padded is None:
            return None
        static, indices = padded
        with (
            self._lock,
            torch.cuda.device(self._device),
            torch.inference_mode(False),  # the tensors kept here outlive the caller's mode
            torch.no_grad(),
        ):
            current = torch.cuda.current_stream()
            # the lock orders threads, and this event orders their streams
            current.wait_event(self._done)
            if not self._has_room_for(patches):
                return None
            try:
                merged = self._replay_or_capture(static, indices, patches)
                # the next replay overwrites the result, so the caller gets a copy
                return merged[: len(layout.merged_order)].clone()
            # also after an error: the next call writes memory that this one may still read
            finally:
                self._done.record()

    def _replay_or_capture(self, static: Layout, indices: Tensor, patches: Tensor) -> Tensor:
        """Return the result of a replay, which the next replay overwrites, or of a capture."""
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
            torch.cuda.empty_cache()  # no thread may do so during a capture
        else:
            self._captured[kind] = captured
        return answer

    def _has_room_for(self, patches: Tensor) -> bool:
        """Allocate the input buffer of the dtype's graphs, and return whether memory is enough."""
        if patches.dtype not in self._patches:
            shape = (MAX_BUCKET, patches.shape[1])
            try:
                self._patches[patches.dtype] = patches.new_zeros(shape, device=self._device)
            except torch.cuda.OutOfMemoryError:
                logger.warning(
                    "out of memory on %s: no graphs for patches in %s", self._device, patches.dtype
                )
                return False
        return True

    def _capture_and_run(
        self, static: Layout, indices: Tensor, patches: Tensor
    ) -> tuple[CapturedGraph | None, Tensor]:
        """Return a graph, and the tower's result computed without it, which compiles missing
        kernels. The host captures the graph while the GPU computes the result. If the capture runs
        out of memory, the method returns None instead of a graph.
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
        finally:  # also after an error, which frees memory that the GPU may still read
            current.wait_stream(self._stream)
        answer.record_stream(current)
        if merged is None:
            return None, answer
        self._pool = graph.pool()
        return CapturedGraph(graph, filled, on_device, self._tower.angles, merged), answer

    def _capture(
        self, graph: torch.cuda.CUDAGraph, pixels: Tensor, layout: Layout, like: Tensor
    ) -> Tensor | None:
        """Capture the tower. Return an output with the shape of `like`, or None if memory runs
        out."""
        if self._merged_rows is None:
            try:
                n_rows = MAX_BUCKET * len(like) // layout.n_rows
                self._merged_rows = like.new_empty(n_rows, *like.shape[1:])
            except torch.cuda.OutOfMemoryError:
                return None
        merged = self._merged_rows[: len(like)]
        # torch.cuda.graph would wait for the GPU and empty the allocator's cache.
        # thread_local: CUDA calls in other threads must not invalidate the capture
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            # this copy takes little time, and gives all the graph's memory to the next graph
            return merged.copy_(self._tower(pixels, layout))
        except torch.cuda.OutOfMemoryError:  # although memory was enough for the result
            return None
        finally:
            graph.capture_end()

    def capture_buckets(self, dtype: torch.dtype, width: int, largest: int) -> None:
        """Compile the kernels and capture the graphs of all buckets up to `largest` patches.

        Engines call this before the first request.

        Args:
            dtype: dtype of the patches that `run` will receive: uint8 or a float.
            width: values per patch: P / 2 for uint8, P for a float.
            largest: the largest number of patches per call.
        """
        largest = bucket_for(min(largest, MAX_BUCKET)) or MIN_STEP
        buckets = [bucket_for(1) or MIN_STEP]
        while buckets[-1] < largest:
            buckets.append(bucket_for(buckets[-1] + 1) or largest)
        side = math.isqrt(MIN_STEP)
        for rows in reversed(buckets):  # the largest first, because all others reuse its memory
            grids = (Grid(rows // MIN_STEP, side, side),)
            patches = torch.zeros(rows, width, dtype=dtype, device=self._device)
            tower_dtype = self._tower.merger.fc1.weight.dtype
            self.run(patches, _layout(grids, self._tower.config, self._device, tower_dtype, rows))


def run_tower(
    tower: VisionTower,
    graphs: GraphRunner | None,
    patches: Tensor,
    grids: tuple[Grid, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    output: Output,
    taps: LayerTaps | None = None,
) -> Tensor:
    """Run a tower on uint8 or float rows in grid order, with a graph if a graph fits.

    Only merged output without taps uses graphs. The bits are the same with and without graphs.
    """
    config = tower.config
    if device.type == "cuda" and patches.device.type == "cpu":
        patches = patches.pin_memory()  # makes no copy if it is already pinned
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


# images of the same sizes use the same layout again
_layout = lru_cache(maxsize=32)(plan_layout)


def pad_to_graph(layout: Layout) -> Layout | None:
    """Return the layout with its bucket's tensor sizes, or None if the layout does not fit them.

    Padding tiles are rows of zeros. Padding tokens copy the first token, and no code reads them.
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


@lru_cache(maxsize=32)  # a layout is equal only to itself
def _graph_indices(layout: Layout) -> tuple[Layout, Tensor] | None:
    """Return the padded layout and its indices in pinned memory, which no code may change.

    Return None if no graph fits the layout.
    """
    static = pad_to_graph(layout)
    return None if static is None else (static, static.flat(pinned=True))


def _zero_padded(tensor: Tensor, length: int) -> Tensor | None:
    if len(tensor) > length:
        return None
    filled = np.zeros((length, *tensor.shape[1:]), dtype=np.int32)
    filled[: len(tensor)] = tensor.numpy()
    return torch.from_numpy(filled)
