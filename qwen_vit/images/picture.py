"""Hand a decoded RGB picture to the GPU, which resizes it and cuts it into patches.

Pillow stores 4 bytes per pixel: red, green, blue and one unused byte. Its Arrow interface gives the
address of these bytes. np.asarray would copy them through Python objects, which took 6 ms at 1344
px.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image

from qwen_vit.config import Grid, ImageConfig
from qwen_vit.images.patches import Patches, limited_memory, patchify, target_size
from qwen_vit.images.pillow_order import Axis, knows_pillow, passes

__all__ = ["PIXEL_BYTES", "Picture", "resizes_on"]

PIXEL_BYTES = 4
BLOCK_BYTES = 2**24  # Pillow splits larger pictures into several blocks of memory


class _ArrowArray(ctypes.Structure):
    """Mirror the fields of Arrow's C data interface that come before the pixels' address."""

    _fields_ = (
        ("length", ctypes.c_int64), ("null_count", ctypes.c_int64), ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64), ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)), ("children", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Hold a decoded RGB picture, and the grid that it will have.

    >>> picture = Picture.of(Image.new("RGB", (100, 200)), ImageConfig.from_json({}))
    >>> picture.grids, picture.n_patches, picture.n_bytes
    ((Grid(t=1, h=14, w=8),), 112, 80000)

    `blocks` are the bytes of the pixels, row by row, in several pieces. They stay valid while this
    object exists. `name` identifies the image in messages and ids.
    """

    rgb: Image.Image
    config: ImageConfig
    grids: tuple[Grid]
    name: str | None
    blocks: tuple[memoryview, ...]
    _owners: tuple[object, ...]  # of the blocks' memory

    @classmethod
    def of(cls, rgb: Image.Image, config: ImageConfig, *, name: str | None = None) -> Self:
        """Describe a picture of mode RGB, which nobody may change. Raises as `patchify` does."""
        height, width = target_size(rgb, config, name=name or "the image")
        grid = Grid(1, height // config.patch_px, width // config.patch_px)
        with limited_memory(name or "the image"):
            found = [_memory_of(part) for part in _bands(rgb)]
        blocks, owners = tuple(block for block, _ in found), tuple(owner for _, owner in found)
        return cls(rgb, config, (grid,), name, blocks, owners)

    @property
    def n_patches(self) -> int:
        """Return the number of patches after resizing."""
        return self.grids[0].n_patches

    @property
    def n_values(self) -> int:
        """Return the number of values in a patch."""
        return 3 * self.config.patch_px**2

    @property
    def n_bytes(self) -> int:
        """Return the bytes of the decoded pixels."""
        return PIXEL_BYTES * self.rgb.width * self.rgb.height

    @property
    def size(self) -> tuple[int, int]:
        """Return the width and height before resizing, in pixels."""
        return self.rgb.size

    @property
    def new_size(self) -> tuple[int, int]:
        """Return the width and height after resizing, in pixels."""
        [grid] = self.grids
        return grid.w * self.config.patch_px, grid.h * self.config.patch_px

    @property
    def passes(self) -> tuple[Axis, ...]:
        """Return the axes to resize, in the order of the installed Pillow."""
        return passes(self.rgb.size, self.new_size)

    def patchify(self) -> Patches:
        """Resize and cut on the CPU, with the same bits."""
        return patchify(self.rgb, self.config, name=self.name)


def resizes_on(device: torch.device) -> bool:
    """Return whether this device resizes pictures: a GPU that knows the installed Pillow's bits."""
    return device.type == "cuda" and knows_pillow()


def _bands(rgb: Image.Image) -> list[Image.Image]:
    """Return a picture, or copies of bands of rows that fit a block of memory each."""
    if PIXEL_BYTES * rgb.width * rgb.height <= BLOCK_BYTES:
        return [rgb]
    rows = max(1, BLOCK_BYTES // (PIXEL_BYTES * rgb.width) - 1)  # Pillow reserves a little
    return [
        rgb.crop((0, top, rgb.width, min(top + rows, rgb.height)))
        for top in range(0, rgb.height, rows)
    ]


def _memory_of(rgb: Image.Image) -> tuple[memoryview, object]:
    """Return the bytes of a picture's pixels, and the object that keeps them."""
    try:
        _, array = rgb.__arrow_c_array__()
    except ValueError:  # rows are not adjacent, such as in memory of another library
        data = rgb.tobytes("raw", "RGBX")
        return memoryview(data), data
    arrow = _ArrowArray.from_address(_address(array, b"arrow_array"))
    child = ctypes.cast(arrow.children, ctypes.POINTER(ctypes.c_void_p))[0]
    values = _ArrowArray.from_address(child)
    view: Any = _view(values.buffers[1], PIXEL_BYTES * rgb.width * rgb.height, READ_ONLY)
    return view, array


READ_ONLY = 0x100  # PyBUF_READ
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
