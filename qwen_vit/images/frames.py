"""Hold decoded frames of a video for the GPU, or resize them and cut frame pairs into patches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.config import Grid, ImageConfig
from qwen_vit.images.patches import CHANNELS, Patches
from qwen_vit.images.picture import PIXEL_BYTES, memory_of
from qwen_vit.images.pillow_order import Axis, passes

__all__ = ["FRAMES_IN_A_STEP", "Decoded", "FrameMemory", "FrameRows", "Frames", "FramesForGpu"]

FRAMES_IN_A_STEP = 2  # temporal_patch_size: one step of the grid's t
FrameMemory: TypeAlias = tuple[memoryview, object]  # a frame's bytes, and their owner


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Hold the decoded frames of some time steps, and their grid after resizing.

    >>> pixels = bytes(4 * 60 * 90)  # red, green, blue and an unused byte of each pixel
    >>> config = ImageConfig.from_json({})
    >>> frames = Frames.of([(memoryview(pixels), pixels)] * 3, (90, 60), (84, 56), config)
    >>> frames.grids, frames.n_patches, frames.n_values, frames.n_bytes
    ((Grid(t=2, h=4, w=6),), 48, 1176, 64800)

    `size` and `new_size` are the width and height in pixels, before and after resizing. `blocks`
    are the bytes of each frame's pixels, row by row, and stay valid while this object exists. If
    the number of frames is odd, the last frame counts twice.
    """

    blocks: tuple[memoryview, ...]
    size: tuple[int, int]
    new_size: tuple[int, int]
    config: ImageConfig
    grids: tuple[Grid]
    name: str | None
    _owners: tuple[object, ...]  # of the blocks' memory

    @classmethod
    def of(
        cls, frames: list[FrameMemory], size: tuple[int, int], new_size: tuple[int, int],
        config: ImageConfig, name: str | None = None,
    ) -> "Frames":  # fmt: skip
        """Describe frames of one size. The caller must not change the frames afterwards."""
        blocks, owners = tuple(block for block, _ in frames), tuple(owner for _, owner in frames)
        t, px = -(-len(frames) // FRAMES_IN_A_STEP), config.patch_px
        grid = Grid(t, new_size[1] // px, new_size[0] // px)
        return cls(blocks, size, new_size, config, (grid,), name, owners)

    @property
    def n_patches(self) -> int:
        return self.grids[0].n_patches

    @property
    def n_values(self) -> int:
        """Return the number of values in a patch of two frames."""
        return CHANNELS * FRAMES_IN_A_STEP * self.config.patch_px**2

    @property
    def n_bytes(self) -> int:
        return PIXEL_BYTES * self.size[0] * self.size[1] * len(self.blocks)

    @property
    def passes(self) -> tuple[Axis, ...]:
        return passes(self.size, self.new_size)

    def groups(self, steps: int) -> "Iterator[Frames]":
        [grid] = self.grids
        n_frames = steps * FRAMES_IN_A_STEP
        for first in range(0, len(self.blocks), n_frames):
            blocks = self.blocks[first : first + n_frames]
            t = -(-len(blocks) // FRAMES_IN_A_STEP)
            yield replace(self, blocks=blocks, grids=(Grid(t, grid.h, grid.w),))

    def patchify(self) -> Patches:
        """Resize and cut on the CPU, with the same bits as on a GPU."""
        rows = FrameRows(len(self.blocks), self.new_size[::-1], self.config, self.name or "")
        for at, view in enumerate(self.blocks):
            block: Any = view
            rows.resize(at, Image.frombuffer("RGBX", self.size, block, "raw", "RGBX", 0, 1))
        return replace(rows.done(), name=self.name)


Decoded: TypeAlias = Patches | Frames  # some time steps of a video


class FramesForGpu:
    """Collect a video's decoded frames, without resizing them. `size_px` is (height, width)."""

    def __init__(
        self, n_frames: int, size_px: tuple[int, int], new_size_px: tuple[int, int],
        config: ImageConfig, name: str,
    ) -> None:  # fmt: skip
        self._size_px, self._new_size_px = size_px, new_size_px
        self._config, self._name = config, name
        self._found: list[FrameMemory | None] = [None] * n_frames

    @property
    def n_bytes(self) -> int:
        return PIXEL_BYTES * self._size_px[0] * self._size_px[1] * len(self._found)

    def put(self, at: int, memory: FrameMemory) -> None:
        self._found[at] = memory

    def done(self) -> Frames:
        found = [memory for memory in self._found if memory is not None]
        return Frames.of(
            found, self._size_px[::-1], self._new_size_px[::-1], self._config, self._name
        )


class FrameRows:
    """Collect a video's patches, whose values are in the order channel, frame of the pair, row,
    column.

    The patches cover `n_frames` frames of `size_px`, starting with the sampled frame `first`.
    `keep`, if given, receives a copy of each resized frame under the sampled frame's number.
    """

    def __init__(
        self,
        n_frames: int,
        size_px: tuple[int, int],
        config: ImageConfig,
        name: str,
        keep: dict[int, NDArray[np.uint8]] | None = None,
        first: int = 0,
    ) -> None:
        self._keep, self._first = keep, first
        px, merge = config.patch_px, config.merge_size
        factor = px * merge
        self.height, self.width = size_px
        self._name, self._config = name, config
        self._n_frames = n_frames
        t = -(-n_frames // FRAMES_IN_A_STEP)
        h, w = self.height // factor, self.width // factor
        self._grid = Grid(t, h * merge, w * merge)
        self._values = np.empty(
            (t, h, w, merge, merge, CHANNELS, FRAMES_IN_A_STEP, px, px), np.uint8
        )

    @property
    def n_bytes(self) -> int:
        return self._values.nbytes

    def resize(self, at: int, picture: Image.Image) -> None:
        """Resize a frame with 4 bytes per pixel, and cut it."""
        size = (self.width, self.height)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        memory, owner = memory_of(picture)  # np.asarray would copy while it holds the GIL
        shape = (self.height, self.width, PIXEL_BYTES)
        self.put(at, np.frombuffer(memory, np.uint8).reshape(shape))
        del owner

    def put(self, at: int, pixels: NDArray[np.uint8]) -> None:
        """Cut a resized frame (height, width, >= 3 channels) into its patches."""
        if self._keep is not None:
            self._keep[self._first + at] = pixels[..., :CHANNELS].copy()
        px, merge = self._config.patch_px, self._config.merge_size
        _, h, w = self._values.shape[:3]
        cut = pixels[..., :CHANNELS].reshape(h, merge, px, w, merge, px, CHANNELS)
        # (h, mh, ph, w, mw, pw, c) -> grid order, each patch by channel, row, column
        in_order = cut.transpose(0, 3, 1, 4, 6, 2, 5)
        step, which = divmod(at, FRAMES_IN_A_STEP)
        self._values[step, ..., which, :, :] = in_order
        if at == self._n_frames - 1 and which == 0:  # an odd count repeats the last frame
            self._values[step, ..., 1, :, :] = in_order

    def done(self) -> Patches:
        values = self._values.reshape(self._grid.n_patches, -1)
        return Patches(torch.from_numpy(values), (self._grid,), self._name)
