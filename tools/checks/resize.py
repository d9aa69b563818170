"""Compare the GPU's resize with Pillow's, bit for bit, over random sizes and contents.

Other processes make the pictures and resize them with Pillow. The cases shrink pictures by 40, grow
them, reduce them to one pixel, and have sides of 12,000 x 60. It then compares whole patches, also
in batches with patches from the CPU, and the encoder's embeddings of both paths. It prints a table,
and exits with 1 if a value differs.

\b
    python -m tools.checks.resize --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.resize --cases 1000 --processes 4
"""

import multiprocessing
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from qwen_vit.config import ImageConfig
from qwen_vit.images.on_gpu import patches_on_gpu, plan_passes, upload
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.images.picture import PIXEL_BYTES, Picture
from qwen_vit.images.pillow_order import Axis, knows_pillow, passes
from qwen_vit.kernels.resize import ResizePlan, resize
from tools.checks.resize_cases import KINDS, ResizeCase, make_cases
from tools.common import ledger_options, ledger_row, publish, require_gpu

CASES_A_TASK = 100
COLOURS = 0xFFFFFF  # the fourth byte of a pixel has no meaning
WHOLE_SIZES = (
    (1, 1), (27, 31), (56, 84), (60, 12_000), (12_000, 60), (1000, 750), (640, 480), (3000, 2000),
    (4000, 3000), (448, 448), (1344, 1344), (7, 1400), (1920, 1080),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawPicture:
    """Replace a `Picture`, with any new size."""

    size: tuple[int, int]
    new_size: tuple[int, int]

    @property
    def passes(self) -> tuple[Axis, ...]:
        return passes(self.size, self.new_size)


def wrong_cases(cases: Sequence[ResizeCase], device: torch.device) -> list[ResizeCase]:
    """Return the cases that the GPU resizes to other values than Pillow."""
    planned = plan_passes([RawPicture(case.old, case.new) for case in cases])
    plan = ResizePlan.of(planned.rounds, [])
    sources = b"".join(case.pixels for case in cases)
    buffer = upload(plan, [memoryview(sources)], planned.n_pixels, device)
    # Fill with -1, so that a value that no pass wrote is wrong.
    buffer.pixels[len(sources) // PIXEL_BYTES :].fill_(-1)
    resize(plan, buffer.table, buffer.pixels)
    expected = torch.frombuffer(
        bytearray(b"".join(case.resized for case in cases)), dtype=torch.int32
    ).to(device)
    sizes = [len(case.resized) // PIXEL_BYTES for case in cases]
    found = torch.cat(
        [
            buffer.pixels[place : place + size]
            for place, size in zip(planned.places, sizes, strict=True)
        ]
    )
    differs = (found ^ expected) & COLOURS != 0
    if not bool(differs.any()):
        return []
    return [
        case for case, part in zip(cases, differs.split(sizes), strict=True) if bool(part.any())
    ]


def made_ahead(pool: ProcessPoolExecutor, seeds: range, ahead: int) -> Iterator[list[ResizeCase]]:
    """Yield the cases of each seed, while the pool makes those of the next `ahead` seeds."""
    tasks: deque[Future[list[ResizeCase]]] = deque()
    for seed in seeds:
        tasks.append(pool.submit(make_cases, seed, CASES_A_TASK))
        if len(tasks) > ahead:
            yield tasks.popleft().result()
    while tasks:
        yield tasks.popleft().result()


def wrong_wholes(config: ImageConfig, device: torch.device) -> int:
    """Count pictures whose patches differ between the GPU and the CPU, in one mixed batch."""
    made = np.random.default_rng(1)
    images = [
        Image.fromarray(made.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in WHOLE_SIZES
    ]
    right = [patchify(image, config) for image in images]
    parts: list[Patches | Picture] = [
        patches if index % 4 == 3 else Picture.of(image, config)
        for index, (image, patches) in enumerate(zip(images, right, strict=True))
    ]
    joined = patches_on_gpu(parts, device, pinned_rows=0)
    found = joined.pixels.split([each.n_patches for each in right])
    same_grids = joined.grids == tuple(grid for each in right for grid in each.grids)
    wrong = [
        not torch.equal(ours.cpu(), theirs.pixels)
        for ours, theirs in zip(found, right, strict=True)
    ]
    return sum(wrong) + (not same_grids)


def wrong_embeddings(device: torch.device) -> int:
    """Count pictures whose embeddings differ between decoded pixels and CPU patches."""
    from qwen_vit.encoder import VisionEncoder

    encoder = VisionEncoder.from_pretrained("tiny", device=device)
    made = np.random.default_rng(2)
    images = [
        Image.fromarray(made.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in WHOLE_SIZES
    ]
    ours = encoder.encode(images)
    theirs = encoder.encode([patchify(image, encoder.image_config) for image in images])

    def differ(one: Tensor, other: Tensor) -> bool:
        return not torch.equal(one, other)

    return sum(differ(a.embeds, b.embeds) for a, b in zip(ours, theirs, strict=True))


def check(n_cases: int, processes: int, seed: int) -> dict[str, Any]:
    """Run all checks and print a table. The processes start before this one uses the GPU."""
    begin = time.perf_counter()
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        pool.submit(make_cases, seed, 1).result()  # start all processes now
        device = require_gpu()
        seeds = range(seed, seed + -(-n_cases // CASES_A_TASK))
        for cases in made_ahead(pool, seeds, 3 * processes):
            counts.update(case.kind for case in cases)
            for case in wrong_cases(cases, device):
                wrong[case.kind] += 1
                if wrong.total() <= 10:
                    print("differs:", case.kind, case.content, case.old, "to", case.new)
    seconds = time.perf_counter() - begin
    wholes = wrong_wholes(ImageConfig.from_json({"max_pixels": 12_845_056}), device)
    shrunk = wrong_wholes(ImageConfig.from_json({"max_pixels": 200_000}), device)
    embeddings = wrong_embeddings(device)
    print(f"\n{'Pillow ' + PIL.__version__:<24}{'cases':>8}{'different':>12}")
    for kind in KINDS:
        print(f"{kind:<24}{counts[kind]:>8}{wrong[kind]:>12}")
    print(f"{'all':<24}{counts.total():>8}{wrong.total():>12}{seconds:>10.0f} s")
    n = len(WHOLE_SIZES)
    print(f"{'patches in a batch':<24}{2 * n:>8}{wholes + shrunk:>12}")
    print(f"{'embeddings':<24}{n:>8}{embeddings:>12}")
    return {
        "pillow": PIL.__version__,
        "cases": dict(counts),
        "different": wrong.total(),
        "different_patches": wholes + shrunk,
        "different_embeddings": embeddings,
        "seconds": round(seconds, 1),
    }


@click.command(help=__doc__)
@click.option("--cases", type=click.IntRange(min=1), default=20_000, show_default=True)
@click.option("--processes", type=click.IntRange(min=1), default=14, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@ledger_options
def main(cases: int, processes: int, seed: int, ledger: Path | None, commit: str) -> None:
    if not knows_pillow():
        raise click.ClickException(f"the order of Pillow {PIL.__version__} is unknown")
    found = check(cases, processes, seed)
    row = ledger_row("resize", commit, require_gpu(), ("triton", "pillow"), **found)
    publish(row, ledger)
    if found["different"] or found["different_patches"] or found["different_embeddings"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
