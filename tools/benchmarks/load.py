"""Time `VisionEncoder.from_pretrained` of a local file, and plain copies of the same bytes.

The file is in the page cache. One thread that reads the whole file into allocated memory sets the
copy rate. The command also measures other plain copies and each stage of a load alone. It measures
the host memory that a load adds in a fresh process. Without --model, it uses a 7B-shaped tower in
bf16 with random weights. It prints tables and one JSON line.

\b
    python -m tools.benchmarks.load --ledger tools/benchmarks/ledger.jsonl
    python -m tools.benchmarks.load --sweep                   # threads and sizes of pieces as well
    python -m tools.benchmarks.load --model tiny              # anywhere
"""

import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from qwen_vit.checkpoint import convert
from qwen_vit.checkpoint.hub import find_checkpoint
from qwen_vit.checkpoint.load import find_tower, load_checkpoint
from qwen_vit.checkpoint.to_device import MAX_THREADS, PIECE_BYTES, _through_slots, to_device
from qwen_vit.common.safetensors_header import LENGTH_BYTES
from qwen_vit.common.tensors import extremes
from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.model import VisionTower
from qwen_vit.weight_format import padded_pixel_size, pixel_weight_exponent
from tests.support.process_memory import memory_mb
from tools.common import default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

PAGE_CACHE = "page cache to memory"
READ_BYTES = 4 * 2**20
WANTED_SHARE = 0.8
SWEPT_THREADS, SWEPT_MIB = (1, 2, 4, 8, 16), (1, 2, 4, 8)


@dataclass(frozen=True)
class Piece:
    """Describe the bytes of tensors in a file, and the place of these bytes among all bytes."""

    path: Path
    start: int
    end: int
    to: int


