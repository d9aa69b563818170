"""Time our tower and Hugging Face's tower on this CPU in float32, with `tiny` and the 7B shape.

`tiny` encodes an image of 640 x 427. The 7B shape (random weights) encodes an image of 448 x 448.
Each round runs both towers in one process, so that other work on the machine slows both. The
results are medians over the rounds, as wall time and CPU time. With OMP_NUM_THREADS=1, other work
hardly changes the CPU time. For each case, it prints a text line and a JSON line. With --ledger, it
appends the JSON line to a file. It exits with 1 above 2 times Hugging Face's time, or if the
results differ by more than 1e-5.

\b
    python -m tools.benchmarks.cpu --case tiny
    python -m tools.benchmarks.cpu --ledger tools/benchmarks/ledger.jsonl
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.compare.huggingface import hf_tower
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.images.patches import Patches
from tests.support.oracle import relative_error
from tests.support.towers import build_tower, layout_for
from tools.common import ROOT, ledger_options, ledger_row, publish
from tools.random_tower import SHAPE, random_weights

CASES = {"tiny": Grid(1, 30, 46), "7b": Grid(1, 32, 32)}  # 640 x 427 and 448 x 448 pixels
ROUNDS = {"tiny": 25, "7b": 3}
MAX_RATIO, MAX_DIFFERENCE = 2.0, 1e-5


def checkpoint(case: str) -> tuple[Mapping[str, Tensor], VisionConfig, ImageConfig]:
    """Return weights by published name, and their purpose."""
    if case == "tiny":
        loaded = load_checkpoint(str(ROOT / "weights" / "tiny"))
        return loaded.tensors, loaded.config, loaded.image_config
    config = VisionConfig.from_json(SHAPE)
    return random_weights(config, 0, torch.device("cpu")), config, ImageConfig.from_json({})


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Return wall time and this process's CPU time, which on one thread ignores other work."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu_start


def comparison(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return both medians, and the median of the rounds' ratios."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    medians = map(statistics.median, (ours, theirs, ratios))
    our, their, ratio = (round(median, 4) for median in medians)
    return our, their, ratio


@torch.no_grad()
def measure(case: str, rounds: int) -> dict[str, Any]:
    """Return both towers' seconds, the rounds' ratio, and the relative error of the results."""
    tensors, config, image_config = checkpoint(case)
    grid = CASES[case]
    pixels = torch.randint(0, 256, (grid.n_patches, 588)).byte()
    rows = Patches(pixels, (grid,)).to_rows(image_config)
    grid_thw = torch.tensor([[grid.t, grid.h, grid.w]])
    theirs = hf_tower(tensors, config, torch.float32, "cpu")
    ours = build_tower(tensors, config, image_config, torch.float32)
    layout = layout_for((grid,), config)
    expected = theirs(rows, grid_thw=grid_thw).pooler_output  # the first call is not timed
    difference = relative_error(ours(pixels, layout), expected)
    pairs = [
        (seconds(lambda: ours(pixels, layout)), seconds(lambda: theirs(rows, grid_thw=grid_thw)))
        for _ in range(rounds)
    ]
    our, their = zip(*pairs, strict=True)
    ours_s, hf_s, ratio = comparison([wall for wall, _ in our], [wall for wall, _ in their])
    ours_cpu_s, hf_cpu_s, cpu_ratio = comparison([cpu for _, cpu in our], [cpu for _, cpu in their])
    return {
        "case": case,
        "rounds": rounds,
        "ours_s": ours_s,
        "hf_s": hf_s,
        "ratio": ratio,
        "ours_cpu_s": ours_cpu_s,
        "hf_cpu_s": hf_cpu_s,
        "cpu_ratio": cpu_ratio,
        "relative_difference": float(f"{difference:.3g}"),
    }


@click.command(help=__doc__)
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, default=CASES)
@click.option(
    "--rounds", type=int, help="Number of rounds per case.  [default: 25 for tiny, 3 for 7b]"
)
@ledger_options
def main(cases: tuple[str, ...], rounds: int | None, commit: str, ledger: Path | None) -> None:
    """Measure, print, and exit 1 above twice Hugging Face's time."""
    passed = True
    for case in cases:
        load = os.getloadavg()[0]
        found = measure(case, rounds or ROUNDS[case])
        print(
            f"{case}: ours {found['ours_s']:.3f} s, Hugging Face {found['hf_s']:.3f} s, "
            f"{found['ratio']:.2f} times ({found['cpu_ratio']:.2f} in CPU time); they differ by "
            f"{found['relative_difference']:.1e}"
        )
        publish(
            ledger_row(
                "cpu",
                commit,
                "cpu",
                ("triton", "transformers"),
                threads=torch.get_num_threads(),
                load_before=round(load, 1),
                **found,
            ),
            ledger,
        )
        passed &= found["ratio"] <= MAX_RATIO and found["relative_difference"] <= MAX_DIFFERENCE
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
