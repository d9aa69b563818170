"""Interrupt an export."""

import os
from contextlib import AbstractContextManager, nullcontext

COUNT = 100  # images, every 13th of them broken


def segments(folder: str = "out") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("segment-"))


class Stop:
    """Send a signal after this number of checks, one check for each image."""

    def __init__(self, after: int) -> None:
        self.left = after

    def is_requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    def accepted(self) -> AbstractContextManager[None]:
        return nullcontext()
