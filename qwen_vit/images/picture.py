"""Hold a decoded RGB picture for the GPU, which resizes it and cuts it into patches.

Pillow stores 4 bytes per pixel: red, green, blue and one unused byte. Its Arrow interface gives the
address of these bytes. `np.asarray` would copy the bytes through Python objects, which is slower.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL import Image

from qwen_vit.config import Grid, ImageConfig
from qwen_vit.images.memory import decoding_memory
from qwen_vit.images.patches import Patches, limited_memory, patchify, target_size
from qwen_vit.images.pillow_order import Axis, knows_pillow, passes

__all__ = ["PIXEL_BYTES", "Picture", "memory_of", "resizes_on"]

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
    """Hold a decoded RGB picture, and its grid after resizing.

    >>> picture = Picture.of(Image.new("RGB", (100, 200)), ImageConfig.from_json({}))
    >>> picture.grids, picture.n_patches, picture.n_bytes
    ((Grid(t=1, h=14, w=8),), 112, 80000)

    `size` is the width and height before resizing, in pixels. `parts` contains the picture, or
    copies of bands of its rows. `blocks` are the bytes of their pixels, row by row, and stay valid
    while this object exists.
    """

    size: tuple[int, int]
    parts: tuple[Image.Image, ...]
    config: ImageConfig
    grids: tuple[Grid]
    name: str | None
    blocks: tuple[memoryview, ...]
    _owners: tuple[object, ...]  # of the blocks' memory

    @classmethod
    def of(cls, rgb: Image.Image, config: ImageConfig, *, name: str | None = None) -> Self:
        """Describe a picture of mode RGB. The caller must not change the picture afterwards."""
        called = "the image" if name is None else name
        height, width = target_size(rgb, config, name=called)
        grid = Grid(1, height // config.patch_px, width // config.patch_px)
        with limited_memory(called):
            parts = _parts(rgb)
            found = [memory_of(part) for part in parts]
        blocks, owners = tuple(block for block, _ in found), tuple(owner for _, owner in found)
        return cls(rgb.size, parts, config, (grid,), name, blocks, owners)

    @property
    def n_patches(self) -> int:
        return self.grids[0].n_patches

    @property
    def n_values(self) -> int:
        return 3 * self.config.patch_px**2

    @property
    def n_bytes(self) -> int:
        return PIXEL_BYTES * self.size[0] * self.size[1]

    @property
    def new_size(self) -> tuple[int, int]:
        """Return the width and height after resizing, in pixels."""
        [grid] = self.grids
        return grid.w * self.config.patch_px, grid.h * self.config.patch_px

    @property
    def passes(self) -> tuple[Axis, ...]:
        return passes(self.size, self.new_size)

    def patchify(self) -> Patches:
        """Resize and cut on the CPU, with the same bits as on a GPU."""
        with limited_memory("the image" if self.name is None else self.name):
            rgb = _joined(self.parts, self.size)
        return patchify(rgb, self.config, name=self.name)


def resizes_on(device: torch.device) -> bool:
    """Return whether this device is a GPU that resizes pictures to the same bits as the installed
    Pillow."""
    return device.type == "cuda" and knows_pillow()


def _parts(rgb: Image.Image) -> tuple[Image.Image, ...]:
    """Return the picture, or copies of bands of its rows. Each band fits into one block of
    memory."""
    n_bytes = PIXEL_BYTES * rgb.width * rgb.height
    if n_bytes <= BLOCK_BYTES:
        return (rgb,)
    rows = max(1, BLOCK_BYTES // (PIXEL_BYTES * rgb.width) - 1)  # Pillow reserves a little
    with decoding_memory.hold(2 * n_bytes):  # the loader drops the picture after this copy
        return tuple(
            rgb.crop((0, top, rgb.width, min(top + rows, rgb.height)))
            for top in range(0, rgb.height, rows)
        )


def _joined(parts: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    if len(parts) == 1:
        return parts[0]
    whole, top = Image.new("RGB", size), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def memory_of(rgb: Image.Image) -> tuple[memoryview, object]:
    """Return the bytes of a picture's pixels, and the object that owns their memory."""
    try:
        _, array = rgb.__arrow_c_array__()
    except (ValueError, AttributeError):  # memory of another library, or an older Pillow
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
