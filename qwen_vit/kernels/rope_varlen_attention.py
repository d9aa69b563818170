"""Provide the attention as a public function that checks tensors and cuts segments into tiles."""

import torch

from qwen_vit.common.arguments import typed_repr
from qwen_vit.common.tensors import odd_kind, resolved
from qwen_vit.errors import ArgumentError
from qwen_vit.kernels.attention import HEAD_DIMS, RotaryTable, attention, tiling
from qwen_vit.layout import Segments, SegmentTiling, tile_table

__all__ = ["fused_rope_varlen_attention"]


def fused_rope_varlen_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Apply RoPE to Q and K, and attend within consecutive segments.

    >>> qkv = torch.randn(10, 3, 2, 80)
    >>> angles = torch.rand(10, 40)
    >>> cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    >>> fused_rope_varlen_attention(qkv, angles.cos(), angles.sin(), cu_seqlens).shape
    torch.Size([10, 2, 80])

    A GPU computes in bfloat16 or float32 (IEEE, never TF32). On a CPU, qwen_vit interprets the
    kernel in float32. The softmax scale is D ** -0.5. The function has no gradient.

    Args:
        qkv: (N, 3, H, D), the fused projection's output. The kernel reads a contiguous tensor in
            place. D is even: 16 to 128 on a GPU, 2 to 1,024 on a CPU.
        cos: (N, D / 2) float32. Pair j rotates dims j and j + D / 2.
        sin: (N, D / 2) float32, in the order of `cos`.
        cu_seqlens: (S + 1,) int32 or int64, non-decreasing, from 0 to at most N. On a GPU, the
            function does not copy the values to the host, so wrong values give wrong results
            instead of an error.

    Returns:
        (N, H, D) in qkv's dtype. The rows from index `cu_seqlens[-1]` onward are uninitialised.

    Raises:
        ArgumentError: An argument is not a dense tensor with the shape and dtype in `Args`, or is
            not on the device of `qkv`. `cu_seqlens` has wrong values, which the function checks
            only on a CPU.
    """
    _check_arguments(qkv, cos, sin, cu_seqlens)
    cut = tiling(qkv.device, qkv.dtype, "full")
    if qkv.device.type == "cpu":
        lengths = cu_seqlens.diff().to(torch.int32)
        tiles = torch.from_numpy(tile_table(lengths.numpy(), cut))
    else:
        tiles = _tile_table_on_device(cu_seqlens, len(qkv), cut)
    segments = Segments(cu_seqlens, tiles)
    rotary = RotaryTable(resolved(cos).contiguous(), resolved(sin).contiguous())
    return attention(
        resolved(qkv).contiguous(), rotary, segments, kind="full", adjacent_pairs=False
    )


def _tile_table_on_device(
    cu_seqlens: torch.Tensor, n_rows: int, cut: SegmentTiling
) -> torch.Tensor:
    """Compute the tiles of `layout.tile_table` on the device, but in the order of the segments.

    The host does not know the lengths, so the last tiles may be empty.
    """
    cu_seqlens = cu_seqlens.clamp(0, n_rows)  # wrong values must not address rows outside qkv
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    tiles_before = ((ends - starts + cut.rows - 1) // cut.rows).cumsum(0)
    capacity = n_rows // cut.rows + len(starts)
    tile = torch.arange(capacity, device=cu_seqlens.device)
    segment = torch.searchsorted(tiles_before, tile, right=True)
    is_spare = segment == len(starts)
    segment = segment.clamp(max=len(starts) - 1)
    index_in_segment = tile - torch.where(segment > 0, tiles_before[segment - 1], 0)
    q_start = starts[segment] + index_in_segment * cut.rows
    q_end = torch.minimum(q_start + cut.rows, ends[segment])
    table = torch.stack([q_start, q_end, starts[segment], ends[segment]], dim=1)
    return table.masked_fill(is_spare[:, None], 0).to(torch.int32)


def _check_arguments(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    given = {"qkv": qkv, "cos": cos, "sin": sin, "cu_seqlens": cu_seqlens}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name} is {typed_repr(value)}", expected="a torch tensor")
        if kind := odd_kind(value):
            raise ArgumentError(
                f"{name} is a {kind} tensor",
                expected="a dense tensor on a CUDA GPU or the CPU",
                remedy="convert or move the tensor first",
            )
    if qkv.device.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"qkv is on {qkv.device}", expected="a CUDA GPU or the CPU", remedy="move the tensor"
        )
    minimum, maximum = HEAD_DIMS[qkv.device.type]
    is_fused = qkv.dim() == 4 and qkv.shape[1] == 3 and qkv.shape[2] > 0
    if not is_fused or qkv.shape[3] % 2 or not minimum <= qkv.shape[3] <= maximum:
        raise ArgumentError(
            f"qkv has shape {tuple(qkv.shape)}",
            expected=f"(N, 3, heads, head_dim) with an even head_dim of {minimum} to {maximum}",
            remedy="reshape the fused projection's output",
        )
    N, _, _, D = qkv.shape
    supported = (torch.float32,) if qkv.device.type == "cpu" else (torch.float32, torch.bfloat16)
    if qkv.dtype not in supported:
        raise ArgumentError(
            f"qkv is {qkv.dtype} on {qkv.device}",
            expected=" or ".join(map(str, supported)),
            remedy="convert it first",
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (N, D // 2) or table.dtype != torch.float32:
            raise ArgumentError(
                f"{name} is {table.dtype} of shape {tuple(table.shape)}",
                expected=f"torch.float32 of shape {(N, D // 2)}: one angle per rotary pair",
            )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}",
            expected="int32 or int64 of shape (segments + 1,)",
        )
    if len(cu_seqlens) < 2:
        raise ArgumentError("cu_seqlens has no segment", expected="at least [0, N]")
    for name, tensor in (("cos", cos), ("sin", sin), ("cu_seqlens", cu_seqlens)):
        if tensor.device != qkv.device:
            raise ArgumentError(
                f"{name} is on {tensor.device} and qkv on {qkv.device}",
                remedy=f"move it to {qkv.device}",
            )
    if qkv.device.type == "cpu":
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) > N or bool((steps < 0).any()):
            raise ArgumentError(
                f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}",
                expected=f"non-decreasing values from 0 to {N}, the rows of qkv",
            )
