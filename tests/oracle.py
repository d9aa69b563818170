"""The vision tower once more, slow and plain: the truth that every faster path is measured against.

Written from the mathematics, with neither the package nor transformers, so that it shares no
mistake with them. In float64 (the default) nothing is rounded to less: RMSNorm statistics,
rotary angles and softmax included. C channels, H heads, D head dim, N patches.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

Trace = dict[str, Tensor]
RMS_NORM_EPS = 1e-6
SCORES_AT_ONCE = 2**27  # softmax weights held at a time: 1 GB in float64, whatever the image


@dataclass(frozen=True, slots=True)
class Faults:
    """Mistakes an implementation can make; each true one is made on purpose.

    Those marked (one block) are made in a single block, where they are hardest to see.
    """

    swap_row_and_column: bool = False  # rotary angles as [column | row]
    raster_positions: bool = False  # rotary positions in raster order, tokens in grid order
    positions_within_window: bool = False  # rotary positions start again in each window
    interleave_rotary_pairs: bool = False  # pairs (2i, 2i+1) where the weights mean (i, i+R)
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
    drop_merger_bias: bool = False  # the first linear's
    tanh_gelu: bool = False

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


NO_FAULTS = Faults()


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each patch lies, and which patches see one another."""

    order: list[int]  # window order -> grid order: x_window = x_grid[order]
    positions: Tensor  # (N, 2) row and column of each patch, window order
    windows: list[int]  # lengths of the segments of a window block
    frames: list[int]  # lengths of the segments of a full block


def make_plan(grids: Iterable[Any], config: Any, faults: Faults = NO_FAULTS) -> Plan:
    merge, side = config.spatial_merge_size, config.window_px // config.patch_px
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

    def frame_of(patch: int) -> tuple[int, ...]:
        image, frame, *_ = patches[patch]
        if faults.images_attend_to_each_other:
            return ()
        return (image,) if faults.frames_attend_to_each_other else (image, frame)

    # a stable sort by window keeps grid order inside each window, so merge units stay whole
    order = sorted(range(len(patches)), key=window_of)
    windows = [len(list(run)) for _, run in groupby(order, key=window_of)]
    frames = [len(list(run)) for _, run in groupby(order, key=frame_of)]
    positions = torch.tensor([patches[patch][2:] for patch in order])
    if faults.keep_grid_order:
        order = list(range(len(patches)))
        positions = torch.tensor([patch[2:] for patch in patches])
    if faults.raster_positions:
        raster = torch.tensor([patch[2:] for patch in sorted(patches)])
        positions = raster[order]
    if faults.positions_within_window:
        positions = positions % side
    return Plan(order, positions, windows, frames)


