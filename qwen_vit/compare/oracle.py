"""Compute the vision tower in plain float64, as the reference for every faster path.

Read this file for the plain mathematics. The oracle uses neither the package's network nor
transformers, so it shares no code with either. In float64 (the default) every step is in float64,
including RMSNorm statistics, rotary angles and softmax. The oracle converts one weight at a time
and computes one stage at a time, so it never holds the whole tower in float64.

C channels, H heads, D head dim, N patches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

__all__ = ["Oracle", "PatchOrder", "Trace"]

Trace = dict[str, Tensor]  # stage -> its values

RMS_NORM_EPS = 1e-6
SCORES_AT_ONCE = 2**27  # softmax weights that are computed at once: 1 GiB in float64


@dataclass(frozen=True, slots=True)
class PatchOrder:
    """Hold the order of the patches, and the segments in which they attend to each other."""

    order: list[int]  # window order -> grid order: x_window = x_grid[order]
    positions: Tensor  # (N, 2) row and column of each patch, window order
    windows: list[int]  # lengths of the segments of a window block
    frames: list[int]  # lengths of the segments of a full block


class Oracle:
    """Compute the tower in float64. Each step is a method, so that a test can break one step.

    >>> oracle = Oracle(checkpoint.tensors, checkpoint.config)  # doctest: +SKIP
    >>> for stage, values in oracle.stages(pixel_values, [(1, 32, 32)]):  # doctest: +SKIP
    ...     print(stage, values.shape)

    `tensors` have their published names, without the prefix. `config` is a VisionConfig. `dtype` is
    float64, or float32 for comparisons. Source: "Qwen2.5-VL Technical Report" (arXiv:2502.13923),
    section 2.1.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Any,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tensors = tensors
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.head_dim: int = config.hidden_size // config.num_heads

    @torch.no_grad()
    def stages(self, rows: Tensor, grids: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values of every stage of the tower.

        `rows` are (N, 1176) in grid order, and `grids` are Grid objects or tuples (t, h, w). The
        stage "patch_embed" is (N, C) in grid order. The stages "block.0", ... are (N, C) in window
        order. The stage "merger" is (N / 4, out) in row-major order.
        """
        plan = self.plan(grids)
        order = torch.tensor(plan.order, device=self.device)
        angles = self.angles(plan.positions.to(self.device))
        cos, sin = angles.cos(), angles.sin()
        rows = rows.to(device=self.device, dtype=self.dtype)
        x = rows @ self.weight("patch_embed.proj.weight").flatten(1).T
        yield "patch_embed", x

        # to window order: merge units move, their 4 patches stay together
        x = x[order]
        for i in range(self.config.depth):
            block = f"blocks.{i}"

            # attention: one image's frame or window at a time
            normed = self.rms_norm(x, self.weight(f"{block}.norm1.weight"))
            qkv = self.dense(normed, f"{block}.attn.qkv")
            q, k, v = qkv.view(-1, 3, self.config.num_heads, self.head_dim).unbind(1)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            mixed = self.attend(q, k, v, self.segments(plan, i))
            x = x + self.dense(mixed.flatten(1), f"{block}.attn.proj")

            # gated MLP
            normed = self.rms_norm(x, self.weight(f"{block}.norm2.weight"))
            gate = self.dense(normed, f"{block}.mlp.gate_proj")
            gated = silu(gate) * self.dense(normed, f"{block}.mlp.up_proj")
            x = x + self.dense(gated, f"{block}.mlp.down_proj")
            yield f"block.{i}", x

        # merger: 4 neighbouring patches become one token, then back to row-major
        merge_unit = self.config.spatial_merge_size**2
        x = self.rms_norm(x, self.weight("merger.ln_q.weight"))
        x = self.dense(x.reshape(len(x) // merge_unit, -1), "merger.mlp.0")
        x = self.dense(self.gelu(x), "merger.mlp.2")
        yield "merger", self.row_major(x, order[::merge_unit])

    def trace(self, rows: Tensor, grids: Iterable[Any]) -> Trace:
        return dict(self.stages(rows, grids))

    def plan(self, grids: Iterable[Any]) -> PatchOrder:
        merge = self.config.spatial_merge_size
        side = self.config.window_px // self.config.patch_px
        sizes = [(g.t, g.h, g.w) if hasattr(g, "t") else tuple(g) for g in grids]
        patches = [  # (image, frame, row, column), grid order: 2x2 merge blocks contiguous
            (image, frame, block_row + row, block_column + column)
            for image, (t, h, w) in enumerate(sizes)
            for frame in range(t)
            for block_row in range(0, h, merge)
            for block_column in range(0, w, merge)
            for row in range(merge)
            for column in range(merge)
        ]

        def window_of(patch: int) -> tuple[int, ...]:
            image, frame, row, column = patches[patch]
            return image, frame, row // side, column // side

        # a stable sort by window keeps grid order inside each window, so merge units stay whole
        order = sorted(range(len(patches)), key=window_of)
        return PatchOrder(
            order,
            torch.tensor([patches[patch][2:] for patch in order]),
            [len(list(run)) for _, run in groupby(order, key=window_of)],
            [len(list(run)) for _, run in groupby(patches, key=lambda patch: patch[:2])],
        )

    def segments(self, plan: PatchOrder, block: int) -> list[int]:
        """Return the lengths of the segments in which patches attend to each other in a block."""
        return plan.frames if block in self.config.fullatt_block_indexes else plan.windows

    def weight(self, name: str) -> Tensor:
        return self.tensors[name].to(device=self.device, dtype=self.dtype)

    def dense(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply RMSNorm entirely in x's dtype."""
        return x / (x.square().mean(-1, keepdim=True) + RMS_NORM_EPS).sqrt() * weight

    def angles(self, positions: Tensor) -> Tensor:
        """Return rotary angles (N, R) in float64, R = D/2 pairs: [by the row | by the column]."""
        pairs = self.head_dim // 2
        exponents = torch.arange(0, pairs, 2, dtype=torch.float64, device=positions.device)
        frequencies: Tensor = self.config.rope_theta ** (-exponents / pairs)
        return (positions[:, :, None] * frequencies).flatten(1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply RoPE to the pairs (i, i + R) of each head of x (N, H, D), with angles (N, R)."""
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """Apply softmax attention inside each segment. q, k, v and the result are (N, H, D)."""
        out, start = torch.empty_like(q), 0
        for length in lengths:
            keys, values = (x[start : start + length].transpose(0, 1) for x in (k, v))
            rows_at_once = max(1, SCORES_AT_ONCE // (q.shape[1] * length))
            for first in range(start, start + length, rows_at_once):
                rows = slice(first, min(first + rows_at_once, start + length))
                weights = self.softmax(q[rows].transpose(0, 1), keys)  # (H, rows, length)
                out[rows] = (weights @ values).transpose(0, 1)
            start += length
        return out

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        """Return attention weights of queries (H, rows, D) over a segment's keys (H, length, D)."""
        scores: Tensor = q @ k.mT * self.head_dim**-0.5
        return scores.softmax(-1)

    def gelu(self, x: Tensor) -> Tensor:
        return gelu(x)

    def row_major(self, x: Tensor, order: Tensor) -> Tensor:
        """Return merged tokens in row-major order. `order` has the grid-order index of each token's
        first patch."""
        return x[order.argsort()]
