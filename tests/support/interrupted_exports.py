"""Interrupt an export after a number of images."""

import os
from contextlib import AbstractContextManager, nullcontext

COUNT = 100  # images, of which every 13th is broken


def segments(folder: str = "out") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("segment-"))


class Stop:
    """Request a stop after this number of checks. An export checks once for each image."""

    def __init__(self, after: int) -> None:
        self.left = after

    def is_requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    def accepted(self) -> AbstractContextManager[None]:
        return nullcontext()
