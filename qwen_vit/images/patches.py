"""Cut RGB pixels into patches in grid order, as transformers' Qwen2VLImageProcessorPil does.

Source: transformers, models/qwen2_vl/image_processing_pil_qwen2_vl.py.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.config import Grid, ImageConfig
from qwen_vit.errors import ArgumentError, ImageError, with_options
from qwen_vit.images.image import check_ratio
from qwen_vit.images.rows import normalise

__all__ = [
    "CHANNELS", "LARGE_BYTES", "Patches", "check_sides", "limited_memory", "patchify",
    "resize_image", "smart_resize", "target_size",
]  # fmt: skip

Rgb: TypeAlias = NDArray[np.uint8] | Image.Image
CHANNELS = 3
LARGE_BYTES = 2**22  # larger copies release the GIL, so that other threads can decode
PUBLISHED_PATCH_VALUES = CHANNELS * 14 * 14  # of one frame; the width of an empty result


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Hold the uint8 patches of any number of images, in grid order.

    >>> config = ImageConfig.from_json({})
    >>> patches = patchify(np.zeros((56, 84, 3), np.uint8), config)
    >>> patches.pixels.shape, patches.grids
    (torch.Size([24, 588]), (Grid(t=1, h=4, w=6),))

    For images, `pixels` has shape (N, 588): channel, row, column of one frame, because the two
    frames of a still image are equal. For videos, `pixels` has shape (N, 1176): channel, frame of
    the pair, row, column. In grid order, merge units are in raster order, and a unit's 4 patches
    are adjacent. `name` identifies the image in messages and ids, and is None for several images.
    """

    pixels: torch.Tensor
    grids: tuple[Grid, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 2:
            raise ImageError(
                f"pixels are {self.pixels.dtype} of shape {tuple(self.pixels.shape)}",
                name=self.name or "",
                expected="uint8 of shape (patches, values)",
                remedy="build the pixels with patchify",
                code="patches",
            )
        promised = sum(grid.n_patches for grid in self.grids)
        if len(self.pixels) != promised:
            raise ImageError(
                f"pixels contain {len(self.pixels)} patches, and the grids have {promised}",
                name=self.name or "",
                expected="the same number",
                remedy="keep each image's pixels and grid together",
                code="patches",
            )

    @property
    def n_patches(self) -> int:
        return len(self.pixels)

    @property
    def n_values(self) -> int:
        """Return the number of values in a row: one frame of an image, or two frames of a video."""
        return self.pixels.shape[1]

    @property
    def n_bytes(self) -> int:
        return self.pixels.nbytes

    @classmethod
    def cat(cls, parts: Iterable[Self], *, pinned_rows: int = 0) -> Self:
        """Join the patches of several images in order. Without images, the result has the shape (0,
        588).

        The result is on the device of the first patches. With `pinned_rows`, CPU patches go into
        pinned memory of at least that number of rows, so that one size fits every batch.
        """
        parts = list(parts)
        if not parts:
            return cls(torch.empty(0, PUBLISHED_PATCH_VALUES, dtype=torch.uint8), ())
        widths = sorted({part.pixels.shape[1] for part in parts})
        if len(widths) > 1:
            raise ImageError(
                f"patches of {widths} values cannot be joined",
                expected="one width",
                remedy="build all patches with the same ImageConfig",
                code="patches",
            )
        pixels = [part.pixels for part in parts]
        grids = tuple(grid for part in parts for grid in part.grids)
        if not pinned_rows or any(each.device.type != "cpu" for each in pixels):
            device = pixels[0].device
            return cls(torch.cat([each.to(device) for each in pixels]), grids)
        rows = sum(map(len, pixels))
        size = (max(rows, pinned_rows), widths[0])
        joined = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)[:rows]
        # torch's threads would wait for cores that decode images. NumPy releases the GIL
        # after each image and waits for it again. A memoryview keeps the GIL.
        flat, begin = joined.numpy().reshape(-1), 0
        room = _memory(joined)
        for each in pixels:
            end = begin + each.numel()
            if each.numel() < LARGE_BYTES:
                room[begin:end] = _memory(each)
            else:
                flat[begin:end] = each.numpy().reshape(-1)
            begin = end
        return cls(joined, grids)

    def split_steps(self, most: int) -> "list[Patches]":
        """Split a video into pieces of whole time steps. A piece has at most `most` patches, or one
        step.

        >>> video = Patches(torch.zeros(72, 1176, dtype=torch.uint8), (Grid(3, 4, 6),))
        >>> [piece.grids[0].t for piece in video.split_steps(50)]
        [2, 1]

        Attention never crosses time steps, so the pieces give the same features as the whole video.
        """
        [grid] = self.grids
        in_step = grid.h * grid.w
        steps = max(1, most // in_step)
        return [
            Patches(
                self.pixels[first * in_step : (first + steps) * in_step],
                (Grid(min(steps, grid.t - first), grid.h, grid.w),),
                self.name,
            )
            for first in range(0, grid.t, steps)
        ]

    def to_rows(self, config: ImageConfig) -> torch.Tensor:
        """Return the processor's normalised `pixel_values`: float32 (N, 1176), on the patches'
        device.

        The values of a row are in the order channel, frame, row, column.
        """
        expected = CHANNELS * config.patch_px**2
        is_video = self.pixels.shape[1] == expected * config.temporal_patch_size
        if self.pixels.shape[1] != expected and not is_video:
            raise ImageError(
                f"patches have {self.pixels.shape[1]} values, but the configuration has {expected}",
                name=self.name or "",
                remedy="use the ImageConfig that built the patches",
                code="patches",
            )
        values = normalise(rearrange(self.pixels, "n (c p) -> n c p", c=CHANNELS), config)
        if is_video:
            return values.flatten(1)
        return repeat(values, "n c p -> n (c frames p)", frames=config.temporal_patch_size)


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: float,
    name: str = "the image",
) -> tuple[int, int]:
    """Return an image's target size in multiples of `factor` that roughly keep the aspect ratio.

    >>> smart_resize(100, 200, factor=28, min_pixels=3136, max_pixels=1003520)
    (112, 196)

    Sides are in pixels. The function rounds half to even, as Python does. It then reduces the size
    (floor) to at most `max_pixels`, or increases it (ceil) to at least `min_pixels`. A thin image
    may exceed `max_pixels`, because no side is below `factor`.
    """
    check_sides(height, width, name)
    _check_limits(factor, min_pixels, max_pixels)
    rows, columns = round(height / factor), round(width / factor)
    pixels = rows * columns * factor**2
    if pixels > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def target_size(rgb: Rgb, config: ImageConfig, *, name: str = "the image") -> tuple[int, int]:
    """Return the height and width that an RGB image will have after resizing.

    >>> target_size(Image.new("RGB", (200, 100)), ImageConfig.from_json({}))
    (112, 196)

    Sides are in pixels.
    """
    if isinstance(rgb, Image.Image):
        width, height = rgb.size
        what, is_rgb = f"a Pillow image of mode {rgb.mode}", rgb.mode == "RGB"
    else:
        what = f"{rgb.dtype} of shape {rgb.shape}"
        is_rgb = rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == CHANNELS
        height, width = rgb.shape[:2] if is_rgb else (0, 0)
    if not is_rgb:
        raise ImageError(
            what,
            name=name,
            expected="uint8 of shape (height, width, 3)",
            remedy="load the image with load_image",
            code="patches",
        )
    return smart_resize(
        height,
        width,
        factor=config.patch_px * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        name=name,
    )


