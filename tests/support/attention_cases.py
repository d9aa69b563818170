"""Provide random cases for the attention kernel, its float64 oracle, and Hugging Face's
attention."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen_vit import layout as layout_module
from qwen_vit.checkpoint.convert import rotary_permutation
from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.rope_varlen_attention import (
    _tile_table_on_device,
)
from qwen_vit.layout import Segments, SegmentTiling, tile_table
from tests.support.towers import CPU


def attention_oracle(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `fused_rope_varlen_attention` in float64. Rows outside all segments are 0."""
    q, k, v = qkv.double().unbind(1)  # (N, H, D)
    c, s = cos.double()[:, None], sin.double()[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    q, k, out = rotate(q), rotate(k), torch.zeros_like(v)
    edges = cu_seqlens.tolist()
    for start, end in itertools.pairwise(edges):
        qs, ks, vs = (x[start:end].transpose(0, 1) for x in (q, k, v))  # (H, length, D)
        weights = (qs @ ks.mT * qkv.shape[-1] ** -0.5).softmax(-1)
        out[start:end] = (weights @ vs).transpose(0, 1)
    return out


def stock_attention(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute attention like Hugging Face: RoPE in fp32, a cast back, and PyTorch's attention per
    segment."""
    q, k, v = qkv.unbind(1)
    c, s = cos.repeat(1, 2)[:, None], sin.repeat(1, 2)[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return (x.float() * c + torch.cat((-b, a), dim=-1) * s).to(x.dtype)

    q, k, out = rotate(q), rotate(k), torch.zeros_like(v)
    edges = cu_seqlens.tolist()
    for start, end in itertools.pairwise(edges):
        qs, ks, vs = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out[start:end] = scaled_dot_product_attention(qs, ks, vs)[0].transpose(0, 1)
    return out


def offsets(lengths: Sequence[int], device: torch.device = CPU) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def random_case(
    lengths: Sequence[int],
    head_dim: int,
    n_heads: int,
    *,
    seed: int = 0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (qkv, cos, sin, cu_seqlens) with large Q and K, so that the softmax is peaked."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, n_heads, head_dim, generator=generator) * 1.5
    angles = torch.rand(sum(lengths), head_dim // 2, generator=generator) * 100
    return (
        qkv.to(device, dtype),
        angles.cos().to(device),
        angles.sin().to(device),
        offsets(lengths, device),
    )


def segments_of(
    lengths: Sequence[int], tiling: SegmentTiling, device: torch.device = CPU
) -> Segments:
    segments = layout_module._segments(np.array(lengths, np.int32), tiling)
    return Segments(*(getattr(segments, name).to(device) for name in Segments.__slots__))


def adjacent(qkv: Tensor) -> Tensor:
    """Return the same qkv with rotary pair j of Q and K at dims (2j, 2j + 1), as in the loader."""
    qkv = qkv.clone()
    qkv[:, :2] = qkv[:, :2, :, rotary_permutation(qkv.shape[-1]).to(qkv.device)]
    return qkv


def tower_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int], kind: str = "full"
) -> Tensor:
    """Return the tower's call, with adjacent pairs, tiles from a layout, and angles by axis.
    Hopper's kernels need angles by axis. Each row has two separate table rows.
    """
    segments = segments_of(lengths, kernels.tiling(qkv.device, qkv.dtype, kind), qkv.device)
    places = torch.arange(2 * len(cos), dtype=torch.int32, device=cos.device).view(-1, 2)
    rotary = RotaryTable(cos.reshape(2 * len(cos), -1), sin.reshape(2 * len(sin), -1), places)
    return attention(adjacent(qkv), rotary, segments, kind=kind, adjacent_pairs=True)


def axial_tables(n: int, head_dim: int, seed: int = 0) -> tuple[RotaryTable, Tensor, Tensor]:
    """Return random rows of small tables, and the angles of each token: row, then column."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 50, (n, 2), generator=generator, dtype=torch.int32)
    frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 4)
    table = torch.arange(50)[:, None] * frequencies
    per_token = torch.cat((table[index[:, 0].long()], table[index[:, 1].long()]), dim=1)
    return RotaryTable(table.cos(), table.sin(), index), per_token.cos(), per_token.sin()


LENGTHS = {
    "one-row": [1],
    "63": [63],
    "65": [65],
    "111": [111],
    "1024": [1024],
    "1025": [1025],
    "windows": [64, 64, 32, 16, 64, 8, 4],
    "tiny-segments": [1, 2, 3, 4, 5, 4, 3, 2, 1] * 9,
    "one-long": [5, 1200, 7],
    "long-then-tiny": [1500, *[4] * 30],
}


def assert_device_table_equals_hosts(
    lengths: Sequence[int], rows: int, device: torch.device
) -> None:
    """Check that both tables have the same tiles. The host's table begins with the longest segment,
    and the device's spare tiles are 0."""
    cut = SegmentTiling(rows)
    table = _tile_table_on_device(offsets(lengths, device), sum(lengths), cut).cpu()
    used = table[table[:, 1] > table[:, 0]]
    assert torch.equal(table[len(used) :], torch.zeros_like(table[len(used) :]))
    hosts = tile_table(np.array(lengths, np.int32), cut)
    assert sorted(used.tolist()) == sorted(hosts.tolist())