def pieces_of(folder: Path, size: int) -> list[Piece]:
    spans: list[tuple[Path, int, int]] = []
    stored = find_tower(folder).stored()
    for path in sorted({tensor.path for tensor in stored}):
        with path.open("rb") as file:
            data_start = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        for info in sorted((t.info for t in stored if t.path == path), key=lambda info: info.start):
            start, end = data_start + info.start, data_start + info.end
            if spans and (spans[-1][0], spans[-1][2]) == (path, start):
                start = spans.pop()[1]
            spans.append((path, start, end))
    pieces, to = [], 0
    for path, start, end in spans:
        for at in range(start, end, size):
            pieces.append(Piece(path, at, min(at + size, end), to))
            to += pieces[-1].end - at
    return pieces


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the time until the GPU has finished. Free the result after the measurement."""
    gc.collect()
    begin = time.perf_counter()
    _result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@contextmanager
def opened(pieces: list[Piece]) -> Iterator[dict[Path, int]]:
    files = {path: os.open(path, os.O_RDONLY) for path in {piece.path for piece in pieces}}
    yield files
    for descriptor in files.values():
        os.close(descriptor)


def read_piece(files: dict[Path, int], memory: memoryview, piece: Piece) -> None:
    """Copy to a separate place in memory, or over the previous bytes."""
    size = piece.end - piece.start
    at = piece.to if len(memory) > READ_BYTES else 0
    if os.preadv(files[piece.path], [memory[at : at + size]], piece.start) != size:
        raise OSError(f"{piece} was not read completely")


def read_all(pieces: list[Piece], memory: memoryview, threads: int = 1) -> None:
    with opened(pieces) as files:
        read = partial(read_piece, files, memory)
        if threads == 1:
            for piece in pieces:
                read(piece)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, pieces))


def read_then_fetch(pieces: list[Piece], pinned: torch.Tensor, target: torch.Tensor) -> None:
    """Copy with one thread into pinned memory and to the GPU, and wait."""
    memory = memoryview(pinned.numpy())  # type: ignore[arg-type]
    with opened(pieces) as files:
        for piece in pieces:
            read_piece(files, memory, piece)
            size = piece.end - piece.start
            target[piece.to : piece.to + size].copy_(pinned[:size])


def plain_copies(folder: Path, device: torch.device) -> dict[str, Callable[[], Any]]:
    pieces = pieces_of(folder, READ_BYTES)
    total = pieces[-1].to + pieces[-1].end - pieces[-1].start
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    memory = memoryview(bytearray(max(total, READ_BYTES + 1)))
    memory[:] = bytes(len(memory))  # the system allocates touched pages
    runs: dict[str, Callable[[], Any]] = {
        PAGE_CACHE: partial(read_all, pieces, memory),
        f"the same, {threads} threads": partial(read_all, pieces, memory, threads),
        "all into one buffer of 4 MiB": partial(read_all, pieces, memory[:READ_BYTES]),
    }
    if device.type == "cuda":
        pinned = torch.empty(READ_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(total, dtype=torch.uint8, device=device)
        large = torch.empty(min(total, 2**28), dtype=torch.uint8, pin_memory=True)

        def mapped() -> Any:
            return [tensor.to(device) for tensor in load_checkpoint(folder).tensors.values()]

        def fetch() -> None:
            for at in range(0, total, len(large)):
                part = target[at : at + len(large)]
                part.copy_(large[: len(part)], non_blocking=True)

        runs["page cache, pinned, GPU"] = partial(read_then_fetch, pieces, pinned, target)
        runs["mapped tensors .to(GPU)"] = mapped
        runs["pinned memory to GPU"] = fetch
    return runs


def stages(folder: Path, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Time the parts of a load. On a GPU, a load overlaps reading, folding and patch embedding."""
    checkpoint = load_checkpoint(folder)
    config, image_config = checkpoint.config, ImageConfig.from_json({})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    on_device = {name: tensor.to(device) for name, tensor in checkpoint.tensors.items()}
    planned = [
        recipe
        for recipe in convert.recipes(config, image_config, dtype, device)
        if recipe.sources != (convert.PATCH_WEIGHT,)  # patch embedding is a separate stage
    ]
    state = convert.convert(checkpoint.tensors, config, image_config, dtype, device)

    def meta_tower() -> VisionTower:
        with torch.device("meta"):
            return VisionTower(config, dtype)

    def fold() -> Any:
        return [recipe.make(*(on_device[name] for name in recipe.sources)) for recipe in planned]

    def check() -> None:
        torch.stack([extremes(tensor).float() for tensor in state.values()]).isfinite().tolist()

    def patch_embedding() -> Any:
        exponent, K = pixel_weight_exponent(dtype), padded_pixel_size(config)
        weight = checkpoint.tensors[convert.PATCH_WEIGHT]
        return convert._patch_embedding(weight, image_config, exponent, K)

    return {
        "find and check headers": partial(load_checkpoint, folder),
        "model on meta": meta_tower,
        "look tensors up": lambda: list(load_checkpoint(folder).tensors.values()),
        "read and fetch": lambda: list(to_device(load_checkpoint(folder).tensors.values(), device)),
        "fold on the device": fold,
        "check on the device": check,
        "patch embedding on the CPU": patch_embedding,
        "convert, all of it": lambda: convert.convert(
            load_checkpoint(folder).tensors, config, image_config, dtype, device
        ),
        "assign": lambda: meta_tower().load_state_dict(state, strict=True, assign=True),
    }


def first_load(folder: str, device: str) -> dict[str, float]:
    """Return a load's seconds and added MB, in a fresh process that has loaded the tiny tower."""
    VisionEncoder.from_pretrained("tiny", device=device)
    gc.collect()
    before = most = memory_mb(os.getpid())
    is_over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.001):
            own, mapped = memory_mb(os.getpid())
            most = (max(most[0], own), max(most[1], mapped))

    watcher = threading.Thread(target=watch)
    watcher.start()
    load = partial(VisionEncoder.from_pretrained, folder, device=device)
    taken = seconds(load, torch.device(device))
    is_over.set()
    watcher.join()
    pinned = torch.cuda.host_memory_stats() if device != "cpu" else {}
    return {
        "seconds": four_digits(taken),
        "own_peak": round(most[0] - before[0], 1),
        "mapped_files_peak": round(most[1] - before[1], 1),
        "pinned_peak": round(pinned.get("allocated_bytes.peak", 0) / 2**20, 1),
    }


def through_slots(
    tensors: list[torch.Tensor], device: torch.device, threads: int, piece_bytes: int
) -> list[torch.Tensor]:
    return list(_through_slots(tensors, device, threads, piece_bytes))


