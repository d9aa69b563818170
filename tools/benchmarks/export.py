"""Measure the speed and memory of `qwen-vit export`, on one or several GPUs.

It makes JPEGs with sides of 448 to 1344 px from tests/photographs. Without --model, it uses a
7B-shaped tower in bf16 with random weights. It prints a table and one JSON line.

\b
    speed     the export and its limits, in one run: the encoder alone with pixels on the GPU,
              the disk's sequential rate, the waiting times, and Hugging Face's processor and
              encoder, image by image. It also encodes some images alone, and compares the results
    gpus      the rate of one process on one GPU, and then of one process on each GPU (`--part`)
    memory    the memory of the process and of the GPU over 20,000 small images

\b
    python -m tools.benchmarks.export --ledger tools/benchmarks/ledger.jsonl --chart docs/export.png
    python -m tools.benchmarks.export gpus --folder /fast/disk --images 1000
    python -m tools.benchmarks.export --images 6 --peer-images 2 --model tiny    # anywhere
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from qwen_vit.common.prefetch import thread_count
from qwen_vit.config import Grid
from qwen_vit.encoder import VisionEncoder
from qwen_vit.export.background import StageTimer
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import open_export
from qwen_vit.export.records import REST
from qwen_vit.export.run import export_features
from qwen_vit.export.shards import export_shards
from qwen_vit.feature_files.read import load_features
from tests.support.process_memory import memory_mb
from tools.benchmarks.export_bounds import disk_rate, encoder_rate, grids_of, peer_rates
from tools.benchmarks.export_chart import draw
from tools.common import ROOT, default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "rocket.jpg")
QUALITY = 90
SMALL_SIDES = (224, 448)
MEMORY_FILES = 2_000  # `memory` repeats these files


def write_jpeg(folder: Path, sides: tuple[int, int], number: int) -> None:
    """Write a photograph with a different size and a different part for each index."""
    chance = random.Random(number)
    size = chance.randint(*sides), chance.randint(*sides)
    with Image.open(
        ROOT / "tests" / "photographs" / PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
    ) as photo:
        left, top = chance.uniform(0, 0.2) * photo.width, chance.uniform(0, 0.2) * photo.height
        box = (left, top, left + 0.8 * photo.width, top + 0.8 * photo.height)
        image = photo.convert("RGB").resize(size, Image.Resampling.BICUBIC, box)
    image.save(folder / f"{number:06}.jpg", quality=QUALITY)


@contextmanager
def reported(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


def differing(encoder: VisionEncoder, paths: list[Path], out: Path) -> int:
    """Count the images whose bytes differ from the result of `encode` for each image alone."""
    stored = load_features(out)
    count = 0
    for path in paths:
        [alone] = encoder.encode([path], decode_threads=1)
        written = stored[path.name].embeds
        if alone.embeds is None or written is None or not torch.equal(alone.embeds.cpu(), written):
            count += 1
    return count


def measure_speed(
    folder: Path, peer_images: int, checked: int, model: str, options: ExportOptions,
    threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    paths = sorted((folder / "images").iterdir())
    with reported("encoder loaded"):
        encoder = VisionEncoder.from_pretrained(model)
    grids = grids_of(paths, encoder)
    with reported("encoder measured"):
        patches_per_s = encoder_rate(encoder, grids)
    with reported("disk measured"):
        bytes_per_s = disk_rate(folder)
    with reported("warmed up"):  # a machine's first run also compiles kernels
        warm_up(encoder, paths, grids, folder)
    with reported("exported"):
        done = export_features(
            encoder, [str(folder / "images")], folder / "out", options, decode_threads=threads
        )
    images = done.exported
    with reported("compared"):
        some = paths[:: max(1, images // checked)]
        wrong = differing(encoder, some, folder / "out")
    with reported("Hugging Face measured"):
        peers = peer_rates(paths[:peer_images], Path(model), encoder) if peer_images else {}
    n_patches = sum(grid.n_patches for grid in grids)
    ours = images / done.seconds
    rates = {
        **{f"Hugging Face, {name}": rate for name, rate in peers.items()},
        "export": ours,
        "encoder alone": patches_per_s * images / n_patches,
        "disk": bytes_per_s * images / done.bytes,
    }
    bound = min(rates["encoder alone"], rates["disk"])
    waited = sum(done.waits.values())
    print(f"{'':<24}{'images/s':>10}{'export is':>12}")
    for name, rate in rates.items():
        print(f"{name:<24}{rate:>10.1f}{ours / rate:>11.2f}x")
    for stage, stage_s in done.waits.items():
        print(f"waited for {stage:<17}{stage_s / waited:>6.0%}")
    print(f"other bits than alone: {wrong} of {len(some)} images")
    return {
        "images": images,
        "shard_size": options.shard_size,
        "decode_threads": thread_count(threads),
        "patches_per_image": round(n_patches / images),
        "mb_per_image": round(done.bytes / images / 1e6, 3),
        "seconds": done.seconds,
        "images_per_s": {name: four_digits(rate) for name, rate in rates.items()},
        "share_of_the_lower_bound": round(ours / bound, 3),
        "times_hugging_face": round(ours / max(peers.values()), 2) if peers else None,
        "waits_s": done.waits,
        "images_with_other_bytes_than_alone": wrong,
    }


def warm_up(encoder: VisionEncoder, paths: list[Path], grids: list[Grid], folder: Path) -> None:
    by_size = sorted(zip(paths, grids, strict=True), key=lambda pair: pair[1].n_patches)
    for count in (1, 2, 4, 24):
        some = [str(path) for path, _ in by_size[:count]]
        export_features(encoder, some, folder / f"warm-{count}")


def measure_gpus(folder: Path, images: int, model: str, threads: int | None) -> dict[str, Any]:
    """Measure the rate of one process on one GPU, and of one process per GPU with shared images."""
    gpus = max(1, torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0))
    threads = threads or thread_count(None) // gpus or 1

    def run(out: str, chosen: range) -> list[dict[str, Any]]:
        running = []
        for gpu in chosen:
            command = [sys.executable, "-m", "qwen_vit", "export", str(folder / "images")]
            options = {
                "--model": model, "--out": str(folder / out), "--part": f"{gpu + 1}/{gpus}",
                "--shard-size": str(max(1, images // (4 * gpus))), "--decode-threads": str(threads),
            }  # fmt: skip
            words = [word for pair in options.items() for word in pair]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONPATH": str(ROOT)}
            running.append(
                subprocess.Popen(
                    [*command, *words, "--yes", "--json"], stdout=subprocess.PIPE, env=environment
                )
            )
        return [json.loads(process.communicate()[0]) for process in running]

    with reported("warmed up"):
        run("warm", range(1))
    with reported("exported on one GPU"):
        alone = run("one", range(1))
    with reported(f"exported on {gpus}"):
        together = run("all", range(gpus))
    one = sum(part["exported"] for part in alone) / max(part["seconds"] for part in alone)
    every = sum(part["exported"] for part in together) / max(part["seconds"] for part in together)
    print(f"{'GPUs':<6}{'images/s':>10}\n{1:<6}{one:>10.1f}\n{gpus:<6}{every:>10.1f}")
    print(f"{every / one:.2f} times one GPU's rate")
    return {
        "gpus": gpus,
        "decode_threads": threads,
        "cores": cores,
        "images_per_s_one": round(one, 2),
        "images_per_s_all": round(every, 2),
        "times_one_gpu": round(every / one, 3),
        "seconds": [part["seconds"] for part in (*alone, *together)],
    }


def measure_memory(folder: Path, images: int, model: str, threads: int | None) -> dict[str, Any]:
    """Measure resident memory and GPU memory after each shard, over many images."""
    files = sorted((folder / "images").iterdir())
    with open(folder / "many.jsonl", "w") as file:
        for number in range(images):
            path = files[number % len(files)]
            file.write(json.dumps({"id": f"{number:06}.jpg", "path": str(path)}) + "\n")
    encoder = VisionEncoder.from_pretrained(model)
    samples: list[tuple[int, float, float]] = []
    options = ExportOptions(shard_size=max(1, images // 40))
    seen, clock = 0, StageTimer(REST)
    begin = time.perf_counter()
    with open_export(encoder, [str(folder / "many.jsonl")], folder / "out", options) as plan:
        for done in export_shards(encoder, plan, plan.shards, decode_threads=threads, clock=clock):
            seen += len(done.rows)
            on_gpu = torch.cuda.memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0
            samples.append((seen, sum(memory_mb(os.getpid())), on_gpu))
    seconds = time.perf_counter() - begin
    after_warm_up = [sample for sample in samples if sample[0] >= images // 4]
    growth = [max(each[i] for each in after_warm_up) - after_warm_up[0][i] for i in (1, 2)]
    print(f"{'images':>8}{'resident MB':>14}{'GPU MB':>10}")
    for count, resident, on_gpu in samples[:: max(1, len(samples) // 10)]:
        print(f"{count:>8}{resident:>14.0f}{on_gpu:>10.0f}")
    print(
        f"grown after the first quarter: {growth[0]:.0f} MB resident, {growth[1]:.0f} MB on the GPU"
    )
    return {
        "shard_size": options.shard_size,
        "seconds": round(seconds, 3),
        "images_per_s": round(images / seconds, 2),
        "waits_s": {stage: round(each, 2) for stage, each in clock.seconds().items()},
        "resident_mb": [round(after_warm_up[0][1]), round(max(each[1] for each in after_warm_up))],
        "gpu_mb": [round(after_warm_up[0][2]), round(max(each[2] for each in after_warm_up))],
        "grown_mb": [round(each, 1) for each in growth],
    }


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["speed", "gpus", "memory"]), default="speed")
@click.option("--images", type=int, help="Number of images.  [default: 2000; memory: 20000]")
@click.option(
    "--peer-images", default=100, show_default=True, help="Number of images for Hugging Face."
)
@click.option(
    "--checked",
    default=200,
    show_default=True,
    help="Number of images to encode alone for the comparison.",
)
@click.option(
    "--sides",
    nargs=2,
    type=int,
    help="Smallest and largest side in pixels.  [default: 448 1344; memory: 224 448]",
)
@click.option("--model", help="Use this model instead of a 7B-shaped tower with random weights.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for images and shards.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=ExportOptions().shard_size,
    show_default=True, help="Set the shard size of `speed`; `gpus` and `memory` set their own.",
)  # fmt: skip
@click.option("--decode-threads", type=int)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw a PNG of the speed.")
@ledger_options
def main(
    what: str, images: int | None, peer_images: int, checked: int, sides: tuple[int, int] | None,
    model: str | None, folder: Path | None, shard_size: int, decode_threads: int | None,
    chart: Path | None, ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    if model is None and not torch.cuda.is_available():
        raise click.ClickException(
            "this needs an NVIDIA GPU: torch finds none; to try it out, add --model tiny"
        )
    images = images or (20_000 if what == "memory" else 2_000)
    sides = sides or (SMALL_SIDES if what == "memory" else (448, 1344))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        made = min(images, MEMORY_FILES) if what == "memory" else images
        with reported("JPEGs made"), ProcessPoolExecutor() as pool:
            list(pool.map(partial(write_jpeg, folder / "images", sides), range(made), chunksize=8))
        if model is None:
            (folder / "model").mkdir()
            with reported("weights made"):
                write_model(folder / "model", torch.device("cuda"))
            model = str(folder / "model")
        if what == "speed":
            options = ExportOptions(shard_size=shard_size)
            found = measure_speed(folder, peer_images, checked, model, options, decode_threads)
        elif what == "gpus":
            found = measure_gpus(folder, images, model, decode_threads)
        else:
            found = measure_memory(folder, images, model, decode_threads)
    line = ledger_row(
        "export" if what == "speed" else f"export {what}",
        commit,
        default_device(),
        ("transformers",),
        **{"images": images, "sides_px": sides, **found},
    )
    publish(line, ledger)
    if chart is not None and what == "speed":
        draw(line, chart)
    if torch.cuda.is_available() and line.get("images_with_other_bytes_than_alone"):
        sys.exit(1)  # only on a GPU, because on a CPU a batch may change bits


if __name__ == "__main__":
    main()
