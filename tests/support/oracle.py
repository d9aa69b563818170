"""Provide the package's float64 oracle as a function, with deliberate mistakes and separate readers
of its inputs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu

from qwen_vit.compare.oracle import RMS_NORM_EPS, Oracle, PatchOrder, Trace
from qwen_vit.compare.tolerance import relative_error

__all__ = [
    "Faults",
    "FaultyOracle",
    "Trace",
    "pixel_rows",
    "read_checkpoint",
    "relative_error",
    "rms_norm_reference_casts",
    "rms_norm_wrong_casts",
    "vision_oracle",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Faults:
    """Select deliberate mistakes of an implementation. Each True field makes its mistake. Mistakes
    with the mark (one block) occur in a single block, where they are hardest to detect.
    """

    swap_row_and_column: bool = False  # rotary angles as [column | row]
    raster_positions: bool = False  # rotary positions in raster order, tokens in grid order
    positions_within_window: bool = False  # rotary positions start again in each window
    interleave_rotary_pairs: bool = False  # pairs (2i, 2i+1) instead of (i, i+R)
    bf16_rotary_angles: bool = False
    keep_grid_order: bool = False  # windows cut from grid order
    skip_inverse_order: bool = False  # merged tokens stay in window order
    cu_seqlens_off_by_one: bool = False  # each inner boundary one patch late
    full_block_as_window: bool = False  # (one block)
    window_block_as_full: bool = False  # (one block)
    frames_attend_to_each_other: bool = False
    images_attend_to_each_other: bool = False
    pad_partial_windows: bool = False  # zero keys and values take part in the softmax
    no_attention_scale: bool = False
    no_norm_eps: bool = False
    drop_qkv_bias: bool = False  # (one block)
    drop_proj_bias: bool = False  # (one block)
    drop_gate_bias: bool = False  # (one block)
    drop_down_bias: bool = False  # (one block)
    drop_merger_bias: bool = False  # of the first linear layer
    tanh_gelu: bool = False

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


NO_FAULTS = Faults()


class FaultyOracle(Oracle):
    """Compute the oracle with the mistakes of the chosen faults."""

    def __init__(self, *arguments: Any, faults: Faults = NO_FAULTS, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.faults = faults
        self.is_window_block = False  # whether the current block has windows
        self.peaks: list[Tensor] = []

    def plan(self, grids: Iterable[Any]) -> PatchOrder:
        sizes = [(g.t, g.h, g.w) if hasattr(g, "t") else tuple(g) for g in grids]
        right, faults = super().plan(sizes), self.faults
        order, positions = torch.tensor(right.order), right.positions
        in_grid_order = positions[order.argsort()]
        if faults.keep_grid_order:
            order, positions = torch.arange(len(order)), in_grid_order
        if faults.raster_positions:
            raster = [(r, c) for t, h, w in sizes for _ in range(t) for r in range(h)
                      for c in range(w)]  # fmt: skip
            positions = torch.tensor(raster)[order]
        if faults.positions_within_window:
            positions = positions % (self.config.window_px // self.config.patch_px)
        frames = right.frames
        if faults.frames_attend_to_each_other:
            frames = [t * h * w for t, h, w in sizes]
        if faults.images_attend_to_each_other:
            frames = [len(order)]
        return replace(right, order=order.tolist(), positions=positions, frames=frames)

    def segments(self, plan: PatchOrder, block: int) -> list[int]:
        full, last = self.config.fullatt_block_indexes, self.config.depth - 1
        is_full = block in full
        if self.faults.full_block_as_window and block == min(full, default=-1):
            is_full = False
        if self.faults.window_block_as_full and block == last:
            is_full = True
        self.is_window_block = not is_full
        lengths = plan.frames if is_full else plan.windows
        if self.faults.cu_seqlens_off_by_one and len(lengths) > 1:
            return [lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1]
        return lengths

    def weight(self, name: str) -> Tensor:
        right, faults, last = super().weight(name), self.faults, f"blocks.{self.config.depth - 1}."
        dropped = {
            f"{last}attn.qkv.bias": faults.drop_qkv_bias,
            f"{last}attn.proj.bias": faults.drop_proj_bias,
            f"{last}mlp.gate_proj.bias": faults.drop_gate_bias,
            f"{last}mlp.down_proj.bias": faults.drop_down_bias,
            "merger.mlp.0.bias": faults.drop_merger_bias,
        }
        return torch.zeros_like(right) if dropped.get(name) else right

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.faults.no_norm_eps:
            return x / x.square().mean(-1, keepdim=True).sqrt() * weight
        return super().rms_norm(x, weight)

    def angles(self, positions: Tensor) -> Tensor:
        if self.faults.swap_row_and_column:
            positions = positions.flip(-1)
        right = super().angles(positions)
        return right.bfloat16().double() if self.faults.bf16_rotary_angles else right

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.faults.interleave_rotary_pairs:
            halves = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
            a, b = super().rotate(halves, cos, sin).chunk(2, dim=-1)
            return torch.stack((a, b), dim=-1).flatten(-2)
        return super().rotate(x, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        self.peaks.append(q.new_empty(0, q.shape[1]))
        return super().attend(q, k, v, lengths)

    def softmax(self, q: Tensor, k: Tensor) -> Tensor:
        n_keys = k.shape[1]
        if self.faults.pad_partial_windows and self.is_window_block:
            missing = max((self.config.window_px // self.config.patch_px) ** 2 - n_keys, 0)
            k = torch.cat((k, k.new_zeros(len(k), missing, k.shape[2])), 1)
        if self.faults.no_attention_scale:
            q = q * self.head_dim**0.5
        weights = super().softmax(q, k)[..., :n_keys]  # padding also has zero values
        self.peaks[-1] = torch.cat((self.peaks[-1], weights.amax(-1).T))
        return weights

    def gelu(self, x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh") if self.faults.tanh_gelu else super().gelu(x)

    def row_major(self, x: Tensor, order: Tensor) -> Tensor:
        return x if self.faults.skip_inverse_order else super().row_major(x, order)


def vision_oracle(
    tensors: Mapping[str, Tensor],
    config: Any,
    rows: Tensor,
    grids: Iterable[Any],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    faults: Faults = NO_FAULTS,
    peaks: list[Tensor] | None = None,
) -> Trace:
    """Run the tower and return every stage. `qwen_vit.compare.oracle` defines names and shapes.

    `peaks` collects for each block the largest softmax weight of every token and head, (N, H).
    """
    oracle = FaultyOracle(
        tensors, config, dtype=dtype, device=rows.device if device is None else device,
        faults=faults,
    )  # fmt: skip
    trace = oracle.trace(rows, grids)
    if peaks is not None:
        peaks += oracle.peaks
    return trace


def rms_norm_reference_casts(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """Compute RMSNorm with Hugging Face's rounding: float32, a cast to x's dtype, and then the
    weight."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_wrong_casts(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """Compute RMSNorm with one missing rounding, because it multiplies by the weight in float32."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def pixel_rows(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 pixels (N, 588 for one still frame, or N, 1176 for two) to float32 rows (N,
    1176)."""
    frames = pixels.double().view(len(pixels), len(mean), -1, 14 * 14)  # 1 or 2 frames
    centre, spread = (torch.tensor(x).double().view(-1, 1, 1) for x in (mean, std))
    return ((frames / 255 - centre) / spread).expand(-1, -1, 2, -1).flatten(1).float()


def read_checkpoint(folder: Path | str) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """Return the tensors by their names without prefix, and the vision config, of a folder such as
    weights/tiny."""
    vision = json.loads((Path(folder) / "config.json").read_text())["vision_config"]
    config = SimpleNamespace(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        num_heads=vision["num_heads"],
        intermediate_size=vision["intermediate_size"],
        out_hidden_size=vision["out_hidden_size"],
        in_channels=vision["in_chans"],
        patch_px=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        window_px=vision["window_size"],
        fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
        rope_theta=10000.0,
    )
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name.removeprefix("visual."): tensor for name, tensor in tensors.items()}, config
