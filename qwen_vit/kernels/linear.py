"""Linear layers with what follows them in the epilogue, and the RMSNorm with the sum before it.

On a GPU a product is one Triton kernel whose accumulation order over K is fixed: each output row
depends on its own input row alone, whatever the batch and whatever the tile, so an image's
embedding has the same bits alone and in any company. The plain products of the published shapes
are cuBLAS's on Hopper, from the number of rows on at which it gives the very same bits (tested at
every token budget). On a CPU the same functions are PyTorch's.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["add_rms_norm", "linear", "rms_norm"]


@dataclass(frozen=True, slots=True)
class GemmTile:
    """One reviewed row: rows x columns x depth of a tile, and how the compiler schedules it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


HOPPER = 9
SMALL = GemmTile(64, 128, 64, 4, 3)  # 3 programs fit one multiprocessor
SQUARE = GemmTile(128, 128, 64, 4, 3)  # 2 fit: one stores while the other multiplies
DEEP = GemmTile(128, 128, 64, 4, 4)
WIDE = GemmTile(128, 256, 64, 8, 3)

# What follows was measured on an H200 at 1,024 to 32,768 patches (tools/NOTES.md). A layer of the
# tower is told by its weight: N > 2048 is wide, K > 2048 is deep. Each entry holds from how many
# rows on a tile is used. Rows may choose, because all tiles agree bit for bit (tested).
# (epilogue, wide, deep) -> ((least rows, tile), ...)
HOPPER_TILES: dict[tuple[str, bool, bool], tuple[tuple[int, GemmTile], ...]] = {
    ("plain", True, False): ((0, SQUARE),),  # qkv
    ("plain", False, False): ((0, SQUARE), (1536, SMALL), (6144, SQUARE)),  # proj, patch embedding
    ("plain", False, True): ((0, SQUARE), (1536, SMALL), (3072, DEEP), (6144, WIDE)),  # down
    ("plain", True, True): ((0, SMALL), (768, DEEP), (1536, WIDE)),  # merger, a row per 4 patches
    ("swiglu", True, False): ((0, GemmTile(128, 64, 64, 4, 3)),),  # gate and up
}
FALLBACK_TILES = {
    16: GemmTile(128, 64, 32, 4, 3),
    32: GemmTile(64, 64, 32, 8, 2),
}
# (K, N) of the published plain products, where cuBLAS was compared with `_gemm` bit for bit, and
# the rows from which it was: with fewer it may cut K into parts that are summed apart.
CUBLAS_SHAPES = frozenset(
    [(1280, 3840), (1280, 1280), (3456, 1280)]  # qkv, proj, down
    + [(5120, out) for out in (2048, 3584, 5120, 8192)]  # the merger's last
)
CUBLAS_LEAST_ROWS = 256
GROUPED_ROW_TILES = 8  # tiles of this many row blocks run together and share weights in L2


