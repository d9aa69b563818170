"""Sweep the tiles of the kernels' tables on this GPU, and propose rows without changing files.

It tests every GEMM and attention of the 7B-shaped tower at each number of patches. It compiles and
runs each candidate in a child process, which may fail or crash. If tiles must not change bits, the
result must have the bits of the current row. Otherwise its error against float64 must be as small.
It times passing candidates in interleaved CUDA graphs, with weights outside the cache. It prints a
table and the rows to paste.

\b
    python -m tools.tune --list                             # what would be tried; needs no GPU
    python -m tools.tune --only down --only proj --rows 1024,4096
"""

import itertools
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from qwen_vit.compare.tolerance import relative_error
from qwen_vit.kernels import IS_KNOWN_GLUON, attention, linear
from qwen_vit.kernels.attention import AttentionTile, RotaryTable
from qwen_vit.kernels.linear import GemmTile
from qwen_vit.layout import Segments, SegmentTiling, tile_table
from tests.support.attention_cases import adjacent, attention_oracle, axial_tables, random_case
from tests.support.subprocess_pool import outcomes

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import attention_hopper, linear_hopper

SHARED_BYTES = 232_448  # that one program may take on Hopper; elsewhere the compiler refuses
COLD_BYTES = 2**27  # of weights taken in turn: more than any L2 cache holds
MIN_CALLS = 8  # in one graph
ROUNDS, WARM_UPS = 9, 2
HEADS, HEAD_DIM = 16, 80
LONGEST_FRAME = 16_384  # above it, frames of 1,024 patches
MORE_ERROR = 1.05  # than the present row's, for an attention that adds in another order
CHECKED = {"window": [64] * 20 + [36, 16, 4], "full": [1000, 60, 4, 777, 129]}
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class KeyTile:
    """How `attention_hopper` walks over the keys: K_ROWS and NUM_STAGES."""

    k_rows: int
    num_stages: int


GLUON, PLAIN, OTHER = "Hopper", "Hopper, Gluon not known", "another GPU"
PLACES = (GLUON, PLAIN, OTHER)
HopperGemmTile = Any  # linear_hopper.HopperGemmTile, GemmTile, AttentionTile or KeyTile
Run = Callable[[HopperGemmTile, int], tuple[Tensor, ...]]  # with one of the weights


