"""Time the tower on this GPU, and compare the time with the GPU's roofline.

The roofline is the time that the tower's GEMMs and attention would take at the rate of a large
GEMM, which the benchmark interleaves with the tower. Two GPUs of one model differ in speed. At the
power limit, the clock falls within two seconds, and the GEMM then takes a sixth longer. An
interleaved GEMM runs at the tower's clock, so ratios transfer between GPUs of one model, although
times in milliseconds do not.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwen_vit.common.tensors import all_finite
from qwen_vit.config import Grid, VisionConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.features import dtype_name
from qwen_vit.graphs import MAX_BUCKET, GraphRunner, bucket_for
from qwen_vit.kernels import plain_kernels
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower, plan_layout
from qwen_vit.weight_format import padded_mlp_size, padded_pixel_size
from qwen_vit.workloads import WORKLOADS

__all__ = [
    "GEMM_FLOPS",
    "WORKLOADS",
    "Measured",
    "StageWork",
    "TimedTower",
    "bench",
    "check_device",
    "in_batches",
    "interleaved_with_gemm",
    "large_gemm",
    "median_ms",
    "random_pixels",
    "speed_report",
    "speed_table",
    "stage_work",
    "tower_flops",
]

WARM_UPS, REPEATS = 3, 11
GEMM_SIDE = 8192
GEMM_FLOPS = 2 * GEMM_SIDE**3  # 2 per multiply-add


def median_ms(run: Callable[[], Any], repeats: int = REPEATS, warm_ups: int = WARM_UPS) -> float:
    """Return the median GPU time of `run` in milliseconds.

    The function queues each call without waiting for the previous one. The host's launch time then
    counts only while the GPU waits for the host.
    """
    for _ in range(warm_ups):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairwise(events)]
    return statistics.median(times)


def large_gemm(device: torch.device) -> Callable[[], Any]:
    side = GEMM_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=c)


def interleaved_with_gemm(
    run: Callable[[], Any], device: torch.device, seconds: float = 2.0
) -> tuple[float, float]:
    """Return the median GPU time of `run` in milliseconds, and the FLOP/s of an interleaved GEMM.

    In each round, `run` and the GEMMs take about the same time, but at least one GEMM runs.
    """
    gemm = large_gemm(device)
    run_once, gemm_once = (median_ms(each, 1, 1) for each in (run, gemm))
    gemms = max(1, round(run_once / gemm_once))
    rounds = max(3, round(seconds * 1e3 / (run_once + gemms * gemm_once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(rounds)]
    for begin, middle, end in events:
        begin.record()
        run()
        middle.record()
        for _ in range(gemms):
            gemm()
        end.record()
    events[-1][-1].synchronize()
    run_ms: float = statistics.median(begin.elapsed_time(middle) for begin, middle, _ in events)
    gemm_ms = statistics.median(middle.elapsed_time(end) for _, middle, end in events)
    return run_ms, GEMM_FLOPS * gemms / (gemm_ms * 1e-3)


def tower_flops(config: VisionConfig, grids: Sequence[Grid]) -> int:
    """Count the operations of the tower's GEMMs and attention without padding, 2 per multiply-add.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> tower_flops(config, [Grid(1, 32, 32)])
    1346937815040
    """
    return sum(work.flops for work in stage_work(config, grids).values())


@dataclass(frozen=True, slots=True)
class StageWork:
    """Count the operations and bytes of one stage in all its blocks together."""

    flops: int  # 2 per multiply-add of the published shapes
    bytes: int  # weights and rows read and written once, in 16 bits
    count: int  # blocks with this stage

    def roofline_ms(self, gemm_rate: float, copy_rate: float) -> float:
        return 1e3 * max(self.flops / gemm_rate, self.bytes / copy_rate)


def stage_work(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, StageWork]:
    """Return the work of every stage of the tower, in order, for stills of uint8 pixels.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> list(stage_work(config, [Grid(1, 32, 32)]))
    ['patches', 'qkv', 'window', 'full', 'proj', 'gate-up', 'down', 'merger']
    """
    C, I, O = config.hidden_size, config.intermediate_size, config.out_hidden_size  # noqa: E741
    N = sum(grid.n_patches for grid in grids)
    M, merged = N // config.merge_unit, C * config.merge_unit
    n_full = len(config.fullatt_block_indexes)
    n_window = config.depth - n_full
    side = config.window_px // config.patch_px
    frames = sum(grid.t * (grid.h * grid.w) ** 2 for grid in grids)
    windows = sum(grid.t * _squared(grid.h, side) * _squared(grid.w, side) for grid in grids)
    padded, pixels = padded_mlp_size(config), padded_pixel_size(config)

    def gemm(n_in: int, n_out: int, moved: int, count: int = config.depth) -> StageWork:
        return StageWork(2 * N * n_in * n_out * count, 2 * moved * count, count)

    return {
        # read uint8 pixels; write and read gathered rows; write the GEMM's rows, read by the norm
        "patches": StageWork(
            2 * N * config.patch_dim * C,
            N * pixels + 2 * (2 * N * pixels + pixels * C + 2 * N * C),
            1,
        ),
        "qkv": gemm(C, 3 * C, N * C + 3 * C * C + 3 * N * C),
        "window": StageWork(4 * C * windows * n_window, 2 * 4 * N * C * n_window, n_window),
        # RoPE is applied to K beforehand: read, written, and read again
        "full": StageWork(4 * C * frames * n_full, 2 * 6 * N * C * n_full, n_full),
        "proj": gemm(C, C, 3 * N * C + C * C),
        "gate-up": gemm(C, 2 * I, N * C + 2 * C * padded + N * padded),
        "down": gemm(I, C, N * padded + padded * C + 2 * N * C),
        "merger": StageWork(
            2 * M * (merged * merged + merged * O),
            2 * (5 * N * C + merged * (merged + O) + 3 * M * O),
            1,
        ),
    }


def _squared(length: int, window: int) -> int:
    """Return the sum of the pieces' squared lengths, for a side that windows cut into pieces."""
    return length // window * window**2 + (length % window) ** 2


