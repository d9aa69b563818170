"""Measure an export's bounds: the encoder alone, the disk, and Hugging Face, image by image."""

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from qwen_vit.batching import TOKEN_BUDGET, pack
from qwen_vit.config import Grid
from qwen_vit.encoder import VisionEncoder
from qwen_vit.export.estimate import target_size
from tests.support.huggingface import hf_tower

WRITTEN_BYTES, PIECE_BYTES = 2**32, 2**24
ENCODED_PATCHES = 2_500_000  # enough patches for a stable rate


def seconds(run: Callable[[], Any]) -> float:
    """Return the time after the GPU has finished."""
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def grids_of(paths: list[Path], encoder: VisionEncoder) -> list[Grid]:
    grids = []
    for path in paths:
        with Image.open(path) as image:
            height, width = target_size(image.height, image.width, encoder.image_config, path.name)
        grids.append(Grid(1, height // 14, width // 14))
    return grids


def encoder_rate(encoder: VisionEncoder, grids: list[Grid]) -> float:
    """Return patches a second, with pixels on the device, in the batches that `encode` packs."""
    sizes = [grid.n_patches for grid in grids]
    batches = [
        tuple(grids[index] for index in batch)
        for batch in pack(sizes, TOKEN_BUDGET[encoder.device.type])
    ]
    random.Random(0).shuffle(batches)
    most = max(sum(grid.n_patches for grid in batch) for batch in batches)
    pixels = torch.randint(0, 256, (most, 588), dtype=torch.uint8).to(encoder.device)
    total, chosen = 0, []
    for batch in batches:
        if total < ENCODED_PATCHES:
            chosen.append(batch)
            total += sum(grid.n_patches for grid in batch)

    def run() -> None:
        for batch in chosen:
            n_patches = sum(grid.n_patches for grid in batch)
            encoder.forward(pixels[:n_patches], batch, "merged")

    seconds(run)  # compiles kernels and captures graphs
    return total / seconds(run)


def disk_rate(folder: Path) -> float:
    """Return bytes per second of sequential writes with a sync."""
    piece = os.urandom(PIECE_BYTES)
    path = folder / "sequential"

    def run() -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(WRITTEN_BYTES // PIECE_BYTES):
                file.write(piece)
            os.fsync(file.fileno())

    taken = seconds(run)
    path.unlink()
    return WRITTEN_BYTES / taken


def peer_rates(paths: list[Path], model: Path, encoder: VisionEncoder) -> dict[str, float]:
    """Return images per second for each installed Hugging Face processor."""
    tensors = {
        name.partition("visual.")[2] or name: tensor
        for name, tensor in encoder.checkpoint.tensors.items()
    }
    tower = hf_tower(tensors, encoder.config, encoder.dtype, encoder.device)
    rates = {}
    for label, name in (
        ("Pillow", "Qwen2VLImageProcessorPil"),
        ("default", "Qwen2VLImageProcessor"),
    ):
        try:
            processor = getattr(transformers, name)()
        except (ImportError, AttributeError):
            continue

        def run(chosen: list[Path], processor: Any = processor) -> None:
            for path in chosen:
                with Image.open(path) as image:
                    done = processor(images=[image.convert("RGB")], return_tensors="pt")
                with torch.no_grad():
                    tower(
                        done["pixel_values"].to(encoder.device, encoder.dtype),
                        grid_thw=done["image_grid_thw"].to(encoder.device),
                    ).pooler_output.cpu()

        run(paths[:3])
        rates[label] = len(paths) / seconds(partial(run, paths))
    return rates
