"""Time the e4m3 MLP on this GPU, and measure its error against float64 and its bits.

Every part runs alone, within about a minute. `gemms` times the variants of each GEMM beside the
bf16 GEMM that they replace. `tower` times the 7B-shaped tower in fp8 and bf16, interleaved, and
Hugging Face's. `error` measures both errors and Hugging Face's, for 8 seeds and three families of
random weights. `bits` compares images alone with the same images in random batches, also beside an
image with NaN. It prints a table and a JSON line for each part. --ledger appends these lines.

\b
    python -m tools.benchmarks.fp8 --part gemms
    python -m tools.benchmarks.fp8 --part tower --ledger tools/benchmarks/ledger.jsonl
"""

import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from qwen_vit.benchmark import WORKLOADS, TimedTower, in_batches, random_pixels, tower_flops
from qwen_vit.checkpoint.convert import convert
from qwen_vit.compare.oracle import Oracle
from qwen_vit.compare.tolerance import MAX_FP8_RATIO, Difference, relative_error
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.images.patches import Patches
from qwen_vit.kernels import IS_KNOWN_GLUON, linear, linear_fp8
from qwen_vit.kernels.linear import GemmTile
from qwen_vit.model import VisionTower
from qwen_vit.weight_format import QuantizedRows
from tests.support.fp8_cases import Fp8Case
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.linear_cases import EPS, random_case
from tests.support.tower_timing import graph_of
from tests.support.towers import layout_for, random_grids, tower_trace
from tools.benchmarks.tower_peers import Peer, register_fa2
from tools.common import four_digits, ledger_options, ledger_row, publish, require_gpu
from tools.random_tower import FAMILIES, SHAPE, random_weights

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_fp8_hopper, linear_hopper
    from qwen_vit.kernels.linear_hopper import HopperGemmTile

PARTS = ("gemms", "tower", "error", "bits")
ROWS = (1024, 2304, 4096, 9216, 32768)
TIMED = ("1 x 448^2", "32 x 448^2", "4 x 1344^2", "256 mixed")
COLD_BYTES = 2**27  # a graph's weights exceed the L2 cache
ERROR_GRIDS = (Grid(1, 32, 32), Grid(1, 10, 14), Grid(1, 2, 30))


@dataclass(frozen=True, slots=True)
class Variant:
    """Name one kernel with one tile, for one of the three GEMMs."""

    gemm: str  # "gate-up", "down" or "proj"
    is_hopper: bool
    tile: Any

    @property
    def name(self) -> str:
        rows, columns, *rest = astuple(self.tile)
        kind = "gluon" if self.is_hopper else "triton"
        return f"{kind} {rows}x{columns} {'/'.join(map(str, rest))}"

    def run(self, case: Fp8Case) -> tuple[Tensor, Tensor]:
        launch = linear_fp8_hopper.gemm if self.is_hopper else linear_fp8.launch_gemm
        return launch(
            case.rows, case.weight, case.bias, epilogue=EPILOGUES[self.gemm], tile=self.tile,
            **case.operands,
        )  # fmt: skip


EPILOGUES = {"gate-up": "swiglu", "down": "residual"}


def variants() -> list[Variant]:
    """Return every variant that this Triton supports."""
    found: list[Variant] = []
    if IS_KNOWN_GLUON:
        found += [
            Variant("gate-up", True, HopperGemmTile(128, 256, 4, 2)),
            Variant("gate-up", True, HopperGemmTile(128, 256, 3, 2)),
            Variant("down", True, HopperGemmTile(128, 128, 5, 2)),
            Variant("down", True, HopperGemmTile(192, 128, 4, 3)),
            Variant("proj", True, HopperGemmTile(128, 128, 6, 2)),
            Variant("proj", True, HopperGemmTile(192, 128, 4, 3)),
        ]
    return [
        *found,
        Variant("gate-up", False, GemmTile(64, 256, 128, 8, 2)),
        Variant("gate-up", False, GemmTile(128, 256, 128, 8, 3)),
        Variant("down", False, GemmTile(128, 128, 128, 8, 2)),
        Variant("down", False, GemmTile(128, 128, 128, 8, 4)),
        Variant("proj", False, linear.QUANTIZING),
    ]