def in_batches(grids: Iterable[Grid], budget: int = MAX_BUCKET) -> list[tuple[Grid, ...]]:
    """Split images, in order, into batches of at most `budget` patches. A larger image is a batch
    by itself.

    >>> [len(batch) for batch in in_batches([Grid(1, 8, 8)] * 5, budget=128)]
    [2, 2, 1]
    """
    batches: list[list[Grid]] = [[]]
    n_patches = 0
    for grid in grids:
        if batches[-1] and n_patches + grid.n_patches > budget:
            batches.append([])
            n_patches = 0
        batches[-1].append(grid)
        n_patches += grid.n_patches
    return [tuple(batch) for batch in batches if batch]


class TimedTower:
    """Run a tower on inputs in GPU memory, either with a graph, like `encode`, or kernel by
    kernel."""

    def __init__(self, tower: VisionTower, device: torch.device, dtype: torch.dtype) -> None:
        self.tower, self.device, self.dtype = tower, device, dtype
        self.graphs = GraphRunner(tower, device)

    def layout(self, grids: Sequence[Grid], n_rows: int | None = None) -> Layout:
        return plan_layout(grids, self.tower.config, self.device, self.dtype, n_rows)

    def eager(self, pixels: Tensor, grids: Sequence[Grid]) -> Callable[[], Tensor]:
        layout = self.layout(grids).to(self.device)

        def run() -> Tensor:
            with torch.no_grad():
                return self.tower(pixels, layout)  # type: ignore[no-any-return]

        return run

    def by_graph(self, pixels: Tensor, grids: Sequence[Grid]) -> Callable[[], Tensor]:
        """Return a function that replays a CUDA graph, or launches kernels if no graph fits."""
        layout = self.layout(grids, bucket_for(len(pixels)))
        eager = self.eager(pixels, grids)

        def run() -> Tensor:
            merged = self.graphs.run(pixels, layout) if bucket_for(len(pixels)) else None
            return eager() if merged is None else merged

        return run


