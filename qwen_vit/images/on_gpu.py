"""Turn a batch of pictures and patches into patches on a GPU, with one copy of the pixels."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch

from qwen_vit.images.patches import Patches
from qwen_vit.images.picture import PIXEL_BYTES, Picture
from qwen_vit.images.pillow_order import Axis
from qwen_vit.kernels.resize import Cut, Pass, ResizePlan, cut, n_taps, resize

__all__ = ["Passes", "Uploaded", "patches_on_gpu", "plan_passes", "upload"]

STAGED_BYTES = 2**25  # of pinned memory at a time: a full batch of pictures that keep their size
STAGES = 8  # in one call: a picture of 179 million pixels would otherwise pin 0.7 GB for good
ALIGNED_BYTES = 16


def patches_on_gpu(
    parts: Sequence[Patches | Picture], device: torch.device, *, pinned_rows: int
) -> Patches:
    """Join patches in order, after resizing and cutting the pictures among them on the GPU.

    The call does not wait for the GPU. Raises torch.cuda.OutOfMemoryError.
    """
    pictures = [part for part in parts if isinstance(part, Picture)]
    cut_rows = _resize_and_cut(pictures, device)
    grids = tuple(grid for part in parts for grid in part.grids)
    if len(pictures) == len(parts):
        return Patches(cut_rows, grids)
    ready = Patches.cat(
        (part for part in parts if isinstance(part, Patches)), pinned_rows=pinned_rows
    ).pixels.to(device, non_blocking=True)
    begins = {Picture: 0, Patches: 0}
    rows = []
    for part in parts:
        begin = begins[type(part)]
        source = cut_rows if isinstance(part, Picture) else ready
        rows.append(source[begin : begin + part.n_patches])
        begins[type(part)] += part.n_patches
    return Patches(torch.cat(rows), grids)


class _Sized(Protocol):
    """Describe a picture by its sizes, each a width and height in pixels."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def new_size(self) -> tuple[int, int]: ...
    @property
    def passes(self) -> tuple[Axis, ...]: ...


class Passes(NamedTuple):
    """Plan the passes over pictures that follow each other in a buffer."""

    rounds: tuple[list[Pass], ...]  # a picture's second pass is in the second round
    places: list[int]  # of each picture's result, in pixels
    n_pixels: int  # of the buffer, with room for the results of all passes


class Uploaded(NamedTuple):
    """Hold a plan's table and the pictures' pixels on a GPU."""

    table: torch.Tensor  # int64
    pixels: torch.Tensor  # int32


def plan_passes(pictures: Sequence[_Sized]) -> Passes:
    """Plan the passes over pictures."""
    rounds: tuple[list[Pass], list[Pass]] = ([], [])
    places: list[int] = []
    ends = list(accumulate(picture.size[0] * picture.size[1] for picture in pictures))
    room, n_weights = ends[-1], 0
    for picture, end in zip(pictures, ends, strict=True):
        (width, height), new = picture.size, picture.new_size
        source = end - width * height
        for axis, found in zip(picture.passes, rounds, strict=False):
            is_vertical = axis == "vertical"
            old_width, n_in = width, height if is_vertical else width
            n_out = new[is_vertical]
            width, height = (width, n_out) if is_vertical else (n_out, height)
            taps = n_taps(n_in, n_out)
            found.append(
                Pass(
                    source, room, old_width, width, height, n_in, n_out, is_vertical, taps,
                    n_weights,
                )
            )  # fmt: skip
            source = room
            room += width * height
            n_weights += found[-1].n_integers
        places.append(source)
    return Passes(tuple(each for each in rounds if each), places, room)


def upload(
    plan: ResizePlan, blocks: Iterable[memoryview], n_pixels: int, device: torch.device
) -> Uploaded:
    """Copy a plan's table and the pictures' bytes to a GPU, into a buffer for `n_pixels`."""
    table: Any = plan.table
    begin = table.nbytes + -table.nbytes % ALIGNED_BYTES
    buffer = torch.empty(begin + PIXEL_BYTES * n_pixels, dtype=torch.uint8, device=device)
    padding = memoryview(bytes(begin - table.nbytes))
    _copy_staged([memoryview(table).cast("B"), padding, *blocks], buffer)
    return Uploaded(buffer[: table.nbytes].view(torch.int64), buffer[begin:].view(torch.int32))


def _resize_and_cut(pictures: Sequence[Picture], device: torch.device) -> torch.Tensor:
    passes = plan_passes(pictures)
    ends = accumulate(picture.n_patches for picture in pictures)
    plan = ResizePlan.of(
        passes.rounds,
        [
            Cut(place, picture.new_size[0], picture.n_patches, end - picture.n_patches)
            for place, picture, end in zip(passes.places, pictures, ends, strict=True)
        ],
    )
    blocks = [block for picture in pictures for block in picture.blocks]
    table, pixels = upload(plan, blocks, passes.n_pixels, device)
    resize(plan, table, pixels)
    config = pictures[0].config
    return cut(plan, table, pixels, side=config.patch_px, merge=config.merge_size)


def _copy_staged(blocks: Iterable[memoryview], buffer: torch.Tensor) -> None:
    """Copy bytes to the start of a GPU buffer through pinned memory of one size.

    torch reuses the pinned memory after the GPU has read it. torch keeps memory of every size, so
    this function always requests the same size. A memoryview keeps the GIL while it copies, because
    waiting for the GIL again would take longer than a small copy. After STAGES copies, the function
    waits for the oldest copy.
    """
    done = filled = 0
    copies: deque[torch.cuda.Event] = deque()
    staged = room = None
    for block in blocks:
        while len(block):
            if staged is None or room is None:
                staged = torch.empty(
                    STAGED_BYTES, dtype=torch.uint8, device="cpu", pin_memory=buffer.is_cuda
                )
                flat: Any = staged.numpy()
                room = memoryview(flat)
            part = block[: STAGED_BYTES - filled]
            room[filled : filled + len(part)] = part
            filled += len(part)
            block = block[len(part) :]
            if filled == STAGED_BYTES:
                buffer[done : done + filled].copy_(staged, non_blocking=True)
                done, filled, staged = done + filled, 0, None
                if buffer.is_cuda:
                    copies.append(_event_after(buffer))
                    if len(copies) == STAGES:
                        # otherwise torch also creates a context on the first GPU
                        with torch.cuda.device(buffer.device):
                            copies.popleft().synchronize()
    if staged is not None:
        buffer[done : done + filled].copy_(staged[:filled], non_blocking=True)


def _event_after(buffer: torch.Tensor) -> torch.cuda.Event:
    """Return an event after the current work of a GPU's stream."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(buffer.device))
    return event
