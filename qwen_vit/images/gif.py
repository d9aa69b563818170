"""Open a GIF whose canvas stays within a limit."""

from collections.abc import Callable
from typing import Any

from PIL import GifImagePlugin

__all__ = ["GifFile"]


class GifFile(GifImagePlugin.GifImageFile):
    """Open a GIF, and check each size of its canvas before Pillow allocates the canvas.

    A frame outside the canvas makes Pillow enlarge the canvas, up to Pillow's own pixel limit. A
    frame's descriptor of 10 bytes can claim 65,535 pixels for each side. `check` raises an error
    for a size that is too large.
    """

    def __init__(self, file: Any, filename: str, check: Callable[[int, int], None]) -> None:
        self._check, self._checked_size = check, (0, 0)
        super().__init__(file, filename)

    @property
    def _size(self) -> tuple[int, int]:
        return self._checked_size

    @_size.setter
    def _size(self, size: tuple[int, int]) -> None:
        if all(size):  # the first frame may give a canvas of 0 x 0 its size
            self._check(*size)
        self._checked_size = size
