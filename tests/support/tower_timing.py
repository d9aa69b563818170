"""Measure stages, chip rates and launches, in addition to the package's own benchmark."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qwen_vit.benchmark import GEMM_FLOPS, large_gemm, median_ms
from qwen_vit.kernels.attention import RotaryTable, attention
from qwen_vit.kernels.linear import ResidualStream
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower

COOL_DOWN_S = 1.0
COOL_MS = 30.0  # short enough that heat does not slow a GPU down
COPIED_BYTES = 2**32


def gemm_rate(device: torch.device) -> float:
    """Return operations per second of an 8192^3 bfloat16 GEMM of random data, 2 per multiply-add.
    The rate comes from 21 GEMMs on a cool GPU, which cannot sustain this rate.
    """
    return GEMM_FLOPS / (median_ms(large_gemm(device), 21) * 1e-3)


def on_a_cool_gpu(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the median GPU milliseconds of `run` and the GEMM's rate, each measured alone for the
    same time on a cool GPU.
    """
    gemm = large_gemm(device)
    run_once, gemm_once = (median_ms(each, 1, 1) for each in (run, gemm))
    length_ms = max(COOL_MS, run_once)

    def cool_ms(each: Callable[[], Any], once_ms: float) -> float:
        torch.cuda.synchronize(device)
        time.sleep(COOL_DOWN_S)
        return median_ms(each, round(length_ms / once_ms), 1)

    run_ms = cool_ms(run, run_once)
    return run_ms, GEMM_FLOPS / (cool_ms(gemm, gemm_once) * 1e-3)


def copy_rate(device: torch.device) -> float:
    """Return the bytes that a copy of 4 GiB reads and writes per second."""
    a = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * COPIED_BYTES / (median_ms(lambda: b.copy_(a)) * 1e-3)


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """Return a replay of a CUDA graph of `run`, with its memory, so that launches take no host
    time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(_reads_tensors_of: Callable[[], Any] = run) -> None:
        graph.replay()

    return replay


def stage_runs(tower: VisionTower, pixels: Tensor, layout: Layout) -> dict[str, Callable[[], Any]]:
    """Return a call for each stage that runs the stage in all its blocks, with each block's own
    weights. A stage always reads one block's input. `layout` is on the tower's device.
    """
    blocks: list[Any] = list(tower.blocks)
    full = [blocks[i] for i in sorted(tower.config.fullatt_block_indexes)]
    windowed = [block for block in blocks if block not in full]
    with torch.no_grad():
        rotary = RotaryTable(*tower._rotary_angles(layout.n_positions), layout.positions)
        embedded = ResidualStream.from_values(tower.patch_embed(pixels, layout.grid_index))
        stream = blocks[0](embedded, rotary, layout.windows, tower.window_kind)
        N, C = stream.values.shape
        qkv = blocks[0].attn.qkv(stream).view(N, 3, tower.config.num_heads, -1)
        hidden = blocks[0].mlp.gate_up(stream, epilogue="swiglu")

    def attend(segments: Any, kind: str) -> Tensor:
        return attention(qkv, rotary, segments, kind=kind, adjacent_pairs=True)

    out = attend(layout.windows, tower.window_kind).view(N, C)

    def each(blocks: Iterable[Any], run: Callable[[Any], Any]) -> Callable[[], None]:
        def run_all() -> None:
            with torch.no_grad():
                for block in blocks:
                    run(block)

        return run_all

    return {
        "patches": each(
            [tower.patch_embed],
            lambda embed: ResidualStream.from_values(embed(pixels, layout.grid_index)),
        ),
        "qkv": each(blocks, lambda block: block.attn.qkv(stream)),
        "window": each(windowed, lambda _: attend(layout.windows, tower.window_kind)),
        "full": each(full, lambda _: attend(layout.frames, "full")),
        "proj": each(blocks, lambda block: block.attn.proj(out, stream)),
        "gate-up": each(blocks, lambda block: block.mlp.gate_up(stream, epilogue="swiglu")),
        "down": each(blocks, lambda block: block.mlp.down(hidden, stream)),
        "merger": each([tower.merger], lambda last: last(stream.values)[layout.merged_order]),
    }


def launches(run: Callable[[], Any]) -> Counter[str]:
    """Return the launches of one call on the GPU by name: kernels, and copies and fills as
    `Mem...`. The result is empty if the driver forbids profiling, as on some virtual machines.
    """
    run()
    torch.cuda.synchronize()
    from torch.profiler import ProfilerActivity, profile  # slow to import, and few callers need it

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        run()
        torch.cuda.synchronize()
    return Counter(event.name for event in seen.events() or () if event.device_type.name == "CUDA")
