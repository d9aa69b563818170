"""Define every kernel whose tile a table contains, with its candidates and its run."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_vit.compare.tolerance import relative_error
from qwen_vit.kernels import IS_KNOWN_GLUON, attention, linear
from qwen_vit.kernels.attention import AttentionTile, RotaryTable
from qwen_vit.kernels.linear import GemmTile
from qwen_vit.layout import Segments, SegmentTiling, tile_table
from tests.support.attention_cases import adjacent, attention_oracle, axial_tables, random_case

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import attention_hopper, linear_hopper

SHARED_BYTES = 232_448  # a program's limit on Hopper; on other GPUs the compiler checks it
COLD_BYTES = 2**27  # rotating weights exceed any L2 cache
HEADS, HEAD_DIM = 16, 80
LONGEST_FRAME = 16_384  # larger inputs have frames of 1,024 patches
CHECKED = {"window": [64] * 20 + [36, 16, 4], "full": [1000, 60, 4, 777, 129]}
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class KeyTile:
    """Hold K_ROWS and NUM_STAGES of the key loop in `attention_hopper`."""

    k_rows: int
    num_stages: int


GLUON, PLAIN, OTHER = "Hopper", "Hopper, Gluon not known", "another GPU"
PLACES = (GLUON, PLAIN, OTHER)
HopperGemmTile = Any  # one of HopperGemmTile, GemmTile, AttentionTile and KeyTile
Run = Callable[[HopperGemmTile, int], tuple[Tensor, ...]]  # (tile, index of the weights) -> results


@dataclass(frozen=True, slots=True)
class Kernel:
    """Describe one kernel whose tile a table contains."""

    name: str
    table: str  # the place of its rows in the source
    places: tuple[str, ...]  # the PLACES that use this kernel
    rows: Mapping[int, HopperGemmTile]  # smallest number of rows -> tile
    candidates: tuple[HopperGemmTile, ...]
    prepare: Callable[[int, torch.device], tuple[int, Run]]  # patches -> (weights, run)
    patches_per_row: int = 1
    has_limits: bool = False  # whether the tile depends on the number of rows
    # The function that returns the result's error, if tiles may change bits.
    check: Callable[[HopperGemmTile, torch.device], float] | None = None

    def present(self, patches: int) -> HopperGemmTile:
        return self.serving(self.rows, patches)

    def serving(self, rows: Mapping[int, HopperGemmTile], patches: int) -> HopperGemmTile:
        return rows[max(least for least in rows if least <= patches // self.patches_per_row)]


# name: (K, rows of the weight, epilogue, patches per row)
GEMMS = {
    "qkv": (1280, 3840, "normed", 1),
    "proj": (1280, 1280, "residual", 1),
    "gate-up": (1280, 6912, "swiglu", 1),
    "down": (3456, 1280, "residual", 1),
    "merger-1": (5120, 5120, "gelu", 4),
    "merger-2": (5120, 3584, "plain", 4),
    "pixels": (640, 1280, "pixels", 1),
}


def prepare_gemm(
    name: str, launch: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype,
    patches: int, device: torch.device,
) -> tuple[int, Run]:  # fmt: skip
    K, N, kind, patches_per_row = GEMMS[name]
    M = patches // patches_per_row
    generator = torch.Generator(device).manual_seed(0)
    operand = torch.float16 if kind == "pixels" and dtype == torch.bfloat16 else dtype

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).mul_(scale).to(operand)

    x = normal(M, K)
    weights = [
        normal(N, K, scale=K**-0.5)
        for _ in range(COLD_BYTES // (N * K * operand.itemsize) + 1)
    ]  # fmt: skip
    bias = normal(N, scale=0.02)
    options: dict[str, Any] = {"epilogue": "plain" if kind in ("normed", "pixels") else kind}
    if kind in ("normed", "swiglu"):  # sums over 128 columns, as a residual leaves them
        chunks = x.float().square().unflatten(1, (-1, 128)).sum(2)
        options |= {"squares": chunks.T.contiguous(), "eps": EPS}
    if kind == "residual":
        options["residual"] = normal(M, N)
    if kind == "pixels":
        bias = bias.float()
        options |= {"out_scale": 2.0**-10, "out_dtype": dtype}

    def run(tile: HopperGemmTile, i_weight: int) -> tuple[Tensor, ...]:
        out, squares = launch(x, weights[i_weight % len(weights)], bias, tile=tile, **options)
        # linear._gemm's chunks of squares have its tile's width, and linear_hopper's always 128.
        own_chunks = kind == "residual" and not isinstance(tile, GemmTile)
        return (out, squares) if own_chunks else (out,)

    return len(weights), run


def prepare_gemms(
    dtype: torch.dtype, patches: int, device: torch.device
) -> tuple[int, Run]:  # fmt: skip
    """Return a block's four GEMMs, which other GPUs run with one tile."""
    prepared = [
        prepare_gemm(name, linear._launch_gemm, dtype, patches, device)
        for name in ("qkv", "proj", "gate-up", "down")
    ]

    def run(tile: HopperGemmTile, i_weight: int) -> tuple[Tensor, ...]:
        return tuple(out for _, one in prepared for out in one(tile, i_weight))

    return max(count for count, _ in prepared), run


