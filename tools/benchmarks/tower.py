"""Time the whole tower, and the attention alone, against the alternatives, in one run.

It times the 7B-shaped tower in bf16 with random weights on one GPU, with inputs on the GPU. The
results are medians of GPU times. The roofline divides the tower's operations by the rate of an
interleaved 8192^3 GEMM of random data. It prints no speed for a tower that disagrees with float64.
It prints tables and one JSON line. --ledger appends that line to a file, and --chart draws it.

\b
    python -m tools.benchmarks.tower --ledger tools/benchmarks/ledger.jsonl --chart docs/speed.png
    python -m tools.benchmarks.tower --workload "1 x 448^2" --compile "1 x 448^2"
    python -m tools.benchmarks.tower --part start    # from a process's start to its first embedding
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from qwen_vit.benchmark import (
    WORKLOADS,
    TimedTower,
    in_batches,
    interleaved_with_gemm,
    median_ms,
    random_pixels,
    stage_work,
    tower_flops,
)
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.images.patches import Patches
from qwen_vit.kernels import plain_kernels, uses_hopper_kernels
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.layout import Segments
from tests.support.huggingface import hf_tower
from tests.support.oracle import relative_error, vision_oracle
from tests.support.tower_timing import (
    copy_rate,
    gemm_rate,
    graph_of,
    launches,
    on_a_cool_gpu,
    stage_runs,
)
from tests.support.towers import build_tower, layout_for
from tests.support.unfused_baseline import rotated
from tools.benchmarks.start import starts
from tools.benchmarks.tower_peers import (
    Peer,
    UnfusedAttention,
    compiled,
    flash_attention_2,
    register_fa2,
)
from tools.benchmarks.tower_report import (
    UNFUSED,
    attention_text,
    draw,
    stages_text,
    starts_text,
    tower_text,
)
from tools.common import four_digits, ledger_options, ledger_row, publish, require_gpu
from tools.random_tower import SHAPE, random_weights, write_model

PEER_BATCHES = 3  # batches of the stream; sdpa takes half a second for each
ALONE = ("1 x 448^2", "1 x 672^2", "1 x 896^2", "1 x 1344^2", "32 x 448^2")
STAGED = ("1 x 448^2", "1 x 1344^2", "32 x 448^2")
COUNTED = "1 x 448^2"  # the workload whose launches are counted
SINGLE_BATCH = [name for name, grids in WORKLOADS.items() if len(in_batches(grids)) == 1]
STAGE_SECONDS = 0.5  # per stage
PARTS = ("tower", "attention", "stages", "start")
FIRST_WITHIN_S = 10  # after a process's start, with a warm Triton cache and cached weights


def check(
    ours: Tensor, theirs: Tensor, tensors: Any, config: VisionConfig, image_config: ImageConfig,
    pixels: Tensor, grids: Sequence[Grid],
) -> None:  # fmt: skip
    """Raise an error if a tower's error against float64 exceeds the error of Hugging Face's
    bf16."""
    values = Patches(pixels.cpu(), tuple(grids)).to_rows(image_config).to(pixels.device)
    truth = vision_oracle(tensors, config, values, list(grids), device=pixels.device)["merger"]
    error, reference = relative_error(ours, truth), relative_error(theirs, truth)
    if not error <= 1.01 * reference:
        raise click.ClickException(
            f"the error is {error:.2e}, Hugging Face's {reference:.2e}: no speed is printed"
        )


def alone(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> dict[str, float]:
    """Return microseconds per layer of our attention with RoPE, of RoPE alone, and of
    FlashAttention-2."""
    H, D = config.num_heads, config.head_dim
    layout = layout_for(grids, config, device, torch.bfloat16)
    inverse = config.rope_theta ** -(torch.arange(0, D // 2, 2, dtype=torch.float64) / (D // 2))
    angles = torch.outer(torch.arange(4096, dtype=torch.float64), inverse).to(device)
    rotary = RotaryTable(angles.cos().float(), angles.sin().float(), layout.positions)
    per_token = angles[layout.positions.long()].flatten(1).repeat(1, 2)
    cos, sin = per_token.cos().float(), per_token.sin().float()
    qkv = torch.randn(layout.n_rows, 3, H, D, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(1)
    row = {
        "RoPE": graph_us(lambda: rotated(qkv, rotary)),
        "HF RoPE": graph_us(lambda: apply_rotary_pos_emb_vision(q, k, cos, sin)),
    }

    def measure(kind: str, segments: Segments) -> None:
        lengths = segments.cu_seqlens.diff()
        cu, longest = segments.cu_seqlens.int(), int(lengths.max())
        row[f"{kind} FA2"] = graph_us(lambda: flash_attention_2(q, k, v, cu, longest))
        row[f"{kind} ours"] = graph_us(
            lambda: attention(qkv, rotary, segments, kind=kind, adjacent_pairs=True)
        )
        operations = 4 * H * D * int(lengths.double().square().sum())
        row[f"{kind} TFLOP/s"] = operations / (row[f"{kind} ours"] * 1e6)

    measure("window", layout.windows)
    measure("full", layout.frames)
    return row


def graph_us(run: Callable[[], Any], calls: int = 10) -> float:
    """Return the microseconds of one call inside a CUDA graph of several calls."""
    return median_ms(graph_of(lambda: [run() for _ in range(calls)])) * 1e3 / calls


def stages(
    timed: TimedTower, pixels: Tensor, grids: Sequence[Grid], copy: float
) -> dict[str, dict[str, float]]:
    """Time each stage alone, over all blocks, and return the roofline time."""
    layout = timed.layout(grids).to(timed.device)
    runs = stage_runs(timed.tower, pixels, layout)
    rows = {}
    for name, work in stage_work(timed.tower.config, grids).items():
        ms, rate = interleaved_with_gemm(graph_of(runs[name]), timed.device, STAGE_SECONDS)
        rows[name] = {
            "ms": ms,
            "roofline_ms": work.roofline_ms(rate, copy),
            "blocks": work.count,
            "mb": work.bytes / 1e6,
            "tflops": work.flops / ms / 1e9,
            "tb_per_s": work.bytes / ms / 1e9,
        }
    return rows


def run_all(runs: Iterable[Callable[[], Any]]) -> None:
    for run in runs:
        run()


class Towers:
    """Hold our tower and its alternatives on one GPU, with the same random weights."""

    def __init__(self, device: torch.device, with_fa2: bool) -> None:
        self.device = device
        self.config = VisionConfig.from_json(SHAPE)
        self.image_config = ImageConfig.from_json({})
        self.tensors = random_weights(self.config, 0, device)
        on_host = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        ours = build_tower(on_host, self.config, self.image_config, torch.bfloat16, device)
        self.timed = TimedTower(ours, device, torch.bfloat16)
        self.plain = TimedTower(ours, device, torch.bfloat16)  # has graphs of the plain kernels
        self.hf = {"HF sdpa": self.peer()}
        if with_fa2:
            self.hf["HF FA2 varlen"] = self.peer()
            self.hf["HF FA2 varlen"].tower.config._attn_implementation = register_fa2()

    def peer(self) -> Peer:
        tower = hf_tower(self.tensors, self.config, torch.bfloat16, self.device)
        return Peer(tower, self.image_config, self.device)

    def checked(
        self, name: str
    ) -> tuple[list[Tensor], list[tuple[Grid, ...]], list[Callable[[], Tensor]]]:
        """Return (pixels, grids, our run) of each batch, after comparing the first batch with
        float64."""
        batches = in_batches(WORKLOADS[name])
        pixels = [random_pixels(batch, self.config, self.device) for batch in batches]
        runs = [self.timed.by_graph(p, b) for p, b in zip(pixels, batches, strict=True)]
        theirs = self.hf["HF sdpa"].on(pixels[0], batches[0])
        check(
            runs[0](), theirs(), self.tensors, self.config, self.image_config, pixels[0],
            batches[0],
        )  # fmt: skip
        return pixels, batches, runs

    def row(self, name: str, others: Mapping[str, Peer | UnfusedAttention]) -> dict[str, float]:
        """Return milliseconds and megabytes of our tower and of `others` on one workload, and the
        roofline."""
        pixels, batches, runs = self.checked(name)

        ours = partial(run_all, runs)
        flops = tower_flops(self.config, WORKLOADS[name])
        cool_ms, cool = on_a_cool_gpu(ours, self.device)
        ours_ms, beside = interleaved_with_gemm(ours, self.device)
        row = {
            "roofline_ms": flops / beside * 1e3, "ours_ms": ours_ms, "gemm_tflops": beside / 1e12,
            "cool_roofline_ms": flops / cool * 1e3, "cool_ms": cool_ms,
        }  # fmt: skip
        if uses_hopper_kernels() and torch.cuda.get_device_capability(self.device) == (9, 0):
            row |= self.plain_row(name, pixels, batches)
        if name in SINGLE_BATCH:
            row["eager_ms"] = median_ms(self.timed.eager(pixels[0], batches[0]))
        torch.cuda.reset_peak_memory_stats()
        runs[0]()
        self.timed.eager(pixels[0], batches[0])()  # allocates what a graph would also need
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        for label, peer in others.items():
            some = list(zip(pixels, batches, strict=True))[:PEER_BATCHES]
            peer_runs = [peer.on(p, b) for p, b in some]
            torch.cuda.reset_peak_memory_stats()
            if label == UNFUSED:  # runs by graph like ours; the graph's own memory is not counted
                ms, _ = interleaved_with_gemm(partial(run_all, peer_runs), self.device)
            else:
                ms = median_ms(partial(run_all, peer_runs), 3, 1)
                row[f"{label}_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
            share = sum(len(p) for p, _ in some) / sum(len(p) for p in pixels)
            row[f"{label}_ms"] = ms / share  # scales the stream's first batches to all batches
        return row

    def plain_row(
        self, name: str, pixels: Sequence[Tensor], batches: Sequence[tuple[Grid, ...]]
    ) -> dict[str, float]:
        """Return our milliseconds with the kernels of other GPUs, and the roofline time."""
        with plain_kernels():
            runs = [self.plain.by_graph(p, b) for p, b in zip(pixels, batches, strict=True)]
            theirs = self.hf["HF sdpa"].on(pixels[0], batches[0])
            check(
                runs[0](), theirs(), self.tensors, self.config, self.image_config, pixels[0],
                batches[0],
            )  # fmt: skip
            ms, beside = interleaved_with_gemm(partial(run_all, runs), self.device)
        roofline_ms = tower_flops(self.config, WORKLOADS[name]) / beside * 1e3
        return {"plain_ms": ms, "plain_roofline_ms": roofline_ms}

    def compiled(self, name: str) -> dict[str, float]:
        grids = WORKLOADS[name]
        pixels = random_pixels(grids, self.config, self.device)
        return compiled(self.hf["HF FA2 varlen"], pixels, grids)

    def stages(self, name: str, copy: float) -> dict[str, dict[str, float]]:
        grids = WORKLOADS[name]
        return stages(self.timed, random_pixels(grids, self.config, self.device), grids, copy)

    def launched(self) -> dict[str, Counter[str]]:
        """Count the launches of one call of each tower. The profiler may slow down later calls."""
        grids = WORKLOADS[COUNTED]
        pixels = random_pixels(grids, self.config, self.device)
        eager = {"ours": self.timed.eager(pixels, grids)}
        eager |= {label: peer.on(pixels, grids) for label, peer in self.hf.items()}
        return {label: launches(run) for label, run in eager.items()}


@click.command(help=__doc__)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw a PNG of the tower's table.")
@ledger_options
@click.option("--peers/--no-peers", default=True, help="Also time Hugging Face.")
@click.option("--compile", "compile_for", multiple=True, type=click.Choice(SINGLE_BATCH),
              help="Also time Hugging Face under torch.compile (30 s per workload).")  # fmt: skip
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)),
              help="Choose a workload for tower and stages. Repeatable. Default: all.")  # fmt: skip
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS),
              help="Choose a part. Repeatable. Default: all but `start` (a minute).")  # fmt: skip
def main(
    ledger: Path | None, chart: Path | None, commit: str, peers: bool, compile_for: tuple[str, ...],
    workloads: tuple[str, ...], parts: tuple[str, ...],
) -> None:  # fmt: skip
    device = require_gpu()
    parts = parts or PARTS[:-1]
    chosen = workloads or tuple(WORKLOADS)
    if chart is not None and not {"tower", "attention"} & set(parts):
        raise click.UsageError("--chart draws the tower or the attention: add one as --part")
    check_compiled(compile_for, chosen, has_peers=peers and "tower" in parts)
    line = ledger_row("tower", commit, device, ("triton", "transformers"))
    texts: list[str] = []
    rows, kernel = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    if set(parts) != {"start"}:
        towers = Towers(device, with_fa2=peers and "tower" in parts)
        towers.checked(COUNTED)
        copy, rate = copy_rate(device), gemm_rate(device)
        line["gemm_tflops"] = round(rate / 1e12, 1)
        line["copy_tb_per_s"] = round(copy / 1e12, 3)
        texts.append(
            f"GEMM {rate / 1e12:.0f} TFLOP/s on a cool GPU, copy {copy / 1e12:.2f} TB/s; each "
            "roofline is at the rate of a GEMM interleaved with its workload"
        )
    if "tower" in parts:
        others: dict[str, Peer | UnfusedAttention] = {}
        if peers:
            others = {**towers.hf, UNFUSED: UnfusedAttention(towers.timed)}
        for name in chosen:
            rows[name] = towers.row(name, others)
            if name in compile_for:
                rows[name] |= towers.compiled(name)
            shown = {key: round(value, 3) for key, value in rows[name].items()}
            print(name, shown, file=sys.stderr)
        line["rows"] = rounded(rows)
        texts.append(tower_text(rows))
    if "attention" in parts:
        kernel = {name: alone(WORKLOADS[name], towers.config, device) for name in ALONE}
        line["attention_us_per_layer"] = rounded(kernel)
        texts.append(attention_text(kernel))
    if "stages" in parts:
        staged = {name: towers.stages(name, copy) for name in chosen if name in STAGED}
        line["stages"] = {name: rounded(table) for name, table in staged.items()}
        texts.append(stages_text(staged))
    if "tower" in parts:
        counted = towers.launched()
        line["launched"] = {
            label: sum(n for name, n in seen.items() if not name.startswith("Mem"))
            for label, seen in counted.items()
        }
        line["launched_ours"] = dict(counted["ours"].most_common())
        texts.append(launched_text(line["launched"]))
    if "start" in parts:
        line["start_s"] = rounded(starts_of_random_model(device))
        texts.append(starts_text(line["start_s"]))
        if line["start_s"]["warm"]["first embedding"] > FIRST_WITHIN_S:
            texts.append(f"that is more than the {FIRST_WITHIN_S} s wanted with a warm cache")
    if chart is not None:
        draw(rows, kernel, f"{line['device']}, {line['date']}, {commit[:7]}, bf16, 7B shape", chart)
    print("\n\n".join(texts))
    publish(line, ledger)


def starts_of_random_model(device: torch.device) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), device)
        return starts(Path(folder), "cuda")


def check_compiled(compile_for: Sequence[str], chosen: Sequence[str], *, has_peers: bool) -> None:
    if compile_for and not has_peers:
        raise click.UsageError("--compile needs the part `tower` and --peers")
    if not set(compile_for) <= set(chosen):
        raise click.UsageError("--compile names a workload that is not chosen")


def launched_text(counts: Mapping[str, int]) -> str:
    each = ", ".join(f"{label} {n or 'not seen'}" for label, n in counts.items())
    return f"kernels launched, {COUNTED}: {each} (by graph, ours are one launch)"


def rounded(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {n: {k: four_digits(v) for k, v in row.items()} for n, row in table.items()}


if __name__ == "__main__":
    main()