@dataclass(frozen=True, slots=True)
class Kernel:
    """Describe one kernel whose tile a table contains."""

    name: str
    table: str  # where its rows are
    places: tuple[str, ...]  # those of PLACES where it serves
    rows: Mapping[int, HopperGemmTile]  # from how many rows on which tile serves
    candidates: tuple[HopperGemmTile, ...]
    prepare: Callable[[int, torch.device], tuple[int, Run]]  # patches -> (weights, run)
    patches_per_row: int = 1
    has_limits: bool = False  # the table holds tiles by number of rows, not one for all
    check: Callable[[HopperGemmTile, torch.device], float] | None = (
        None  # its error, where bits may differ
    )

    def present(self, patches: int) -> HopperGemmTile:
        return self.serving(self.rows, patches)

    def serving(self, rows: Mapping[int, HopperGemmTile], patches: int) -> HopperGemmTile:
        return rows[max(least for least in rows if least <= patches // self.patches_per_row)]


# GEMMs -------------------------------------------------------------------------------------------

# K, rows of the weight, what follows, patches of one row
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
    if kind in ("normed", "swiglu"):  # in chunks of 128 columns, as a residual leaves them
        chunks = x.float().square().unflatten(1, (-1, 128)).sum(2)
        options |= {"squares": chunks.T.contiguous(), "eps": EPS}
    if kind == "residual":
        options["residual"] = normal(M, N)
    if kind == "pixels":
        bias = bias.float()
        options |= {"out_scale": 2.0**-10, "out_dtype": dtype}

    def run(tile: HopperGemmTile, i_weight: int) -> tuple[Tensor, ...]:
        out, squares = launch(x, weights[i_weight % len(weights)], bias, tile=tile, **options)
        # linear._gemm's chunks of squares are as wide as its tile, linear_hopper's always 128
        own_chunks = kind == "residual" and not isinstance(tile, GemmTile)
        return (out, squares) if own_chunks else (out,)

    return len(weights), run


def prepare_gemms(
    dtype: torch.dtype, patches: int, device: torch.device
) -> tuple[int, Run]:  # fmt: skip
    """A block's four, which other GPUs run with one tile."""
    prepared = [
        prepare_gemm(name, linear._launch_gemm, dtype, patches, device)
        for name in ("qkv", "proj", "gate-up", "down")
    ]

    def run(tile: HopperGemmTile, i_weight: int) -> tuple[Tensor, ...]:
        return tuple(out for _, one in prepared for out in one(tile, i_weight))

    return max(count for count, _ in prepared), run


def hopper_tiles(kind: str) -> Iterator[HopperGemmTile]:
    """What fits shared memory and registers; a warpgroup multiplies 64 or 128 rows."""
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
    """Accumulators of 16 to 128 registers a thread; the compiler refuses what does not fit."""
    depths, least_stages = ((64,), 3) if bits == 16 else ((32, 64), 2)
    shapes = itertools.product((64, 128), (64, 128, 256), depths, (4, 8), range(least_stages, 5))
    for rows, columns, depth, warps, stages in shapes:
        accumulators = rows * columns // (32 * warps)
        needed = stages * (rows + columns) * depth * bits // 8
        if 16 <= accumulators <= 128 and needed <= SHARED_BYTES:
            yield GemmTile(rows, columns, depth, warps, stages)


# Attention ---------------------------------------------------------------------------------------


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
    """The attention of one layer, by tile; for a KeyTile without K's rotation."""
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
        if bits == 32 or q_rows >= 16 * warps or kind == "window":  # 16 rows for each warp
            yield AttentionTile(q_rows, k_rows, warps, stages)


# -------------------------------------------------------------------------------------------------


def kernels() -> Iterator[Kernel]:
    """Return every kernel whose tile a table contains, if this Triton supports it."""
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
            is_plan_b = bits == 16  # Hopper has kernels of its own
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


def try_out(name: str, tile: HopperGemmTile, patches: Sequence[int]) -> tuple[float, list[bool]]:
    """(error, whether the bits are the present row's at each size); raises where it fails."""
    kernel, device = KERNELS[name], torch.device("cuda", 0)
    error = 0.0 if kernel.check is None else kernel.check(tile, device)
    same = []
    for n in patches:
        _, run = kernel.prepare(n, device)
        ours, present = run(tile, 0), run(kernel.present(n), 0)
        same.append(all(torch.equal(a, b) for a, b in zip(ours, present, strict=True)))
        if not all(bool(values.isfinite().all()) for values in ours):
            raise ArithmeticError("NaN or infinity in the result")
    return error, same


def sound(
    kernel: Kernel, patches: Sequence[int], jobs: int, seconds: float
) -> tuple[dict[HopperGemmTile, list[bool]], Counter[str]]:
    """Candidates that pass, with the sizes where their bits are the present row's; what failed."""
    present = list(dict.fromkeys(kernel.present(n) for n in patches))
    others = [tile for tile in kernel.candidates if tile not in present]
    good: dict[HopperGemmTile, list[bool]] = {}
    failed: Counter[str] = Counter()
    allowed = 0.0
    for tiles in (present, others):  # the present ones first: the others are held against them
        arguments = [(kernel.name, tile, patches) for tile in tiles]
        for i, outcome in outcomes(try_out, arguments, at_once=jobs, seconds=seconds):
            problem = outcome.problem
            if problem is None:
                error, same = outcome.value
                if tiles is present:
                    allowed = max(allowed, error * MORE_ERROR)
                elif kernel.check is not None and not error <= allowed:
                    problem = f"{error:.2e} from float64, allowed {allowed:.2e}"
                elif kernel.check is None and not all(same):
                    problem = "other bits than the present row"
            if problem is None:
                good[tiles[i]] = same
                continue
            print(f"{kernel.name}: {tiles[i]}: {problem}", file=sys.stderr)
            failed[problem.split(":")[0]] += 1
            if tiles is present:
                raise click.ClickException(f"the present row of {kernel.name} fails: {problem}")
    return good, failed


def timed(
    kernel: Kernel, tiles: Sequence[HopperGemmTile], patches: int
) -> dict[HopperGemmTile, float]:
    """Median microseconds of one call, all candidates in turns so that they share the clocks."""
    device = torch.device("cuda", 0)
    n_weights, run = kernel.prepare(patches, device)
    calls = max(n_weights, MIN_CALLS)
    graphs = {}
    stream = torch.cuda.Stream()
    for tile in tiles:
        graphs[tile] = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run(tile, 0)
            with torch.cuda.graph(graphs[tile], stream=stream):
                for i in range(calls):
                    run(tile, i)
    times: dict[HopperGemmTile, list[float]] = {tile: [] for tile in tiles}
    order = list(tiles)
    for turn in range(WARM_UPS + ROUNDS):
        events = []
        for tile in order[turn % len(order) :] + order[: turn % len(order)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[tile].replay()
            end.record()
            events.append((tile, start, end))
        torch.cuda.synchronize()
        if turn >= WARM_UPS:
            for tile, start, end in events:
                times[tile].append(start.elapsed_time(end) * 1e3 / calls)
    return {tile: statistics.median(values) for tile, values in times.items()}


def proposed(
    kernel: Kernel, measured: Mapping[int, Mapping[HopperGemmTile, float]], least_gain: float
) -> dict[int, HopperGemmTile]:
    """Rows for the table: another tile only where it gains enough over the present one.

    Where a table has one row, its tile is the best over all sizes together. Limits lie between two
    measured sizes, at their geometric mean.
    """
    if not kernel.has_limits:
        return {0: best_for_all(kernel.rows[0], measured, least_gain)}
    rows: dict[int, HopperGemmTile] = {}
    before = None
    for patches in sorted(measured):
        times, present = measured[patches], kernel.present(patches)
        tile = min(times, key=times.__getitem__)
        if times[present] / times[tile] < 1 + least_gain:
            tile = present
        if before is None:
            rows[0] = tile
        elif tile != rows[max(rows)]:
            middle = math.sqrt(before * patches) / kernel.patches_per_row
            rows[round(middle / 256) * 256] = tile
        before = patches
    return rows


def best_for_all(
    present: HopperGemmTile,
    measured: Mapping[int, Mapping[HopperGemmTile, float]],
    least_gain: float,
) -> HopperGemmTile:
    def gain(tile: HopperGemmTile) -> float:
        ratios = [times[present] / times[tile] for times in measured.values()]
        return statistics.geometric_mean(ratios)

    common = set[HopperGemmTile].intersection(*(set(times) for times in measured.values()))
    best = max(sorted(common, key=str), key=gain)
    return best if gain(best) >= 1 + least_gain else present


def short(tile: HopperGemmTile) -> str:
    return "x".join(str(value) for value in asdict(tile).values())


def chosen(only: Iterable[str], on_hopper: bool) -> list[Kernel]:
    """Those asked for, else what a GPU of this kind runs in bf16."""
    place = OTHER if not on_hopper else GLUON if IS_KNOWN_GLUON else PLAIN
    names = list(only) or [
        kernel.name
        for kernel in KERNELS.values()
        if place in kernel.places and not kernel.name.endswith("fp32")
    ]
    return [KERNELS[name] for name in names]


def listed(kernel: Kernel, patches: Sequence[int]) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "table": kernel.table,
        "present": {n: asdict(kernel.present(n)) for n in patches},
        "candidates": [asdict(tile) for tile in kernel.candidates],
    }


def sweep(
    kernel: Kernel, patches: Sequence[int], jobs: int, seconds: float, least_gain: float
) -> dict[str, Any]:
    """Sweep one kernel, and return the results as JSON."""
    good, failed = sound(kernel, patches, jobs, seconds)
    print(f"{kernel.name}: {len(good)} sound, {sum(failed.values())} skipped", file=sys.stderr)
    measured = {n: timed(kernel, list(good), n) for n in patches}
    rows = []
    for i, n in enumerate(patches):
        times, present = measured[n], kernel.present(n)
        best = min(times, key=times.__getitem__)
        rows.append(
            {
                "patches": n,
                "present": asdict(present),
                "present_us": round(times[present], 2),
                "best": asdict(best),
                "best_us": round(times[best], 2),
                "gain": round(times[present] / times[best] - 1, 4),
                "same_bits": good[best][i],
                "all_us": {short(tile): round(us, 2) for tile, us in times.items()},
            }
        )
    new = proposed(kernel, measured, least_gain)
    paste = ", ".join(f"({least}, {tile!r})" for least, tile in new.items())
    is_new = any(kernel.serving(new, n) != kernel.present(n) for n in patches)
    return {
        "kernel": kernel.name,
        "table": kernel.table,
        "skipped": dict(failed),
        "rows": rows,
        "proposed": paste if is_new else None,
    }


def as_table(swept: Sequence[Mapping[str, Any]]) -> str:
    line = "{:<16}{:>8}  {:<20}{:>10}  {:<20}{:>10}{:>8}  {}"
    head = ("kernel", "patches", "present", "us", "best", "us", "gain", "bits")
    lines = [line.format(*head)]
    for each in swept:
        for row in each["rows"]:
            best, present = ("x".join(map(str, row[k].values())) for k in ("best", "present"))
            lines.append(
                line.format(
                    each["kernel"], row["patches"], present, f"{row['present_us']:.1f}", best,
                    f"{row['best_us']:.1f}", f"{row['gain']:+.1%}",
                    "same" if row["same_bits"] else "other",
                )
            )  # fmt: skip
        for problem, count in each["skipped"].items():
            lines.append(f"    {count} skipped: {problem}")
    lines.append("\nProposed rows (from how many rows on, tile); the others stay:")
    for each in swept:
        if each["proposed"] is not None:
            lines.append(f"{each['table']}  # {each['kernel']}\n    {each['proposed']}")
    return "\n".join(lines)


def numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} contains no numbers, expected 1024,4096") from None
    if any(n < 4 or n % 4 for n in found):
        raise click.BadParameter(f"{value!r}: patches come in fours")
    return tuple(sorted(set(found)))


@click.command(help=__doc__)
@click.option(
    "--only", multiple=True, type=click.Choice(list(KERNELS)), help="Tune this kernel. Repeatable."
)
@click.option("--rows", "patches", default="1024,2304,4096,9216,32768", callback=numbers,
              show_default=True, help="Set the numbers of patches.")  # fmt: skip
@click.option(
    "--least-gain", default=0.02, show_default=True, help="Keep the current row below this gain."
)
@click.option(
    "--jobs", type=int, help="Number of concurrent candidates.  [default: one per core, at most 12]"
)
@click.option(
    "--seconds", default=120.0, show_default=True, help="Set the time limit of one candidate."
)
@click.option("--list", "only_list", is_flag=True, help="Print the candidates without a run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    only: tuple[str, ...], patches: tuple[int, ...], least_gain: float, jobs: int | None,
    seconds: float, only_list: bool, as_json: bool,
) -> None:  # fmt: skip
    has_gpu = torch.cuda.is_available()
    on_hopper = not has_gpu or torch.cuda.get_device_capability(0) == (9, 0)
    selected = chosen(only, on_hopper)
    if only_list:
        rows = [listed(kernel, patches) for kernel in selected]
        if as_json:
            print(json.dumps(rows))
            return
        for kernel in selected:
            print(f"{kernel.name:<22}{len(kernel.candidates):>4} candidates  {kernel.table}")
            for n in patches:
                print(f"{n:>12} patches: {kernel.present(n)}")
        return
    if not has_gpu:
        raise click.ClickException("this needs an NVIDIA GPU: torch sees none; try --list")
    if not on_hopper and any(OTHER not in kernel.places for kernel in selected):
        raise click.ClickException("--only names a kernel for Hopper, which this GPU is not")
    jobs = jobs or min(12, os.cpu_count() or 1)
    swept = [sweep(kernel, patches, jobs, seconds, least_gain) for kernel in selected]
    document = {
        "what": "tune",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "kernels": swept,
    }
    print(json.dumps(document) if as_json else as_table(swept))


if __name__ == "__main__":
    main()
