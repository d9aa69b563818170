"""Test the plain kernels of other GPUs on a Hopper GPU: the error, and equal bits."""

import torch

from qwen_vit import VisionEncoder
from qwen_vit.benchmark import TimedTower, random_pixels
from qwen_vit.config import Grid
from qwen_vit.kernels import plain_kernels
from tests.support.towers import gpu

GRIDS = (Grid(1, 32, 32), Grid(1, 8, 18), Grid(1, 26, 30))


@gpu
def test_the_plain_kernels_give_an_image_the_same_bits_alone_and_in_a_batch() -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda")
    timed = TimedTower(encoder.tower, encoder.device, encoder.dtype)
    pixels = random_pixels(GRIDS, encoder.tower.config, encoder.device)
    with plain_kernels():
        batch = timed.eager(pixels, GRIDS)()
        assert torch.equal(timed.by_graph(pixels, GRIDS)(), batch)
        rows = pixels.split([grid.n_patches for grid in GRIDS])
        parts = batch.split([grid.n_patches // 4 for grid in GRIDS])
        for grid, own, part in zip(GRIDS, rows, parts, strict=True):
            assert torch.equal(timed.eager(own, [grid])(), part)