def hopper_tiles(kind: str) -> Iterator[HopperGemmTile]:
    """Yield the tiles that fit into shared memory and registers. A warpgroup multiplies 64 or 128
    rows."""
    shapes = ((128, 256, 2), (128, 128, 2), (128, 64, 2), (256, 128, 2), (192, 128, 3))
    for rows, columns, groups in shapes:
        if kind == "residual" and columns < linear_hopper.SQUARES_COLUMNS:
            continue
        result = rows * columns * (1 if kind == "swiglu" else 2)
        for stages in range(2, 8):
            needed = stages * (rows + columns) * linear_hopper.BK * 2 + result + 512
            if needed > SHARED_BYTES:
                break
            is_deepest = needed + (rows + columns) * linear_hopper.BK * 2 > SHARED_BYTES
            if is_deepest or stages >= 4:
                yield linear_hopper.HopperGemmTile(rows, columns, stages, groups)


def gemm_tiles(bits: int) -> Iterator[GemmTile]:
    """Yield tiles with accumulators of 16 to 128 registers a thread. The compiler rejects tiles
    that do not fit."""
    depths, least_stages = ((64,), 3) if bits == 16 else ((32, 64), 2)
    shapes = itertools.product((64, 128), (64, 128, 256), depths, (4, 8), range(least_stages, 5))
    for rows, columns, depth, warps, stages in shapes:
        accumulators = rows * columns // (32 * warps)
        needed = stages * (rows + columns) * depth * bits // 8
        if 16 <= accumulators <= 128 and needed <= SHARED_BYTES:
            yield GemmTile(rows, columns, depth, warps, stages)


def lengths_of(kind: str, patches: int) -> list[int]:
    most = 64 if kind == "window" else patches if patches <= LONGEST_FRAME else 1024
    whole, rest = divmod(patches, most)
    return [most] * whole + [rest] * (rest > 0)


def cut(lengths: Sequence[int], rows: int, device: torch.device) -> Segments:
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tiles = torch.from_numpy(tile_table(np.array(lengths, np.int32), SegmentTiling(rows)))
    return Segments(edges.to(device), tiles.to(device))


def attend(
    qkv: Tensor, rotary: RotaryTable, lengths: Sequence[int], kind: str
) -> Callable[[HopperGemmTile], Tensor]:
    """Return the attention of one layer by tile. A KeyTile excludes the rotation of K."""
    segments = cache(lambda rows: cut(lengths, rows, qkv.device))
    rotated = cache(lambda: attention.rotated_keys(qkv, rotary, adjacent_pairs=True))

    def run(tile: HopperGemmTile) -> Tensor:
        if isinstance(tile, AttentionTile):
            return attention.attention(
                qkv, rotary, segments(tile.q_rows), kind=kind, adjacent_pairs=True, tiles=tile
            )
        assert rotary.index is not None
        out = torch.empty_like(qkv[:, 0])
        attention_hopper.full_attention(
            qkv, rotated(), rotary.cos, rotary.sin, rotary.index,
            segments(attention_hopper.Q_ROWS).tiles, out, HEAD_DIM**-0.5 * attention.LOG2_E,
            k_rows=tile.k_rows, num_stages=tile.num_stages,
        )  # fmt: skip
        return out

    return run


