"""Define the towers that `tools.benchmarks.tower` compares: Hugging Face's tower, and our tower
without fusion."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import vision_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_vit.benchmark import (
    TimedTower,
    interleaved_with_gemm,
)
from qwen_vit.config import Grid, ImageConfig
from qwen_vit.images.patches import Patches
from tests.support.tower_timing import (
    graph_of,
)
from tests.support.unfused_baseline import unfused_tower


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Run torch's own FlashAttention-2 for variable lengths: (N, H, D) each."""
    scale = q.shape[-1] ** -0.5
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, False, False, scale=scale
    )[0]
    return out


def register_fa2() -> str:
    """Register an attention in transformers, under a name for which transformers passes
    `cu_seqlens`."""

    def forward(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float,
        cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        q, k, v = (t.transpose(1, 2).squeeze(0) for t in (q, k, v))
        return flash_attention_2(q, k, v, cu_seq_lens_q, int(max_length_q)).unsqueeze(0), None

    ALL_ATTENTION_FUNCTIONS.register("bench_flash_attention_2", forward)
    return "bench_flash_attention_2"


class Peer:
    """Run Hugging Face's tower on the same pixels as float rows."""

    def __init__(self, tower: Any, image_config: ImageConfig, device: torch.device) -> None:
        self.tower, self.image_config, self.device = tower, image_config, device

    def on(
        self, pixels: Tensor, grids: Sequence[Grid], with_layout: bool = False
    ) -> Callable[[], Tensor]:
        rows = Patches(pixels.cpu(), tuple(grids)).to_rows(self.image_config)
        values = rows.to(self.device, torch.bfloat16)
        grid_thw = torch.tensor([[g.t, g.h, g.w] for g in grids], device=self.device)
        layout = their_layout(grid_thw, self.tower.config) if with_layout else {}

        def run() -> Tensor:
            with torch.no_grad():
                done = self.tower(values, grid_thw=grid_thw, **layout)
            tokens: Tensor = done.pooler_output
            return tokens

        return run


def their_layout(grid_thw: Tensor, config: Any) -> dict[str, Any]:
    """Return the values that transformers otherwise computes again on each call, in part on the
    host."""
    window_index, cu_window_seqlens = vision_utils.get_vision_window_index(
        grid_thw, config.spatial_merge_size, config.window_size, config.patch_size
    )
    cu_seqlens, max_seqlen = vision_utils.get_vision_attention_seqlens(grid_thw, config)
    return {
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, config.spatial_merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "window_index": window_index.to(grid_thw.device),
        "cu_window_seqlens": cu_window_seqlens,
        "max_window_seqlen": int(cu_window_seqlens.diff().max()),
    }


class UnfusedAttention:
    """Run our tower with separate kernels for RoPE and FlashAttention-2, in a graph."""

    def __init__(self, timed: TimedTower) -> None:
        self.timed = timed

    def on(self, pixels: Tensor, grids: Sequence[Grid]) -> Callable[[], Any]:
        longest = max(grid.h * grid.w for grid in grids)
        tower = unfused_tower(self.timed.tower, flash_attention_2, longest)
        return graph_of(TimedTower(tower, self.timed.device, self.timed.dtype).eager(pixels, grids))


def compiled(peer: Peer, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, float]:
    """Run FA2 under torch.compile with graphs for one shape, and return the seconds of compilation.
    This is the best case, because the caller passes the layout and no call breaks the graph. The
    result is empty if torch fails.
    """
    torch._dynamo.reset()  # otherwise, torch compiles the second shape for all shapes
    start = time.perf_counter()
    tower = torch.compile(peer.tower, mode="reduce-overhead", dynamic=False)
    fast = Peer(tower, peer.image_config, peer.device)
    run = fast.on(pixels, grids, with_layout=True)
    try:
        for _ in range(3):  # compile, capture, replay
            run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"compiled_ms": interleaved_with_gemm(run, peer.device)[0], "compile_s": seconds}
    except RuntimeError as error:
        print(f"torch.compile failed: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return {}
