"""How fast the tower is on this GPU, and how near to what the chip allows.

The floor is all of the tower's operations at the rate that a large matrix product reaches in turns
with it. GPUs of one kind differ, and any of them slows down within a second at its power limit, the
product by a sixth: side by side both meet the same clock, so ratios travel and milliseconds do not.
"""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwen_vit.checkpoint.convert import padded_mlp_size, padded_pixel_size
from qwen_vit.common.tensors import all_finite
from qwen_vit.config import Grid, VisionConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.features import dtype_name
from qwen_vit.graphs import MAX_BUCKET, GraphRunner, bucket_for
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower, plan_layout

__all__ = [
    "GEMM_FLOPS",
    "STREAM",
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


def _square(side_px: int, count: int = 1) -> tuple[Grid, ...]:
    return (Grid(1, side_px // 14, side_px // 14),) * count


def _stream(count: int) -> tuple[Grid, ...]:
    """Images of 224 to 1344 px a side, in the order in which chance put them."""
    chance = random.Random(0)
    return tuple(
        Grid(1, 2 * chance.randint(8, 48), 2 * chance.randint(8, 48)) for _ in range(count)
    )


STREAM = "256 mixed"
WORKLOADS: Mapping[str, tuple[Grid, ...]] = {
    "1 x 448^2": _square(448),
    "1 x 672^2": _square(672),
    "1 x 896^2": _square(896),
    "1 x 1344^2": _square(1344),
    "32 x 448^2": _square(448, 32),
    "4 x 1344^2": _square(1344, 4),
    STREAM: _stream(256),
}


def median_ms(run: Callable[[], Any], repeats: int = REPEATS, warm_ups: int = WARM_UPS) -> float:
    """The median GPU time of `run`, which is queued again before the last one has ended.

    So what the host takes to launch counts only where the GPU had to wait for it.
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
    """An 8192^3 bfloat16 product of random data, of GEMM_FLOPS."""
    side = GEMM_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=c)


def interleaved_with_gemm(
    run: Callable[[], Any], device: torch.device, seconds: float = 2.0
) -> tuple[float, float]:
    """(the median GPU milliseconds of `run`, the product's rate), in turns of about
    the same length, one product at the least.
    """
    product = large_gemm(device)
    run_once, product_once = (median_ms(each, 1, 1) for each in (run, product))
    products = max(1, round(run_once / product_once))
    turns = max(3, round(seconds * 1e3 / (run_once + products * product_once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(turns)]
    for begin, middle, end in events:
        begin.record()
        run()
        middle.record()
        for _ in range(products):
            product()
        end.record()
    events[-1][-1].synchronize()
    run_ms: float = statistics.median(begin.elapsed_time(middle) for begin, middle, _ in events)
    product_ms = statistics.median(middle.elapsed_time(end) for _, middle, end in events)
    return run_ms, GEMM_FLOPS * products / (product_ms * 1e-3)


def tower_flops(config: VisionConfig, grids: Sequence[Grid]) -> int:
    """Every multiplication and addition of the published tower, as 2 per multiply-add.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> tower_flops(config, [Grid(1, 32, 32)])
    1346937815040
    """
    return sum(work.flops for work in stage_work(config, grids).values())


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one stage must compute and move, in all of its blocks together."""

    flops: int  # 2 per multiply-add of the published shapes
    bytes: int  # weights and rows read and written once, in 16 bits
    count: int  # blocks that have it

    def roofline_ms(self, gemm_rate: float, copy_rate: float) -> float:
        """Whichever takes longer at the rates that the chip reached."""
        return 1e3 * max(self.flops / gemm_rate, self.bytes / copy_rate)


def stage_work(config: VisionConfig, grids: Sequence[Grid]) -> dict[str, StageWork]:
    """Every stage of the tower, in order, for still images of uint8 pixels.

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
        # pixels of one byte; gathered; then the GEMM: rows written and read again for their sums
        "patches": StageWork(
            2 * N * config.patch_dim * C,
            N * pixels + 2 * (2 * N * pixels + pixels * C + 2 * N * C),
            1,
        ),
        "qkv": gemm(C, 3 * C, N * C + 3 * C * C + 3 * N * C),
        "window": StageWork(4 * C * windows * n_window, 2 * 4 * N * C * n_window, n_window),
        # K is rotated beforehand: read, written, and read again in place of it
        "full": StageWork(4 * C * frames * n_full, 2 * 6 * N * C * n_full, n_full),
        "proj": gemm(C, C, 3 * N * C + C * C),
        "gate-up": gemm(C, 2 * I, N * C + 2 * C * padded + N * padded),
        "down": gemm(I, C, N * padded + padded * C + 2 * N * C),
        # the norm reads and writes its rows; both GEMMs theirs; the last gather, too
        "merger": StageWork(
            2 * M * (merged * merged + merged * O),
            2 * (5 * N * C + merged * (merged + O) + 3 * M * O),
            1,
        ),
    }


def _squared(length: int, window: int) -> int:
    """The sum of squares of the pieces that windows cut a side into."""
    return length // window * window**2 + (length % window) ** 2


def in_batches(grids: Iterable[Grid], budget: int = MAX_BUCKET) -> list[tuple[Grid, ...]]:
    """Images as they come, in batches of at most `budget` patches; a larger one is alone.

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
    """A tower with its inputs on the GPU: by graph as `encode` runs it, or kernel by kernel."""

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
        layout = self.layout(grids, bucket_for(len(pixels)))
        eager = self.eager(pixels, grids)

        def run() -> Tensor:
            merged = self.graphs.run(pixels, layout) if bucket_for(len(pixels)) else None
            return eager() if merged is None else merged

        return run


def random_pixels(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> Tensor:
    """uint8 pixels of still images, as `patchify` gives them: (N, P / 2), on the device."""
    width = config.patch_dim // config.temporal_patch_size
    n_patches = sum(grid.n_patches for grid in grids)
    return torch.randint(0, 256, (n_patches, width), dtype=torch.uint8).to(device)


@dataclass(frozen=True, slots=True)
class Measured:
    """One workload: GPU milliseconds, and what they mean."""

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
    """Raise ArgumentError where there is nothing to time: before any weights are fetched."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        raise ArgumentError("a benchmark on the CPU would time Triton's interpreter; use a GPU")


def bench(encoder: VisionEncoder, workloads: Iterable[str] = tuple(WORKLOADS)) -> list[Measured]:
    """Time an encoder's tower on random pixels: no decoding, no copies, GPU time.

    >>> bench(VisionEncoder.from_pretrained("tiny", device="cpu"))
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: a benchmark on the CPU would time Triton's interpreter; use a GPU

    Checks first that graphs and single kernels give the same bits, and finite ones; raises
    CheckpointError where they do not, ArgumentError without a GPU or for an unknown workload.
    """
    check_device(encoder.device.type)
    with torch.cuda.device(encoder.device):  # events are recorded on the current one
        timed = TimedTower(encoder.tower, encoder.device, encoder.dtype)
        return [_measured(timed, name) for name in workloads]


def _measured(timed: TimedTower, name: str) -> Measured:
    if name not in WORKLOADS:
        raise ArgumentError(f"{name!r} is no workload, expected one of {', '.join(WORKLOADS)}")
    grids, config = WORKLOADS[name], timed.tower.config
    torch.cuda.reset_peak_memory_stats()
    runs = []
    for batch in in_batches(grids):
        pixels = random_pixels(batch, config, timed.device)
        by_graph, eager = timed.by_graph(pixels, batch), timed.eager(pixels, batch)
        merged = by_graph()
        if not torch.equal(merged, eager()) or not all_finite(merged):
            raise CheckpointError(
                f"{name}: its embeddings are not finite, or differ with and without graphs; "
                "check the checkpoint with `qwen-vit compare`: no speed is given"
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
    """The rows for people."""
    head = (
        f"{'images':<12}{'ms':>10}{'images/s':>10}{'patches/s':>12}{'x roofline':>9}{'peak MB':>9}"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.workload:<12}{row.ms:>10.3f}{row.images_per_second:>10.0f}"
            f"{1000 * row.patches / row.ms:>12,.0f}{row.x_roofline:>9.2f}{row.peak_mb:>9,.0f}"
        )
    return "\n".join(lines)


def speed_report(encoder: VisionEncoder, rows: Sequence[Measured]) -> dict[str, Any]:
    """The rows for machines, with where they were measured."""
    return {
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "device": torch.cuda.get_device_name(encoder.device),
        "dtype": dtype_name(encoder.dtype),
        "versions": encoder.metadata()["versions"],
        "rows": [asdict(row) | {"x_roofline": row.x_roofline} for row in rows],
    }
