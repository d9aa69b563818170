"""Detect Hopper GPUs, and provide the descriptors, copies and fences of the Hopper kernels."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier

__all__ = [
    "copy_to_global",
    "copy_to_shared",
    "descriptor",
    "fence_for_wgmma",
    "hold_barriers",
    "is_hopper",
    "multiprocessors",
]

# Triton 3.8 renamed the two copies of the tensor memory accelerator.
if hasattr(tma, "async_load"):
    copy_to_shared, copy_to_global = tma.async_load, tma.async_store
else:
    copy_to_shared = tma.async_copy_global_to_shared
    copy_to_global = tma.async_copy_shared_to_global


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the device is a Hopper GPU. Newer GPUs lack some of Hopper's instructions."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(rows: torch.Tensor, block: list[int]) -> TensorDescriptor:
    dtype = gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(rows, block, layout)


@gluon.jit
def fence_for_wgmma():
    """Make shared-memory stores visible to matrix instructions (WGMMA).

    Each thread fences its own stores, then waits for all threads at a barrier. The compiler may
    insert its own barriers before the fence.
    """
    fence_async_shared()
    debug_barrier()


@gluon.jit
def hold_barriers(barriers):
    """Keep the shared memory of these barrier arrays allocated until the kernel ends.

    The compiler reuses shared memory after its last use in the code. If a kernel variant never
    waits on a barrier, the last use is the barrier's creation. The hardware keeps a barrier until
    it is invalidated or the program ends, and writes it back after another process has used the
    GPU. This function invalidates one barrier of each array, which keeps the array allocated.
    Invalidating all barriers would add 1 % to a small image's time.
    """
    for i in gl.static_range(len(barriers)):
        mbarrier.invalidate(barriers[i].index(0))
