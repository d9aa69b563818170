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
    # large, so that a kernel takes longer than the time slice of a process
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
def test_other_processes_on_the_gpu_change_no_bit() -> None:
    """A GEMM once kept its bias in the shared memory of two barriers. A context switch saves and
    restores the barriers, which changed the bias. Half of these batches were then wrong, but no
    batch was wrong with a single process on the GPU.
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
