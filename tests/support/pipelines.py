"""Provide an encoder, mixed images and an export for the tests of threads."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from tests.support import IMAGES
from tests.support.export_stress import tiny_png


def load_threads() -> int:
    return sum(thread.name.startswith("qwen-vit") for thread in threading.enumerate())


def fake_export(folder: Path, encoder: Any, shards: int, **more: Any) -> Any:
    """Export with 4 images in a shard."""
    (folder / "p").mkdir()
    for number in range(4 * shards):
        (folder / f"p/{number:03}.png").write_bytes(tiny_png(number))
    options = ExportOptions(shard_size=4)
    return export_features(encoder, [str(folder / "p")], folder / "out", options, **more)


def encoder() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)


def mixed(count: int) -> list[Any]:
    """Return arrays, PIL images, encoded bytes and paths of many sizes. Every sixth image is
    broken."""
    images: list[Any] = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        shape = (*random.integers(28, 140, 2), 3)
        pixels = random.integers(0, 256, shape, np.uint8)
        jpeg = (IMAGES / "rocket.jpg").read_bytes()
        images.append(
            [pixels, Image.fromarray(pixels), jpeg[: 3000 * (seed + 1)], IMAGES / "chelsea.png",
             torch.from_numpy(pixels), b"no image"][seed % 6]
        )  # fmt: skip
    return images
