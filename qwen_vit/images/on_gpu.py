"""Turn a batch of pictures, frames and patches into patches on a GPU."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from qwen_vit.images.frames import FRAMES_IN_A_STEP, Frames
from qwen_vit.images.patches import LARGE_BYTES, Patches
from qwen_vit.images.picture import PIXEL_BYTES, Picture
from qwen_vit.images.pillow_order import Axis
from qwen_vit.kernels.resize import Cut, Pass, ResizePlan, cut, n_taps, resize

__all__ = ["Passes", "Uploaded", "patches_on_gpu", "plan_passes", "upload"]

STAGED_BYTES = 2**25  # of pinned memory at a time: a full batch of pictures that keep their size
FRAME_BYTES = 2**27  # of the decoded frames that are on the GPU at a time, at least one step
STAGES = 8  # in one call: a picture of 179 million pixels would otherwise pin 0.7 GB for good
ALIGNED_BYTES = 16


def patches_on_gpu(
    parts: Sequence[Patches | Picture | Frames], device: torch.device, *, pinned_rows: int
) -> Patches:
    """Resize and cut pictures and frames on the GPU, and join all patches in order.

    The call does not wait for the GPU, except in an upload of 256 MiB or more. Raises
    torch.cuda.OutOfMemoryError if the GPU has too little free memory.
    """
    pictures = [part for part in parts if isinstance(part, Picture)]
    frames = [part for part in parts if isinstance(part, Frames)]
    patches = [part for part in parts if isinstance(part, Patches)]
    made: dict[type, torch.Tensor] = {}
    if pictures:
        made[Picture] = _resize_and_cut(pictures, device)
    if frames:
        made[Frames] = _resize_and_cut_frames(frames, device)
    if patches:
        joined = Patches.cat(patches, pinned_rows=pinned_rows)
        made[Patches] = joined.pixels.to(device, non_blocking=True)
    grids = tuple(grid for part in parts for grid in part.grids)
    if len(made) == 1:
        [pixels] = made.values()
        return Patches(pixels, grids)
    begins = dict.fromkeys(made, 0)
    rows = []
    for part in parts:
        begin = begins[type(part)]
        rows.append(made[type(part)][begin : begin + part.n_patches])
        begins[type(part)] += part.n_patches
    return Patches(torch.cat(rows), grids)


class _Sized(Protocol):
    """Define the sizes of a picture, (width, height) in pixels, and the axes to resize."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def new_size(self) -> tuple[int, int]: ...
    @property
    def passes(self) -> tuple[Axis, ...]: ...


class Passes(NamedTuple):
    """Plan the passes over pictures that are contiguous in a buffer."""

    rounds: tuple[list[Pass], ...]  # a picture's second pass is in the second round
    places: list[int]  # of each picture's result, in pixels
    n_pixels: int  # of the buffer, with room for the results of all passes


class Uploaded(NamedTuple):
    table: torch.Tensor  # int64
    pixels: torch.Tensor  # int32


def plan_passes(pictures: Sequence[_Sized]) -> Passes:
    rounds: tuple[list[Pass], list[Pass]] = ([], [])
    places: list[int] = []
    ends = list(accumulate(picture.size[0] * picture.size[1] for picture in pictures))
    room, n_weights = ends[-1], 0
    shared: dict[tuple[int, int, int], int] = {}  # the place of each round's weights, by sizes
    for picture, end in zip(pictures, ends, strict=True):
        (width, height), new = picture.size, picture.new_size
        source = end - width * height
        for turn, axis in enumerate(picture.passes):
            is_vertical = axis == "vertical"
            old_width, n_in = width, height if is_vertical else width
            n_out = new[is_vertical]
            width, height = (width, n_out) if is_vertical else (n_out, height)
            taps = n_taps(n_in, n_out)
            place = shared.setdefault((turn, n_in, n_out), n_weights)
            found = Pass(
                source, room, old_width, width, height, n_in, n_out, is_vertical, taps, place
            )
            rounds[turn].append(found)
            source = room
            room += width * height
            if place == n_weights:
                n_weights += found.n_integers
        places.append(source)
    return Passes(tuple(each for each in rounds if each), places, room)


def upload(
    plan: ResizePlan, blocks: Iterable[memoryview], n_pixels: int, device: torch.device
) -> Uploaded:
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


def _resize_and_cut_frames(videos: Sequence[Frames], device: torch.device) -> torch.Tensor:
    config = videos[0].config
    n_rows = sum(video.n_patches for video in videos)
    out = torch.empty((n_rows, videos[0].n_values), dtype=torch.uint8, device=device)
    begin = 0
    for video in videos:
        width, height = video.size
        most = max(1, FRAME_BYTES // (PIXEL_BYTES * width * height * FRAMES_IN_A_STEP))
        for group in video.groups(most):
            passes = plan_passes([group] * len(group.blocks))
            places = passes.places + passes.places[-1:]  # an odd count repeats the last frame
            in_step = group.grids[0].h * group.grids[0].w
            cuts = [
                Cut(places[at], group.new_size[0], in_step, step * in_step, places[at + 1])
                for step, at in enumerate(range(0, len(group.blocks), FRAMES_IN_A_STEP))
            ]
            plan = ResizePlan.of(passes.rounds, cuts)
            table, pixels = upload(plan, group.blocks, passes.n_pixels, device)
            resize(plan, table, pixels)
            cut(
                plan, table, pixels, side=config.patch_px, merge=config.merge_size,
                frames=FRAMES_IN_A_STEP, out=out[begin : begin + group.n_patches],
            )  # fmt: skip
            begin += group.n_patches
    return out


def _copy_staged(blocks: Iterable[memoryview], buffer: torch.Tensor) -> None:
    """Copy bytes to the start of a GPU buffer through pinned blocks of equal size.

    torch reuses a block of pinned memory after the GPU has read it, but does not free it, so this
    function always requests the same size. A memoryview copies small blocks and keeps the GIL,
    because waiting for the GIL again would take longer than the copy. NumPy copies large blocks and
    releases the GIL, so that other threads can decode.
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
            if len(part) < LARGE_BYTES:
                room[filled : filled + len(part)] = part
            else:
                flat[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
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
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(buffer.device))
    return event
