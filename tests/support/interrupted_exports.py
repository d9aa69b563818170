"""An export that is interrupted."""

import os

COUNT = 100  # images, every 13th of them broken


def segments(folder: str = "out") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("segment-"))