@contextmanager
def model_folder(model: str | None, folder: Path | None, device: torch.device) -> Iterator[Path]:
    if model is not None:
        yield find_checkpoint(model).folder
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_model(Path(temporary), device)
        yield Path(temporary)


@click.command(help=__doc__)
@click.option("--model", help="Use this model instead of a 7B-shaped tower with random weights.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for the random weights.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--sweep", is_flag=True, help="Also measure numbers of threads and piece sizes.")
@ledger_options
def main(
    model: str | None, folder: Path | None, repeats: int, sweep: bool, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    """Measure, print, and exit 1 on a GPU below 80 % of the page cache's copy rate."""
    device = default_device()
    with model_folder(model, folder, device) as checkpoint:
        pieces = pieces_of(checkpoint, READ_BYTES)
        total = sum(piece.end - piece.start for piece in pieces)
        largest = max(t.info.end - t.info.start for t in find_tower(checkpoint).stored())
        read_all(pieces, memoryview(bytearray(READ_BYTES)))  # fills the page cache

        def median(run: Callable[[], Any], times: int = repeats) -> float:
            return statistics.median(seconds(run, device) for _ in range(times))

        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as pool:
            first = pool.submit(first_load, str(checkpoint), str(device)).result()
        # Time the copies before and after the loads, to detect other work on the machine.
        copies = {name: [median(run)] for name, run in plain_copies(checkpoint, device).items()}
        load = partial(VisionEncoder.from_pretrained, checkpoint, device=device)
        seconds(load, device)
        load_s = median(load)
        for name, run in plain_copies(checkpoint, device).items():
            copies[name].append(median(run))
        gc.collect()
        stage_s = {name: median(run) for name, run in stages(checkpoint, device).items()}
        swept: dict[str, float] = {}
        if sweep:
            tensors = list(load_checkpoint(checkpoint).tensors.values())
            for threads, mib in itertools.product(SWEPT_THREADS, SWEPT_MIB):
                load_all = partial(through_slots, tensors, device, threads, mib * 2**20)
                swept[f"{threads} x {mib} MiB"] = total / 1e9 / median(load_all, 3)

    rates = {name: total / min(taken) / 1e9 for name, taken in copies.items()}
    rate = total / load_s / 1e9
    share = rate / rates[PAGE_CACHE]
    print(f"{total / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB; {MAX_THREADS} threads at "
          f"most, pieces of {PIECE_BYTES / 2**20:g} MiB; {device}")  # fmt: skip
    loads = {"load": rate, "load, first of a process": total / first["seconds"] / 1e9}
    print_table(total, rates | loads, stage_s, swept)
    print("host memory that a load adds, MiB: " + ", ".join(
        f"{name.replace('_', ' ')} {mb}" for name, mb in first.items() if name != "seconds"
    ))  # fmt: skip
    line = ledger_row(
        "load",
        commit,
        device,
        ("safetensors",),
        bytes=total,
        largest_tensor_bytes=largest,
        load_s=four_digits(load_s),
        load_gb_per_s=four_digits(rate),
        share_of_the_page_cache=four_digits(share),
        copies_gb_per_s={name: four_digits(each) for name, each in rates.items()},
        stages_ms={name: round(taken * 1e3, 1) for name, taken in stage_s.items()},
        first_of_a_process=first,
    )
    publish(line, ledger)
    sys.exit(1 if device.type == "cuda" and share < WANTED_SHARE else 0)


def print_table(
    total: int,
    rates: dict[str, float],
    stage_s: dict[str, float],
    swept: dict[str, float],
) -> None:
    """Format the GB/s of whole loads and copies, then of the stages and of the sweep."""
    print(f"{'':<28}{'ms':>9}{'GB/s':>9}{'load is':>10}")
    for name, each in rates.items():
        print(f"{name:<28}{total / each / 1e6:>9.1f}{each:>9.2f}{rates['load'] / each:>9.2f}x")
    for name, taken in stage_s.items():
        print(f"  {name:<26}{taken * 1e3:>9.1f}{total / taken / 1e9:>9.2f}")
    for name, each in swept.items():
        print(f"  {name:<26}{'':>9}{each:>9.2f}")


if __name__ == "__main__":
    main()