@triton.jit
def _gemm(
    x, weight, bias, out, M, N, out_scale,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out (M, N) = epilogue(x (M, K) @ weight (N, K)^T * out_scale + bias).

    All but `bias` are tensor descriptors, which cut tiles at the edges. With the SwiGLU, weight
    holds N gate rows, then N up rows, and both products share the tile of x.
    """
    i_program = tl.program_id(0)
    n_row_tiles = tl.cdiv(M, BM)
    n_column_tiles = tl.cdiv(N, BN)
    group_size = GROUP * n_column_tiles
    first_row_tile = i_program // group_size * GROUP
    group_rows = min(n_row_tiles - first_row_tile, GROUP)
    i_m = (first_row_tile + i_program % group_size % group_rows) * BM
    i_n = i_program % group_size // group_rows * BN

    acc = tl.zeros([BM, BN], tl.float32)
    if EPILOGUE == "swiglu":
        acc_up = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, K, BK):
            b_x = x.load([i_m, i_k])  # [BM, BK]
            b_gate = weight.load([i_n, i_k])  # [BN, BK]
            b_up = weight.load([N + i_n, i_k])
            acc = tl.dot(b_x, b_gate.T, acc, input_precision=PRECISION)
            acc_up = tl.dot(b_x, b_up.T, acc_up, input_precision=PRECISION)
    else:
        for i_k in range(0, K, BK):
            b_x = x.load([i_m, i_k])
            b_weight = weight.load([i_n, i_k])
            acc = tl.dot(b_x, b_weight.T, acc, input_precision=PRECISION)

    o_n = i_n + tl.arange(0, BN)
    acc = acc * out_scale
    if HAS_BIAS:
        acc += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "swiglu":
        acc_up = acc_up * out_scale
        if HAS_BIAS:
            acc_up += tl.load(bias + N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    if EPILOGUE == "gelu":
        acc = acc * 0.5 * (1.0 + tl.erf(acc * 0.7071067811865476))  # exact, never the tanh form
    out.store([i_m, i_n], acc.to(out.dtype))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    epilogue: str = "plain",
    out_scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`epilogue(x @ weight.T * out_scale + bias)`, rounded once: (M, K) -> (M, N).

    Epilogues: `plain`; `gelu`, the exact one; `swiglu`, where weight (2N, K) holds gate rows, then
    up rows, and the result is silu(gate) * up.
    """
    out_dtype = out_dtype or x.dtype
    if x.device.type == "cpu":
        return _linear_on_cpu(x, weight, bias, epilogue, out_scale, out_dtype)
    M, K = x.shape
    is_plain = epilogue == "plain" and out_scale == 1.0 and out_dtype == x.dtype
    if is_plain and _is_equal_in_cublas(x, weight):
        return F.linear(x, weight, bias)
    N = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device=x.device)
    if M == 0:
        return out
    tile = _gemm_tile(x, weight, epilogue)
    out_block = [tile.rows, tile.columns]
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)
    with torch.cuda.device(x.device):
        _gemm[grid](
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            bias,
            TensorDescriptor.from_tensor(out, out_block),
            M, N, out_scale, K=K,
            HAS_BIAS=bias is not None, EPILOGUE=epilogue,
            PRECISION="ieee", BM=tile.rows, BN=tile.columns, BK=tile.depth,
            GROUP=GROUPED_ROW_TILES, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _linear_on_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epilogue: str,
    out_scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    y = F.linear(x, weight) * out_scale if out_scale != 1.0 else F.linear(x, weight, bias)
    if out_scale != 1.0 and bias is not None:
        y = y + bias
    if epilogue == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    elif epilogue == "gelu":
        y = F.gelu(y)
    return y.to(out_dtype)


def _gemm_tile(x: torch.Tensor, weight: torch.Tensor, epilogue: str) -> GemmTile:
    bits = x.dtype.itemsize * 8
    N, K = weight.shape
    kind = ("swiglu" if epilogue == "swiglu" else "plain", N > 2048, K > 2048)
    if _capability(x.device)[0] != HOPPER or bits != 16 or kind not in HOPPER_TILES:
        return FALLBACK_TILES[bits]
    return next(tile for least_rows, tile in reversed(HOPPER_TILES[kind]) if len(x) >= least_rows)


def _is_equal_in_cublas(x: torch.Tensor, weight: torch.Tensor) -> bool:
    N, K = weight.shape
    return (
        x.dtype == torch.bfloat16
        and len(x) >= CUBLAS_LEAST_ROWS
        and (K, N) in CUBLAS_SHAPES
        and _capability(x.device)[0] == HOPPER
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def _rms_norm(
    x, update, weight, x_out, out,
    HAS_UPDATE: tl.constexpr, C: tl.constexpr, C_PADDED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One row: the sum, rounded; statistics in fp32; the cast to the input's dtype; the weight."""
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, C_PADDED)
    m_c = o_c < C
    b_x = tl.load(x + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        b_x += tl.load(update + i_row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_sum = b_x.to(out.dtype.element_ty)
        tl.store(x_out + i_row * C + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + EPS)
    b_x = (b_x * scale).to(out.dtype.element_ty)
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0)
    tl.store(out + i_row * C + o_c, b_x * b_weight, mask=m_c)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x)` cast to x's dtype, then times `weight`: (N, C) -> (N, C).

    The cast comes before the weight, as in transformers' Qwen2_5_VLRMSNorm; in bf16 that shows.
    """
    if x.device.type == "cpu":
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _launch_rms_norm(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + update`, rounded, and its `rms_norm`, in one pass: (N, C), (N, C) -> (N, C), (N, C)."""
    if x.device.type == "cpu":
        x = x + update
        return x, rms_norm(x, weight, eps)
    return _launch_rms_norm(x, update, weight, eps)


def _launch_rms_norm(
    x: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    N, C = x.shape
    x_out = x if update is None else torch.empty_like(x)
    out = torch.empty_like(x)
    if N:
        with torch.cuda.device(x.device):
            _rms_norm[(N,)](
                x, update, weight, x_out, out, HAS_UPDATE=update is not None,
                C=C, C_PADDED=triton.next_power_of_2(C), EPS=eps, num_warps=4,
            )  # fmt: skip
    return x_out, out