def resize_image(rgb: Rgb, config: ImageConfig, *, name: str = "the image") -> NDArray[np.uint8]:
    """Resize an image to smart_resize's size with Pillow's bicubic filter, on uint8.

    `rgb` is a Pillow image of mode RGB, or uint8 (height, width, 3). If the size already fits, the
    pixels are unchanged.
    """
    new_height, new_width = target_size(rgb, config, name=name)
    old = rgb.size[::-1] if isinstance(rgb, Image.Image) else rgb.shape[:2]
    if (new_height, new_width) == old:
        return np.asarray(rgb)
    picture = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    return np.asarray(picture.resize((new_width, new_height), Image.Resampling.BICUBIC))


def patchify(rgb: Rgb, config: ImageConfig, *, name: str | None = None) -> Patches:
    """Resize an RGB image and cut it into patches, in grid order.

    >>> patchify(np.zeros((56, 84, 3), np.uint8), ImageConfig.from_json({}), name="cat.png").name
    'cat.png'

    `rgb` is a Pillow image of mode RGB, or uint8 (height, width, 3).
    """
    called = "the image" if name is None else name
    with limited_memory(called):
        resized = resize_image(rgb, config, name=called)
        pixels = rearrange(
            resized,
            "(h mh ph) (w mw pw) c -> (h w mh mw) (c ph pw)",
            mh=config.merge_size,
            mw=config.merge_size,
            ph=config.patch_px,
            pw=config.patch_px,
        )
        pixels = np.ascontiguousarray(pixels)
    height, width, _ = resized.shape
    grid = Grid(1, height // config.patch_px, width // config.patch_px)
    return Patches(torch.from_numpy(pixels), (grid,), name)


@contextmanager
def limited_memory(name: str) -> Iterator[None]:
    """Raise ImageError with code "memory" in place of a MemoryError of the block."""
    try:
        yield
    except MemoryError:
        raise ImageError(
            "does not fit into memory when resized",
            name=name,
            remedy=with_options("make the image smaller, or lower {}", "max_pixels"),
            code="memory",
        ) from None


def check_sides(height: int, width: int, name: str) -> None:
    if min(height, width) < 1:
        raise ImageError(
            f"the size is {width}x{height} (width x height)",
            name=name,
            expected="sides of at least 1 pixel",
            remedy="omit the image",
            code="zero-side",
        )
    check_ratio(width, height, name)


def _check_limits(factor: int, min_pixels: int, max_pixels: float) -> None:
    if factor < 1 or min_pixels < 1:
        raise ArgumentError(
            with_options(
                "factor is {factor} and {} {least}", "min_pixels", factor=factor, least=min_pixels
            ),
            expected="whole numbers above 0",
        )
    if max_pixels < factor**2:
        raise ArgumentError(
            with_options(
                "{} is {most}, too small for one token of {factor}x{factor} pixels",
                "max_pixels",
                most=max_pixels,
                factor=factor,
            ),
            remedy=f"raise this limit to at least {factor**2}",
        )
    if min_pixels > max_pixels:
        raise ArgumentError(
            with_options(
                "{} {least} exceeds {} {most}",
                "min_pixels",
                "max_pixels",
                least=min_pixels,
                most=max_pixels,
            ),
            remedy=with_options("lower {} or raise {}", "min_pixels", "max_pixels"),
        )


def _memory(values: torch.Tensor) -> memoryview:
    flat: Any = values.numpy().reshape(-1)
    return memoryview(flat)
