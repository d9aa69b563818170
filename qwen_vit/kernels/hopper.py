"""Shared by the kernels for Hopper: the check of the device, tensor maps, fences and barriers."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier

__all__ = [
    "descriptor",
    "fence_for_wgmma",
    "hold_barriers",
    "is_hopper",
    "multiprocessors",
]


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has Hopper's own instructions. Newer GPUs lack them."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(rows: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A bfloat16 matrix, fetched and stored in blocks by the tensor memory accelerator."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(rows, block, layout)


@gluon.jit
def fence_for_wgmma():
    """Make shared-memory stores visible to matrix instructions (WGMMA).

    Each thread fences its own stores, then all threads meet at a barrier. The barriers that the
    compiler adds may come before the fence.
    """
    fence_async_shared()
    debug_barrier()


@gluon.jit
def hold_barriers(barriers):
    """Keep the shared memory of these arrays of barriers allocated until the kernel ends.

    The compiler reuses memory after its last use. If a variant of a kernel never waits for a
    barrier, its last use is its creation. The hardware keeps the barrier until it is invalidated or
    the program ends, and writes it back after another process has used the GPU. Invalidating one
    barrier of each array here holds the array. Invalidating all costs 1 % of a small image.
    """
    for i in gl.static_range(len(barriers)):
        mbarrier.invalidate(barriers[i].index(0))
