"""Test that an encoder's bits do not change if other processes use the same GPU."""

import time

import torch

from qwen_vit.config import Grid
from tests.support.subprocess_pool import outcomes
from tests.support.towers import gpu
from tests.support.wide_tower import embeddings, published_width

PROCESSES, SECONDS, IMAGES = 3, 5.0, 64


def repeats() -> tuple[int, int]:
    """Return the number of batches after the first batch, and the number of batches with other
    bits."""
    # large: a kernel must take longer than a process' turn
    grids = [Grid(1, 64, 64)] * IMAGES
    n_patches = sum(grid.n_patches for grid in grids)
    pixels = torch.randint(0, 256, (n_patches, 588), dtype=torch.uint8, device="cuda")
    tower = published_width(torch.bfloat16)
    first = embeddings(tower, pixels, grids)
    encoded = different = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        encoded += 1
        different += not torch.equal(embeddings(tower, pixels, grids), first)
    return encoded, different


@gpu
def test_bits_stay_while_processes_take_turns_on_the_gpu() -> None:
    """At the end of a process's turn, the hardware saves the barriers, and writes them back later.
    A GEMM's bias once used the memory of two barriers. Half of these batches were then wrong, but
    no batch was wrong with a single process on the GPU.
    """
    found = [
        each for _, each in outcomes(repeats, [()] * PROCESSES, at_once=PROCESSES, seconds=120)
    ]
    print(found)
    for outcome in found:
        assert outcome.problem is None
        encoded, different = outcome.value
        assert encoded > 3
        assert different == 0
