"""The 7B-shaped tower on one 448 x 448 image in float32 on this CPU, beside Hugging Face's.

Random weights; both in one process, one after the other, best of three. Prints a line for people
and one JSON line; with --ledger, appends that line to a file.

\b
    python -m tools.benchmarks.cpu --ledger tools/benchmarks/ledger.jsonl
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.images.patches import Patches
from tests.support.huggingface import hf_tower
from tests.support.oracle import relative_error
from tests.support.towers import build_tower, layout_for
from tools.common import ledger_options, ledger_row, publish
from tools.random_tower import SHAPE, random_weights


def best_seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@click.command(help=__doc__)
@ledger_options
@torch.no_grad()
def main(commit: str, ledger: Path | None) -> None:
    """Measure, print, and exit 1 above 4 times Hugging Face's time."""
    config, image_config = VisionConfig.from_json(SHAPE), ImageConfig.from_json({})
    tensors = random_weights(config, 0, torch.device("cpu"))
    grids = (Grid(1, 32, 32),)
    pixels = torch.randint(0, 256, (1024, 588)).byte()
    rows = Patches(pixels, grids).to_rows(image_config)

    theirs = hf_tower(tensors, config, torch.float32, "cpu")
    grid_thw = torch.tensor([[1, 32, 32]])
    expected = theirs(rows, grid_thw=grid_thw).pooler_output
    their_seconds = best_seconds(lambda: theirs(rows, grid_thw=grid_thw))
    ours = build_tower(tensors, config, image_config, torch.float32)
    layout = layout_for(grids, config)
    error = relative_error(ours(pixels, layout), expected)
    our_seconds = best_seconds(lambda: ours(pixels, layout))

    ratio = our_seconds / their_seconds
    print(
        f"1 x 448^2, float32, {torch.get_num_threads()} threads: ours {our_seconds:.1f} s, "
        f"Hugging Face {their_seconds:.1f} s, {ratio:.2f} times; they differ by {error:.1e}"
    )
    line = ledger_row(
        "cpu",
        commit,
        "cpu",
        ("triton", "transformers"),
        threads=torch.get_num_threads(),
        ours_s=round(our_seconds, 2),
        hf_s=round(their_seconds, 2),
        ratio=round(ratio, 3),
        relative_difference=float(f"{error:.3g}"),
    )
    publish(line, ledger)
    sys.exit(0 if ratio <= 4 and error <= 1e-5 else 1)


if __name__ == "__main__":
    main()