def random_pixels(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> Tensor:
    """Return random uint8 pixels of stills on the device, in the form of `patchify`: (N, P / 2)."""
    width = config.patch_dim // config.temporal_patch_size
    n_patches = sum(grid.n_patches for grid in grids)
    return torch.randint(0, 256, (n_patches, width), dtype=torch.uint8).to(device)


@dataclass(frozen=True, slots=True)
class Measured:
    workload: str
    images: int
    patches: int
    ms: float
    roofline_ms: float
    peak_mb: float

    @property
    def x_roofline(self) -> float:
        return self.ms / self.roofline_ms

    @property
    def images_per_second(self) -> float:
        return 1000 * self.images / self.ms


def check_device(device: str) -> None:
    """Raise ArgumentError for a CPU. The command calls this function before it fetches weights."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        raise ArgumentError("a benchmark on the CPU would time the interpreter", remedy="use a GPU")


def bench(
    encoder: VisionEncoder, workloads: Iterable[str] = tuple(WORKLOADS), *, plain: bool = False
) -> list[Measured]:
    """Measure the GPU time of an encoder's tower on random pixels, without decoding or copies.

    >>> bench(VisionEncoder.from_pretrained("tiny", device="cpu"))
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: a benchmark on the CPU would time the interpreter. Use a \
    GPU.

    With `plain`, a Hopper GPU runs the plain Triton kernels, like other GPUs.

    Before it measures a workload, the function checks that CUDA graphs and separate launches give
    equal and finite values.
    """
    check_device(encoder.device.type)
    kernels = plain_kernels() if plain else nullcontext()
    with torch.cuda.device(encoder.device), kernels:  # torch records events on the current device
        timed = TimedTower(encoder.tower, encoder.device, encoder.dtype)
        return [_measured(timed, name) for name in workloads]


def _measured(timed: TimedTower, name: str) -> Measured:
    if name not in WORKLOADS:
        raise ArgumentError(f"workload is {name!r}", expected=f"one of {', '.join(WORKLOADS)}")
    grids, config = WORKLOADS[name], timed.tower.config
    torch.cuda.reset_peak_memory_stats()
    runs = []
    for batch in in_batches(grids):
        pixels = random_pixels(batch, config, timed.device)
        by_graph, eager = timed.by_graph(pixels, batch), timed.eager(pixels, batch)
        merged = by_graph()
        if not torch.equal(merged, eager()) or not all_finite(merged):
            raise CheckpointError(
                "not timed: its embeddings contain NaN or Inf, or differ with and without CUDA "
                "graphs",
                name=name,
                remedy="check the checkpoint with `qwen-vit compare`",
            )
        runs.append(by_graph)

    def run_all() -> None:
        for run in runs:
            run()

    peak_mb = torch.cuda.max_memory_allocated() / 1e6
    ms, rate = interleaved_with_gemm(run_all, timed.device)
    return Measured(
        workload=name,
        images=len(grids),
        patches=sum(grid.n_patches for grid in grids),
        ms=ms,
        roofline_ms=tower_flops(config, grids) / rate * 1e3,
        peak_mb=peak_mb,
    )


def speed_table(rows: Sequence[Measured]) -> str:
    head = (
        f"{'images':<12}{'ms':>10}{'images/s':>10}{'patches/s':>12}{'x roofline':>12}{'peak MB':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.workload:<12}{row.ms:>10.3f}{row.images_per_second:>10.0f}"
            f"{1000 * row.patches / row.ms:>12,.0f}{row.x_roofline:>12.2f}{row.peak_mb:>9,.0f}"
        )
    return "\n".join(lines)


def speed_report(encoder: VisionEncoder, rows: Sequence[Measured]) -> dict[str, Any]:
    return {
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "device": torch.cuda.get_device_name(encoder.device),
        "dtype": dtype_name(encoder.dtype),
        "quantization": encoder.quantization,
        "versions": encoder.metadata()["versions"],
        "rows": [asdict(row) | {"x_roofline": row.x_roofline} for row in rows],
    }
