"""Run our tower stage by stage: "patch_embed", "block.0", ..., "merger"."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vit.compare.oracle import Trace
from qwen_vit.config import Grid, VisionConfig
from qwen_vit.kernels.linear import ResidualStream
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower, plan_layout

__all__ = ["layout_for", "record_stages", "stage_names", "trace_tower"]


def stage_names(depth: int) -> tuple[str, ...]:
    """Return the name of every stage of a tower, in order.

    >>> stage_names(2)
    ('patch_embed', 'block.0', 'block.1', 'merger')
    """
    return ("patch_embed", *(f"block.{i}" for i in range(depth)), "merger")


def layout_for(
    grids: Sequence[Grid],
    config: VisionConfig,
    device: torch.device,
    dtype: torch.dtype,
    n_rows: int | None = None,
) -> Layout:
    return plan_layout(grids, config, device, dtype, n_rows).to(device)


@torch.no_grad()
def trace_tower(tower: VisionTower, patches: Tensor, layout: Layout) -> Trace:
    """Run the tower and return its stages in the oracle's orders, without the padding rows.

    "patch_embed" is (N, C) in grid order. "block.0", ... are (N, C) in window order. "merger" is in
    row-major order.
    """
    trace: Trace = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, ResidualStream):  # a block's output
            output = output.values
        trace[name] = output[: layout.n_patches].clone()

    with record_stages(tower, keep):
        merged = tower(patches.to(layout.positions.device), layout)
    in_grid_order = torch.empty_like(trace["patch_embed"])
    in_grid_order[layout.grid_index[: layout.n_patches].long()] = trace["patch_embed"]
    return trace | {"patch_embed": in_grid_order, "merger": merged}


@contextmanager
def record_stages(tower: Any, keep: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `keep(stage, output)` with the outputs of the patch embedding and of each block.

    The tower must have `patch_embed` and `blocks`, like our tower and Hugging Face's tower.
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: keep(name, output)

    stages: dict[str, nn.Module] = {"patch_embed": tower.patch_embed}
    stages |= {f"block.{i}": block for i, block in enumerate(tower.blocks)}
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in stages.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
