"""Define the order in which each known version of Pillow resizes the axes with its bicubic filter.

Each pass rounds to uint8, so the bits depend on the order. A GPU uses the order of the installed
Pillow. The code supports only versions whose source we read and whose results we compared.

Source: Pillow, src/libImaging/Resample.c and src/PIL/Image.py.
"""

import logging
import platform
from collections.abc import Callable
from functools import cache
from typing import Literal, TypeAlias

import PIL

__all__ = ["KNOWN_PILLOWS", "Axis", "Size", "knows_pillow", "passes"]

logger = logging.getLogger("qwen_vit")

Axis: TypeAlias = Literal["horizontal", "vertical"]
Size: TypeAlias = tuple[int, int]  # width, height in pixels


def _shrinks_height_more(old: Size, new: Size) -> bool:
    lost_width, lost_height = old[0] - new[0], old[1] - new[1]
    return lost_height > 0 and lost_height > 2 * lost_width


def _shrinks_a_strip(old: Size, new: Size) -> bool:
    return old[1] > 100 * old[0] and new[1] < old[1]


# version -> whether it resizes vertically first
KNOWN_PILLOWS: dict[str, Callable[[Size, Size], bool]] = {
    "12.3.0": _shrinks_a_strip,
    "13.0.0": _shrinks_height_more,
}
# For other machines, compilers may fuse a product with a sum, which rounds differently.
MACHINES = ("x86_64", "AMD64")


def passes(old: Size, new: Size, version: str = PIL.__version__) -> tuple[Axis, ...]:
    """Return the axes to resize in Pillow's order, without sides that keep their length.

    >>> passes((100, 200), (56, 84), "13.0.0"), passes((100, 200), (56, 84), "12.3.0")
    (('vertical', 'horizontal'), ('horizontal', 'vertical'))
    >>> passes((100, 56), (56, 56), "13.0.0")
    ('horizontal',)
    """
    changed: list[Axis] = []
    if old[0] != new[0]:
        changed.append("horizontal")
    if old[1] != new[1]:
        changed.append("vertical")
    return tuple(reversed(changed) if KNOWN_PILLOWS[version](old, new) else changed)


@cache  # one warning per process
def knows_pillow(version: str = PIL.__version__) -> bool:
    """Return whether a GPU can resize to the same bits as this Pillow. Log a negative answer
    once."""
    machine = platform.machine()
    if version in KNOWN_PILLOWS and machine in MACHINES:
        return True
    logger.warning(
        "the CPU resizes images, because the GPU matches only Pillow %s on %s. "
        "This is Pillow %s on %s",
        " and ".join(KNOWN_PILLOWS), MACHINES[0], version, machine,
    )  # fmt: skip
    return False
