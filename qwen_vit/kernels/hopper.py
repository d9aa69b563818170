"""What the kernels for Hopper share: where they run, and how they see a tensor."""

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
    """Whether the device has Hopper's own instructions, which newer ones lack."""
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
    """What these threads have stored in shared memory is what matrix instructions read from now on.

    Each thread fences its own stores, and only then do all wait for each other. The barriers that
    the compiler adds by itself may come before the fence.
    """
    fence_async_shared()
    debug_barrier()


@gluon.jit
def hold_barriers(barriers):
    """The last word of a kernel: until then, nothing else lies where these arrays of barriers do.

    The compiler gives memory away after its last use; for a barrier that a variant of a kernel
    never waits for, that is where it is made. The hardware still has a barrier there until it is
    ended or the program is, and writes it back when another process has had its turn on the GPU.
    Ending one barrier of each array here holds the array; ending all costs 1 % of a small image.
    """
    for i in gl.static_range(len(barriers)):
        mbarrier.invalidate(barriers[i].index(0))