def projection(M: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = random_case(M, 1280, 1280, dtype=torch.bfloat16, device=device)
    return x, weight, bias, torch.randn(M, 1280, device=device).bfloat16()


def times_of(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each run, interleaved in a rotating order."""
    names = list(runs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runs[name]()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        if turn >= 2:  # the first are warm-ups
            for name, begin, end in events:
                found[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in found.items()}


def gemms(device: torch.device, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Time each variant and the bf16 GEMM that it replaces, with weights outside the cache."""
    table = []
    for M, gemm in itertools.product(rows, ("gate-up", "down", "proj")):
        runs: dict[str, Callable[[], Any]] = {}
        calls = 0
        for variant in variants():
            if variant.gemm != gemm:
                continue
            if gemm == "proj":
                x, weight, bias, before = projection(M, device)
                weights = [weight.clone() for _ in range(COLD_BYTES // weight.nbytes + 1)]
                launch = linear_hopper.gemm if variant.is_hopper else linear._launch_gemm
                made = QuantizedRows.empty(M, 1280, device)
                calls_of: list[Callable[[], Any]] = [
                    partial(
                        launch, x, w, bias, epilogue="residual", residual=before, quantized=made,
                        tile=variant.tile,
                    )
                    for w in weights
                ]  # fmt: skip
            else:
                case = Fp8Case.random(EPILOGUES[gemm], M, device=device)
                weights = [
                    case.weight[0].clone() for _ in range(COLD_BYTES // case.weight[0].nbytes + 1)
                ]
                calls_of = [
                    partial(variant.run, replace(case, weight=(w, case.weight[1]))) for w in weights
                ]
            calls = len(calls_of)
            runs[variant.name] = graph_of(partial(_all, calls_of))
        runs["bf16"] = graph_of(partial(_all, _bf16_calls(gemm, M, device, calls)))
        times = times_of(runs, 7)
        for name, ms in times.items():
            table.append(
                {
                    "gemm": gemm, "rows": M, "variant": name, "us": four_digits(ms * 1e3 / calls),
                    "x_bf16": four_digits(ms / times["bf16"]),
                }
            )  # fmt: skip
        torch.cuda.empty_cache()
    return table


def _all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


def _bf16_calls(gemm: str, M: int, device: torch.device, calls: int) -> list[Callable[[], Any]]:
    K, N = {"gate-up": (1280, 6912), "down": (3456, 1280), "proj": (1280, 1280)}[gemm]
    x = torch.randn(M, K, device=device).bfloat16()
    weights = [(torch.randn(N, K, device=device) * K**-0.5).bfloat16() for _ in range(calls)]
    bias = torch.randn(N, device=device).bfloat16()
    options: dict[str, Any]
    if gemm == "gate-up":
        squares = x.float().square().unflatten(1, (-1, 128)).sum(2).T.contiguous()
        options = {"epilogue": "swiglu", "squares": squares, "eps": EPS}
    else:
        options = {"epilogue": "residual", "residual": torch.randn(M, N, device=device).bfloat16()}
    launch = linear_hopper.gemm if linear._is_for_hopper(x, weights[0]) else linear._launch_gemm
    return [partial(launch, x, weight, bias, **options) for weight in weights]


def tower_on(
    device: torch.device, tensors: Mapping[str, Tensor], config: VisionConfig, quantization: Any
) -> VisionTower:
    """Return our tower in bfloat16. The device converts the weights."""
    with torch.device("meta"):
        tower = VisionTower(config, torch.bfloat16, quantization)
    image_config = ImageConfig.from_json({})
    state = convert(
        tensors, config, image_config, torch.bfloat16, device, quantization=quantization
    )
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval()


class Towers:
    """Hold our tower in bf16 and fp8, and Hugging Face's, with the same random weights."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.config, self.image_config = VisionConfig.from_json(SHAPE), ImageConfig.from_json({})
        self.bf16, self.fp8 = (
            tower_on(device, tensors, self.config, kind) for kind in (None, "fp8")
        )
        self.theirs = hf_tower(dict(tensors), self.config, torch.bfloat16, device)


def tower_times(
    device: torch.device, workloads: Sequence[str], rounds: int, *, with_peers: bool
) -> list[dict[str, Any]]:
    """Time both towers by graph, interleaved. Hugging Face's run between them, fewer times."""
    towers = Towers(random_weights(VisionConfig.from_json(SHAPE), 0, device), device)
    timed = {
        name: TimedTower(tower, device, torch.bfloat16)
        for name, tower in (("bf16", towers.bf16), ("fp8", towers.fp8))
    }
    peer = Peer(towers.theirs, towers.image_config, device)
    rows = []
    for name in workloads:
        batches = in_batches(WORKLOADS[name])
        pixels = [random_pixels(batch, towers.config, device) for batch in batches]
        runs: dict[str, Callable[[], Any]] = {}
        for kind, tower in timed.items():
            parts = [tower.by_graph(p, b) for p, b in zip(pixels, batches, strict=True)]
            if not all(bool(part().isfinite().all()) for part in parts):
                raise click.ClickException(f"{kind} gives NaN or infinity at {name}")
            runs[kind] = partial(_all, parts)
        distance = relative_error(timed["fp8"].by_graph(pixels[0], batches[0])(),
                                  timed["bf16"].by_graph(pixels[0], batches[0])())  # fmt: skip
        times = times_of(runs, max(5, rounds if len(batches) == 1 else rounds // 4))
        row = {
            "workload": name, "bf16_ms": times["bf16"], "fp8_ms": times["fp8"],
            "x_bf16": times["fp8"] / times["bf16"], "fp8_to_bf16": distance,
            "fp8_tflops": tower_flops(towers.config, WORKLOADS[name]) / times["fp8"] / 1e9,
        }  # fmt: skip
        if with_peers:
            some = list(zip(pixels, batches, strict=True))[:2]
            share = sum(len(p) for p, _ in some) / sum(len(p) for p in pixels)
            for label, attention in (("hf_sdpa", "sdpa"), ("hf_fa2", register_fa2())):
                towers.theirs.config._attn_implementation = attention
                run = partial(_all, [peer.on(p, b) for p, b in some])
                row[f"{label}_ms"] = times_of({"hf": run}, 2)["hf"] / share
        rows.append({k: four_digits(v) if isinstance(v, float) else v for k, v in row.items()})
        print(row, file=sys.stderr)
    return rows


def errors(
    device: torch.device, seeds: int, families: Sequence[str], until: float
) -> list[dict[str, Any]]:
    """Measure ours in bf16 and fp8, and Hugging Face's, at every stage against float64."""
    config, image_config = VisionConfig.from_json(SHAPE), ImageConfig.from_json({})
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in families}
    for seed, family in itertools.product(range(seeds), families):
        if time.monotonic() > until:
            print(f"error: time is up at seed {seed}, {family}", file=sys.stderr)
            break
        tensors = FAMILIES[family](random_weights(config, seed, device), seed)
        towers = Towers(tensors, device)
        n_patches = sum(grid.n_patches for grid in ERROR_GRIDS)
        generator = torch.Generator().manual_seed(1000 + seed)
        pixels = torch.randint(0, 256, (n_patches, 588), generator=generator).byte()
        rows = Patches(pixels, ERROR_GRIDS).to_rows(image_config).to(device)
        traces = {
            "bf16": tower_trace(towers.bf16, pixels.to(device), ERROR_GRIDS),
            "fp8": tower_trace(towers.fp8, pixels.to(device), ERROR_GRIDS),
            "hf": hf_trace(towers.theirs, rows, ERROR_GRIDS),
        }
        stages = {}
        for stage, truth in Oracle(tensors, config, device=device).stages(rows, ERROR_GRIDS):
            each = {name: relative_error(trace[stage], truth) for name, trace in traces.items()}
            cosine = Difference.between(traces["fp8"][stage], truth.float()).worst_cosine
            stages[stage] = {**each, "ratio": each["fp8"] / each["hf"], "cosine": cosine}
        found[family].append(stages)
    return [_error_row(family, runs) for family, runs in found.items() if runs]


def _error_row(family: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged = [stage for stage in runs[0] if stage != "patch_embed"]
    worst = max((run[stage]["ratio"], stage) for run in runs for stage in judged)
    means = {
        stage: math.exp(statistics.fmean(math.log(run[stage]["ratio"]) for run in runs))
        for stage in judged
    }
    merger = {
        kind: statistics.fmean(run["merger"][kind] for run in runs)
        for kind in ("hf", "bf16", "fp8")
    }
    return {
        "family": family, "seeds": len(runs), "worst_ratio": four_digits(worst[0]),
        "worst_stage": worst[1], "holds": worst[0] <= MAX_FP8_RATIO,
        "first_ratio": four_digits(means["block.0"]),
        "middle_ratio": four_digits(means[judged[len(judged) // 2]]),
        "merger_ratio": four_digits(means["merger"]),
        "merger_errors": {kind: four_digits(value) for kind, value in merger.items()},
        "worst_cosine": min(run[stage]["cosine"] for run in runs for stage in judged),
        "merger_cosine": min(run["merger"]["cosine"] for run in runs),
        "means": {stage: four_digits(mean) for stage, mean in means.items()},
    }  # fmt: skip


def bits(device: torch.device, batches: int, until: float) -> dict[str, Any]:
    """Compare images alone with the same images in random batches, and among images with NaN."""
    config = VisionConfig.from_json({**SHAPE, "depth": 2, "fullatt_block_indexes": [1]})
    tower = tower_on(device, random_weights(config, 0, device), config, "fp8")
    chance = random.Random(0)
    grids = [Grid(*g) for g in random_grids(chance, 30_000, side=24) if g[0] == 1]
    rows = [torch.randn(grid.n_patches, 1176, device=device) for grid in grids]

    def encode(which: Sequence[int], poisoned: int | None = None) -> list[Tensor]:
        chosen = [grids[i] for i in which]
        values = [rows[i] for i in which]
        if poisoned is not None:
            values[poisoned] = values[poisoned].clone()
            values[poisoned][0, 0] = float("nan") if chance.random() < 0.5 else float("inf")
        layout = layout_for(chosen, config, device, torch.bfloat16)
        with torch.no_grad():
            merged = tower(torch.cat(values), layout)
        return list(merged.split([grid.n_patches // 4 for grid in chosen]))

    alone = [encode([i])[0] for i in range(len(grids))]
    counts = {"batches": 0, "images": 0, "different": 0, "poisoned": 0, "unflagged": 0, "spread": 0}
    while counts["batches"] < batches and time.monotonic() < until:
        which = [chance.randrange(len(grids)) for _ in range(chance.randint(1, 12))]
        poisoned = chance.randrange(len(which)) if counts["batches"] % 10 == 9 else None
        for place, (i, got) in enumerate(zip(which, encode(which, poisoned), strict=True)):
            if place == poisoned:
                counts["poisoned"] += 1
                counts["unflagged"] += bool(got.isfinite().all())
                continue
            different = not torch.equal(got, alone[i])
            counts["images"] += 1
            counts["spread" if poisoned is not None else "different"] += different
        counts["batches"] += 1
    return counts


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an aligned text table; their first row names the columns."""
    if not rows:
        return "nothing measured"
    names = [name for name in rows[0] if name != "means"]
    cells = [names, *[[str(row.get(name, "")) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
                     for line in cells)  # fmt: skip


@click.command(help=__doc__)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS),
              help="Run this part. Repeatable. Default: all.")  # fmt: skip
@click.option("--rows", "row_counts", multiple=True, type=int,
              help="Time the GEMMs at this number of patches. Repeatable.")  # fmt: skip
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)),
              help="Time this workload. Repeatable.")  # fmt: skip
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)),
              help="Measure the error with these weights. Repeatable. Default: all.")  # fmt: skip
@click.option("--seeds", default=8, show_default=True, help="Number of seeds of the errors.")
@click.option("--batches", default=2000, show_default=True, help="Number of random batches.")
@click.option("--rounds", default=21, show_default=True, help="Number of timings of a tower.")
@click.option("--peers/--no-peers", default=True, help="Also time Hugging Face.")
@click.option("--seconds", default=75.0, show_default=True, help="Time limit of one part.")
@ledger_options
def main(
    parts: tuple[str, ...], row_counts: tuple[int, ...], workloads: tuple[str, ...],
    families: tuple[str, ...], seeds: int, batches: int, rounds: int, peers: bool,
    seconds: float, ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    device, texts = require_gpu(), []
    for part in parts or PARTS:
        begin = time.monotonic()
        found: Any
        if part == "gemms":
            found = gemms(device, row_counts or ROWS)
        elif part == "tower":
            found = tower_times(device, workloads or TIMED, rounds, with_peers=peers)
        elif part == "error":
            found = errors(device, seeds, families or tuple(FAMILIES), begin + seconds)
        else:
            found = [bits(device, batches, begin + seconds)]
        took = time.monotonic() - begin
        line = ledger_row("fp8 " + part, commit, device, ("triton", "transformers"), rows=found)
        publish(line, ledger)
        texts.append(f"{part} ({took:.0f} s)\n{table(found)}")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
