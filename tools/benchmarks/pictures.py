"""Time the host's part of encoding: one picture, many small pictures, and the CPU per picture.

It uses a 7B-shaped tower in bf16 with random weights on one GPU. Each part runs alone, in about a
minute. It prints one table per part, and one JSON line.

\b
    single   from `encode([pil])` to embeddings, wall time, beside the GPU's own time for the grid;
             a loop of single calls beside the batched rate
    cpu      CPU time per JPEG, resized by Pillow and on the GPU, and the cores that feed one GPU
    small    an export of small pictures beside the encoder's rate, with 8 and with 16 cores
    python -m tools.benchmarks.pictures --ledger tools/benchmarks/ledger.jsonl
    python -m tools.benchmarks.pictures single
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from PIL import Image

from qwen_vit import encoder as encoder_module
from qwen_vit.common.prefetch import core_count
from qwen_vit.config import Grid
from qwen_vit.encoder import VisionEncoder
from qwen_vit.export import shards
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.images.load import load_image
from qwen_vit.images.on_gpu import patches_on_gpu
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.images.picture import Picture
from tools.benchmarks.export import warm_up, write_jpeg
from tools.benchmarks.export_bounds import encoder_rate, grids_of
from tools.common import four_digits, ledger_options, ledger_row, publish, require_gpu
from tools.random_tower import write_model

PARTS = ("single", "cpu", "small")
CALLS = 50
# (width, height) in px -> the milliseconds that the wall time may exceed the GPU's time
SINGLE = {(448, 448): 0.8, (1344, 1344): 2.0, (1000, 750): 1.5}
LOOP_SIDE, LOOP_SHARE = 896, 0.85
JPEGS = ((448, 448), (640, 480), (1000, 750), (1344, 1344), (1920, 1080), (4000, 3000))
SMALL_SHARE = 0.93
SMALL_SIDES = (224, 448)
CORES = (8, 16)


def photograph(size: tuple[int, int]) -> Image.Image:
    """Return a picture whose JPEG has the size of a photograph's: noise, enlarged."""
    made = np.random.default_rng(size[0])
    small = made.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def gpu_ms(encoder: VisionEncoder, grid: Grid) -> float:
    """Return the median of events around `encode_patches`, with rows on the GPU."""
    rows = torch.randn(grid.n_patches, encoder.config.patch_dim, device=encoder.device)
    grid_thw = torch.tensor([[grid.t, grid.h, grid.w]])
    times: list[float] = []
    for call in range(5 + CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        encoder.encode_patches(rows, grid_thw)
        end.record()
        torch.cuda.synchronize()
        if call >= 5:
            times.append(begin.elapsed_time(end))
    return median(times)


def wall_ms(run: Callable[[], Any]) -> float:
    """Return the median wall time of a call until the GPU is done."""
    times: list[float] = []
    for call in range(5 + CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if call >= 5:
            times.append(1000 * (time.perf_counter() - begin))
    return median(times)


@contextmanager
def resized_on_cpu() -> Iterator[None]:
    """Take the CPU path, as with an unknown Pillow."""
    with (
        patch.object(encoder_module, "resizes_on", lambda _: False),
        patch.object(shards, "resizes_on", lambda _: False),
    ):
        yield


def measure_single(encoder: VisionEncoder) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    print(f"{'one picture, ms':<18}{'GPU':>8}{'wall':>8}{'more':>8}{'target':>8}{'CPU path':>10}")
    for size, target in SINGLE.items():
        picture = photograph(size)
        [grid] = patchify(picture, encoder.image_config).grids
        gpu, wall = gpu_ms(encoder, grid), wall_ms(partial(encoder.encode, [picture]))
        with resized_on_cpu():
            on_cpu = wall_ms(partial(encoder.encode, [picture]))
        name = f"{size[0]} x {size[1]}"
        print(f"{name:<18}{gpu:>8.2f}{wall:>8.2f}{wall - gpu:>8.2f}{target:>8.1f}{on_cpu:>10.2f}")
        rows[name] = {
            "gpu_ms": four_digits(gpu),
            "wall_ms": four_digits(wall),
            "more_ms": four_digits(wall - gpu),
            "target_ms": target,
            "cpu_path_wall_ms": four_digits(on_cpu),
        }
    return {"single": rows, "loop": measure_loop(encoder)}


def measure_loop(encoder: VisionEncoder) -> dict[str, Any]:
    """Compare a loop of single calls with one call for all, in pictures a second."""
    picture = photograph((LOOP_SIDE, LOOP_SIDE))
    [grid] = patchify(picture, encoder.image_config).grids

    def rate(run: Callable[[], Any], count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return count / (time.perf_counter() - begin)

    def calls(wait: bool) -> None:
        for _ in range(CALLS):
            encoder.encode([picture])
            if wait:
                torch.cuda.synchronize()

    pictures = [picture] * (2 * CALLS)
    rates: dict[str, list[float]] = {"batched": [], "calls": [], "calls, each waited for": []}
    for _ in range(3):  # interleaved, because the GPU's clock changes
        rates["batched"].append(rate(lambda: encoder.encode(pictures), len(pictures)))
        rates["calls"].append(rate(partial(calls, False), CALLS))
        rates["calls, each waited for"].append(rate(partial(calls, True), CALLS))
    tower = encoder_rate(encoder, [grid] * 160) / grid.n_patches
    found = {name: median(each) for name, each in rates.items()} | {"encoder alone": tower}
    print(f"\n{f'{LOOP_SIDE} x {LOOP_SIDE}':<26}{'pictures/s':>12}{'of batched':>12}{'target':>8}")
    for name, each in found.items():
        target = f"{LOOP_SHARE:>8}" if name == "calls" else ""
        print(f"{name:<26}{each:>12.1f}{each / found['batched']:>12.3f}{target}")
    return {name: four_digits(each) for name, each in found.items()}


def cpu_ms(run: Callable[[], Any]) -> float:
    """Return the median CPU time of this thread, in milliseconds."""
    times: list[float] = []
    for _ in range(15):
        begin = time.thread_time()
        run()
        times.append(1000 * (time.thread_time() - begin))
    return median(times)


def measure_cpu(encoder: VisionEncoder) -> dict[str, Any]:
    """Compare the CPU's work from a JPEG's bytes to the launch of the tower, in one thread."""
    rows: dict[str, Any] = {}
    print(
        f"{'JPEG, CPU ms':<16}{'decode':>8}{'before':>8}{'after':>8}{'ratio':>7}"
        f"{'pictures/s':>12}{'cores before':>14}{'after':>7}"
    )
    for size in JPEGS:
        file = io.BytesIO()
        photograph(size).save(file, "JPEG", quality=90)
        data, config = file.getvalue(), encoder.image_config
        [grid] = patchify(load_image(data).picture, config).grids
        n_batch = max(1, min(16, 32_768 // grid.n_patches))

        def before(data: bytes = data, config: Any = config) -> Patches:
            return patchify(load_image(data).picture, config)

        def to_picture(data: bytes = data, config: Any = config) -> Picture:
            return Picture.of(load_image(data).picture, config)

        parts = [to_picture() for _ in range(n_batch)]
        ready = [before() for _ in range(n_batch)]

        def joined(ready: list[Patches] = ready) -> None:
            Patches.cat(ready, pinned_rows=32_768)

        decode = cpu_ms(partial(load_image, data))
        old = cpu_ms(before) + cpu_ms(joined) / n_batch
        new = cpu_ms(to_picture) + launch_ms(parts, encoder.device) / n_batch
        per_s = encoder_rate(encoder, [grid] * (2 * n_batch)) / grid.n_patches
        name = f"{size[0]} x {size[1]}"
        print(
            f"{name:<16}{decode:>8.2f}{old:>8.2f}{new:>8.2f}{new / old:>7.2f}{per_s:>12.1f}"
            f"{old * per_s / 1000:>14.2f}{new * per_s / 1000:>7.2f}"
        )
        rows[name] = {
            "decode_ms": four_digits(decode),
            "before_ms": four_digits(old),
            "after_ms": four_digits(new),
            "encoder_pictures_per_s": four_digits(per_s),
            "cores_before": four_digits(old * per_s / 1000),
            "cores_after": four_digits(new * per_s / 1000),
        }
    return {"cpu": rows}


def launch_ms(parts: list[Picture], device: torch.device) -> float:
    """Return the median CPU time of staging and launching a batch, which does not wait."""
    times: list[float] = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.thread_time()
        patches_on_gpu(parts, device, pinned_rows=0)
        times.append(1000 * (time.thread_time() - begin))
    torch.cuda.synchronize()
    return median(times)


@contextmanager
def limited_to(cores: int) -> Iterator[None]:
    """Run all threads of this process on some cores."""
    before = os.sched_getaffinity(0)
    tasks = [int(name) for name in os.listdir("/proc/self/task")]
    for task in tasks:
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(task, sorted(before)[:cores])
    try:
        yield
    finally:
        for task in map(int, os.listdir("/proc/self/task")):
            with suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(task, before)


def measure_small(encoder: VisionEncoder, folder: Path, images: int) -> dict[str, Any]:
    paths = sorted((folder / "images").iterdir())
    grids = grids_of(paths, encoder)
    per_image = sum(grid.n_patches for grid in grids) / len(grids)
    warm_up(encoder, paths, grids, folder)
    alone = encoder_rate(encoder, grids) / per_image
    rows: dict[str, Any] = {}
    print(f"{images} small pictures{'cores':>10}{'pictures/s':>12}{'encoder':>10}{'share':>8}")
    runs = [(f"{cores} cores", cores, False) for cores in CORES if cores <= core_count()]
    for name, cores, on_cpu in [*runs, ("CPU path", CORES[-1], True)]:
        with limited_to(cores):
            done = export(encoder, folder, name, on_cpu=on_cpu)
            rate = done.exported / done.seconds
        print(f"{name:<21}{cores:>10}{rate:>12.1f}{alone:>10.1f}{rate / alone:>8.3f}")
        rows[name] = {
            "pictures_per_s": four_digits(rate),
            "encoder_pictures_per_s": four_digits(alone),
            "share": round(rate / alone, 3),
            "waits_s": done.waits,
        }
    return {"small": rows, "images": images}


def export(encoder: VisionEncoder, folder: Path, name: str, *, on_cpu: bool) -> Any:
    out = folder / name.replace(" ", "-")
    if not on_cpu:
        return export_features(encoder, [str(folder / "images")], out, ExportOptions())
    with resized_on_cpu():
        return export_features(encoder, [str(folder / "images")], out, ExportOptions())


@click.command(help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--images", type=click.IntRange(min=1), default=6_000, show_default=True)
@click.option("--model", help="Use this model instead of a 7B-shaped tower with random weights.")
@ledger_options
def main(
    parts: tuple[str, ...], images: int, model: str | None, ledger: Path | None, commit: str
) -> None:
    chosen = parts or PARTS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "small" in chosen:
            (folder / "images").mkdir()
            with ProcessPoolExecutor() as pool:  # forks precede this process's use of the GPU
                write = partial(write_jpeg, folder / "images", SMALL_SIDES)
                list(pool.map(write, range(images), chunksize=8))
        device = require_gpu()
        if model is None:
            (folder / "model").mkdir()
            write_model(folder / "model", device)
        encoder = VisionEncoder.from_pretrained(model or str(folder / "model"), device=device)
        found: dict[str, Any] = {}
        if "single" in chosen:
            found |= measure_single(encoder)
        if "cpu" in chosen:
            found |= measure_cpu(encoder)
        if "small" in chosen:
            found |= measure_small(encoder, folder, images)
        publish(ledger_row("pictures", commit, device, ("triton", "pillow"), **found), ledger)


if __name__ == "__main__":
    main()