def rotary(positions: Tensor, head_dim: int, theta: float, faults: Faults) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, R) in float64, R = D/2 pairs: [row angles | column angles]."""
    if faults.swap_row_and_column:
        positions = positions.flip(-1)
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float64, device=positions.device)
    frequencies = theta ** (-exponents / (head_dim // 2))
    angles = (positions[:, :, None] * frequencies).flatten(1)
    if faults.bf16_rotary_angles:
        angles = angles.to(torch.bfloat16).to(torch.float64)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, faults: Faults) -> Tensor:
    """Turn the pairs (i, i + R) of each head of x (N, H, D) by the angles (N, R)."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if faults.interleave_rotary_pairs:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """RMSNorm, all of it in x's own dtype."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm_reference_casts(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """RMSNorm as Hugging Face rounds it: float32, to x's dtype, and only then times the weight."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_wrong_casts(x: Tensor, weight: Tensor, eps: float = RMS_NORM_EPS) -> Tensor:
    """RMSNorm with one rounding too few: the weight is multiplied in float32."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, pad_to: int = 0
) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each segment, and each token's largest weight.

    q, k, v (N, H, D) -> (N, H, D) and (N, H). Shorter segments get zero keys up to `pad_to`.
    """
    out, largest, start = torch.empty_like(q), q.new_empty(q.shape[:2]), 0
    for length in lengths:
        here = slice(start, start + length)
        start += length
        missing = max(pad_to - length, 0)
        heads_at_once = max(1, SCORES_AT_ONCE // length**2)
        for first in range(0, q.shape[1], heads_at_once):
            h = slice(first, first + heads_at_once)
            qs, ks, vs = (x[here, h].transpose(0, 1) for x in (q, k, v))  # (h, length, D)
            ks, vs = (torch.cat((x, x.new_zeros(len(x), missing, x.shape[2])), 1) for x in (ks, vs))
            weights = (qs @ ks.mT * scale).softmax(-1)
            out[here, h] = (weights @ vs).transpose(0, 1)
            largest[here, h] = weights.amax(-1).T
    return out, largest


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
    """Run the tower and return every stage.

    `tensors` by their published bare names; `rows` (N, 1176), grid order; `grids` as (t, h, w).
    Stages: "patch_embed" (N, C) in grid order; "block.0".. (N, C) in window order; "merger"
    (N / 4, out) in row-major merged cells. `peaks` collects for each block the largest softmax
    weight of every token and head, (N, H). dtype float32 or float64.
    """
    device = rows.device if device is None else torch.device(device)
    heads, head_dim = config.num_heads, config.hidden_size // config.num_heads
    merge_unit, side = config.spatial_merge_size**2, config.window_px // config.patch_px
    eps = 0.0 if faults.no_norm_eps else RMS_NORM_EPS
    scale = 1.0 if faults.no_attention_scale else head_dim**-0.5
    plan = make_plan(grids, config, faults)
    order = torch.tensor(plan.order, device=device)
    cos, sin = rotary(plan.positions.to(device), head_dim, config.rope_theta, faults)
    first_full, last = min(config.fullatt_block_indexes, default=-1), config.depth - 1

    def weight(name: str, dropped: bool = False) -> Tensor:
        tensor = tensors[name].to(device=device, dtype=dtype)
        return torch.zeros_like(tensor) if dropped else tensor

    def dense(x: Tensor, name: str, drop_bias: bool = False) -> Tensor:
        return linear(x, weight(f"{name}.weight"), weight(f"{name}.bias", drop_bias))

    x = rows.to(device=device, dtype=dtype) @ weight("patch_embed.proj.weight").flatten(1).T
    trace = {"patch_embed": x}

    # to window order: merge units move, their 4 patches stay together
    x = x[order]
    for i in range(config.depth):
        block = f"blocks.{i}"
        is_full = i in config.fullatt_block_indexes
        if faults.full_block_as_window and i == first_full:
            is_full = False
        if faults.window_block_as_full and i == last:
            is_full = True
        lengths = plan.frames if is_full else plan.windows
        if faults.cu_seqlens_off_by_one and len(lengths) > 1:
            lengths = [lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1]
        pad_to = side**2 if faults.pad_partial_windows and not is_full else 0

        # attention: one image's frame or window at a time
        normed = rms_norm(x, weight(f"{block}.norm1.weight"), eps)
        qkv = dense(normed, f"{block}.attn.qkv", faults.drop_qkv_bias and i == last)
        q, k, v = qkv.view(-1, 3, heads, head_dim).unbind(1)
        q, k = rotate(q, cos, sin, faults), rotate(k, cos, sin, faults)
        mixed, largest = attend(q, k, v, lengths, scale, pad_to)
        drop = faults.drop_proj_bias and i == last
        x = x + dense(mixed.flatten(1), f"{block}.attn.proj", drop)
        if peaks is not None:
            peaks.append(largest)

        # gated MLP
        normed = rms_norm(x, weight(f"{block}.norm2.weight"), eps)
        gate = dense(normed, f"{block}.mlp.gate_proj", faults.drop_gate_bias and i == last)
        gated = silu(gate) * dense(normed, f"{block}.mlp.up_proj")
        x = x + dense(gated, f"{block}.mlp.down_proj", faults.drop_down_bias and i == last)
        trace[f"block.{i}"] = x

    # merger: 4 neighbouring patches become one token, then back to row-major
    x = rms_norm(x, weight("merger.ln_q.weight"), eps).reshape(len(x) // merge_unit, -1)
    x = dense(x, "merger.mlp.0", faults.drop_merger_bias)
    x = dense(gelu(x, approximate="tanh" if faults.tanh_gelu else "none"), "merger.mlp.2")
    if not faults.skip_inverse_order:
        x = x[order[::merge_unit].argsort()]
    trace["merger"] = x
    return trace


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, Frobenius, in float64; NaN anywhere gives infinity."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    b = b.double()
    error = float((a.to(b) - b).norm() / b.norm())
    return error if error == error else float("inf")


def pixel_rows(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pixels (N, 588: one still frame, or N, 1176: two) -> float32 rows (N, 1176)."""
    frames = pixels.double().view(len(pixels), len(mean), -1, 14 * 14)  # 1 or 2 frames
    centre, spread = (torch.tensor(x).double().view(-1, 1, 1) for x in (mean, std))
    return ((frames / 255 - centre) / spread).expand(-1, -1, 2, -1).flatten(1).float()


def read_checkpoint(folder: Path | str) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """Tensors under their bare names and the vision config of a folder such as weights/tiny."""
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
