"""How fast the tower is on this GPU, and how near to what the chip allows.

The floor is all of the tower's operations at the rate that a large matrix product reaches in the
same run: GPUs of one kind differ, and slow down when hot, so ratios travel and milliseconds do not.
"""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_vit.config import Grid, VisionConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.finite import all_finite
from qwen_vit.graphs import LARGEST_BUDGET, GraphRunner, budget_for
from qwen_vit.layout import Layout
from qwen_vit.model import VisionTower, plan_layout

__all__ = [
    "STREAM",
    "WORKLOADS",
    "Measured",
    "TimedTower",
    "bench",
    "check_device",
    "copy_rate",
    "in_batches",
    "median_ms",
    "product_rate",
    "random_pixels",
    "speed_report",
    "speed_table",
    "tower_flops",
]

WARM_UPS, REPEATS = 3, 11
PRODUCT_SIDE = 8192
COPIED_BYTES = 2**32


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
    """The median GPU time of `run`, between events on the stream."""
    for _ in range(warm_ups):
        run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def product_rate(device: torch.device) -> float:
    """Operations per second of an 8192^3 bfloat16 product of random data, 2 per multiply-add."""
    side = PRODUCT_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / (median_ms(lambda: a @ b, 21) * 1e-3)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 4 GiB."""
    a = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * COPIED_BYTES / (median_ms(lambda: b.copy_(a)) * 1e-3)


def tower_flops(config: VisionConfig, grids: Sequence[Grid]) -> int:
    """Every multiplication and addition of the published tower, as 2 per multiply-add.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> tower_flops(config, [Grid(1, 32, 32)])
    1346937815040
    """
    C, I, O = config.hidden_size, config.intermediate_size, config.out_hidden_size  # noqa: E741
    N = sum(grid.n_patches for grid in grids)
    merged = C * config.merge_unit
    n_full = len(config.fullatt_block_indexes)
    products = 2 * N * (config.patch_dim * C + config.depth * (4 * C * C + 3 * C * I))
    merger = 2 * N // config.merge_unit * (merged * merged + merged * O)
    frames = 4 * C * sum(grid.t * (grid.h * grid.w) ** 2 for grid in grids)
    window = config.window_px // config.patch_px
    windows = (
        4 * C * sum(grid.t * _squared(grid.h, window) * _squared(grid.w, window) for grid in grids)
    )
    return products + merger + n_full * frames + (config.depth - n_full) * windows


def _squared(length: int, window: int) -> int:
    """The sum of squares of the pieces that windows cut a side into."""
    return length // window * window**2 + (length % window) ** 2


def in_batches(grids: Iterable[Grid], budget: int = LARGEST_BUDGET) -> list[tuple[Grid, ...]]:
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
        layout = self.layout(grids, budget_for(len(pixels)))
        eager = self.eager(pixels, grids)

        def run() -> Tensor:
            merged = self.graphs.run(pixels, layout) if budget_for(len(pixels)) else None
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
    floor_ms: float
    peak_mb: float

    @property
    def times_the_floor(self) -> float:
        return self.ms / self.floor_ms

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
    timed = TimedTower(encoder.tower, encoder.device, encoder.dtype)
    rate = product_rate(encoder.device)
    rows = []
    for name in workloads:
        if name not in WORKLOADS:
            raise ArgumentError(f"{name!r} is no workload, expected one of {', '.join(WORKLOADS)}")
        grids = WORKLOADS[name]
        torch.cuda.reset_peak_memory_stats(encoder.device)
        runs = []
        for batch in in_batches(grids):
            pixels = random_pixels(batch, encoder.config, encoder.device)
            by_graph, eager = timed.by_graph(pixels, batch), timed.eager(pixels, batch)
            merged = by_graph()
            if not torch.equal(merged, eager()) or not all_finite(merged):
                raise CheckpointError(
                    f"{name}: its embeddings are not finite, or differ with and without graphs; "
                    "check the checkpoint with `qwen-vit compare`: no speed is given"
                )
            runs.append(by_graph)

        def run_all(runs: Sequence[Callable[[], Tensor]] = tuple(runs)) -> None:
            for run in runs:
                run()

        rows.append(
            Measured(
                workload=name,
                images=len(grids),
                patches=sum(grid.n_patches for grid in grids),
                ms=median_ms(run_all, 5 if len(runs) > 1 else REPEATS),
                floor_ms=tower_flops(encoder.config, grids) / rate * 1e3,
                peak_mb=torch.cuda.max_memory_allocated(encoder.device) / 1e6,
            )
        )
    return rows


def speed_table(rows: Sequence[Measured]) -> str:
    """The rows for people."""
    head = f"{'images':<12}{'ms':>10}{'images/s':>10}{'patches/s':>12}{'x floor':>9}{'peak MB':>9}"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.workload:<12}{row.ms:>10.3f}{row.images_per_second:>10.0f}"
            f"{1000 * row.patches / row.ms:>12,.0f}{row.times_the_floor:>9.2f}{row.peak_mb:>9,.0f}"
        )
    return "\n".join(lines)


def speed_report(encoder: VisionEncoder, rows: Sequence[Measured]) -> dict[str, Any]:
    """The rows for machines, with where they were measured."""
    return {
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "device": torch.cuda.get_device_name(encoder.device),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "versions": encoder.metadata()["versions"],
        "rows": [asdict(row) | {"times_the_floor": row.times_the_floor} for row in rows],
    }