def prepare_attention(
    kind: str, dtype: torch.dtype, patches: int, device: torch.device
) -> tuple[int, Run]:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    shape = (patches, 3, HEADS, HEAD_DIM)
    qkv = torch.randn(shape, device=device, generator=generator).to(dtype)
    index = torch.randint(96, (patches, 2), device=device, generator=generator, dtype=torch.int32)
    angles = torch.rand(96, HEAD_DIM // 4, device=device, generator=generator) * 100
    rotary = RotaryTable(angles.cos(), angles.sin(), index)
    run = attend(qkv, rotary, lengths_of(kind, patches), kind)
    return 1, lambda tile, _: (run(tile),)


def check_attention(
    kind: str, dtype: torch.dtype, tile: HopperGemmTile, device: torch.device
) -> float:
    lengths = CHECKED[kind]
    qkv, _, _, edges = random_case(lengths, HEAD_DIM, 4, device=device, dtype=dtype)
    tables, cos, sin = axial_tables(sum(lengths), HEAD_DIM)
    assert tables.index is not None
    rotary = RotaryTable(tables.cos.to(device), tables.sin.to(device), tables.index.to(device))
    ours = attend(adjacent(qkv), rotary, lengths, kind)(tile)
    return relative_error(ours, attention_oracle(qkv, cos.to(device), sin.to(device), edges))


def attention_tiles(kind: str, bits: int) -> Iterator[AttentionTile]:
    if kind == "window":
        shapes = itertools.product((64,), (64,), (2, 4, 8) if bits == 16 else (4, 8, 16), (1, 2))
    elif bits == 16:
        shapes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    else:
        shapes = itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (1, 2))
    for q_rows, k_rows, warps, stages in shapes:
        if bits == 32 or q_rows >= 16 * warps or kind == "window":  # each warp has 16 rows
            yield AttentionTile(q_rows, k_rows, warps, stages)


def kernels() -> Iterator[Kernel]:
    """Yield every kernel whose tile a table contains, if this Triton supports it."""
    if IS_KNOWN_GLUON:
        for name, (K, _, kind, patches_per_row) in GEMMS.items():
            if kind == "pixels":
                continue
            epilogue = "plain" if kind == "normed" else kind
            key = (epilogue, K > 2048)
            yield Kernel(
                name, f"linear_hopper.TILES[{key}]", (GLUON,), dict(linear_hopper.TILES[key]),
                tuple(hopper_tiles(kind)),
                partial(prepare_gemm, name, linear_hopper.gemm, torch.bfloat16),
                patches_per_row, has_limits=True,
            )  # fmt: skip
        yield Kernel(
            "full", "attention_hopper.K_ROWS, NUM_STAGES", (GLUON,),
            {0: KeyTile(attention_hopper.K_ROWS, attention_hopper.NUM_STAGES)},
            tuple(KeyTile(k, s) for k, most in ((64, 7), (128, 4)) for s in range(2, most)),
            partial(prepare_attention, "full", torch.bfloat16),
            check=partial(check_attention, "full", torch.bfloat16),
        )  # fmt: skip
    for gemm, is_wide in (("merger-1", True), ("pixels", False)):
        yield Kernel(
            f"{gemm}-triton" if is_wide else gemm, f"linear.HOPPER_TILES[{is_wide}]",
            (PLAIN,) if is_wide else (GLUON, PLAIN), dict(linear.HOPPER_TILES[is_wide]),
            tuple(gemm_tiles(16)),
            partial(prepare_gemm, gemm, linear._launch_gemm, torch.bfloat16),
            GEMMS[gemm][3], has_limits=True,
        )  # fmt: skip
    for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
        suffix = "" if bits == 16 else "-fp32"
        for kind in ("window", "full"):
            is_plan_b = bits == 16  # in bf16, Hopper has separate kernels
            yield Kernel(
                f"{kind}-triton" if is_plan_b else kind + suffix,
                f'attention.TILES["{kind}", {bits}]', (PLAIN, OTHER) if is_plan_b else PLACES,
                {0: attention.TILES[kind, bits]}, tuple(attention_tiles(kind, bits)),
                partial(prepare_attention, kind, dtype),
                check=partial(check_attention, kind, dtype),
            )  # fmt: skip
        yield Kernel(
            f"gemms-triton{suffix}", f"linear.FALLBACK_TILES[{bits}]",
            (OTHER,) if bits == 16 else PLACES, {0: linear.FALLBACK_TILES[bits]},
            tuple(gemm_tiles(bits)), partial(prepare_gemms, dtype),
        )  # fmt: skip


KERNELS = {kernel.name: kernel for kernel in kernels()}
