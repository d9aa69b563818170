"""Measure our bf16 error and Hugging Face's error against float64, with the 7B-shaped tower on a
GPU.

It uses random weights without a download, eight seeds and four kinds of input, and measures every
stage. It prints a table and one JSON line. With --ledger, it appends that line to a file. It exits
with 1 if a stage's error is more than 1.01 times Hugging Face's error. It also exits with 1 if the
geometric mean of the ratios is above 1.

\b
    python -m tools.checks.parity --ledger tools/benchmarks/ledger.jsonl
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

import click
import torch

from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.images.patches import Patches
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.oracle import relative_error, vision_oracle
from tests.support.towers import build_tower, tower_trace
from tools.common import four_digits, ledger_options, ledger_row, publish, require_gpu
from tools.random_tower import SHAPE, random_weights

INPUTS = {
    "448 x 448": (Grid(1, 32, 32),),
    "644 x 1036": (Grid(1, 46, 74),),
    "ten odd sizes": tuple(
        Grid(1, h, w)
        for h, w in [
            (2, 2), (6, 10), (18, 14), (34, 22), (10, 50), (26, 26), (2, 40), (16, 16), (30, 46),
            (38, 12),
        ]
    ),
    "8 video frames": (Grid(4, 20, 28),),
}  # fmt: skip
MAX_STAGE_RATIO, MAX_MEAN_RATIO = 1.01, 1.00


def measure(seeds: int, device: torch.device) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return (our error, Hugging Face's error) per seed for each input and stage."""
    config = VisionConfig.from_json(SHAPE)
    image_config = ImageConfig.from_json({})
    errors: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: defaultdict(list) for name in INPUTS
    }
    for seed in range(seeds):
        tensors = random_weights(config, seed, device)
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        ours = build_tower(on_host, config, image_config, torch.bfloat16, device)
        theirs = hf_tower(tensors, config, torch.bfloat16, device)
        for name, grids in INPUTS.items():
            n_patches = sum(grid.n_patches for grid in grids)
            generator = torch.Generator().manual_seed(1000 + seed)
            pixels = torch.randint(0, 256, (n_patches, 588), generator=generator).byte()
            rows = Patches(pixels, grids).to_rows(image_config).to(device)
            # A clip enters as float rows, because its two frames differ. A still enters as uint8.
            is_clip = any(grid.t > 1 for grid in grids)
            truth = vision_oracle(tensors, config, rows, grids, device=device)
            trace = tower_trace(ours, rows if is_clip else pixels.to(device), grids)
            reference = hf_trace(theirs, rows, grids)
            for stage in truth:
                pair = [relative_error(t[stage], truth[stage]) for t in (trace, reference)]
                errors[name][stage].append((pair[0], pair[1]))
        print(f"seed {seed} done", file=sys.stderr)
    return errors


@click.command(help=__doc__)
@click.option("--seeds", default=8, show_default=True)
@ledger_options
def main(seeds: int, ledger: Path | None, commit: str) -> None:
    """Measure, print, and exit with 1 if a stage exceeds its tolerance."""
    device = require_gpu()
    errors = measure(seeds, device)
    print(f"{'input':<16}{'stage':<14}{'ours':>10}{'HF bf16':>10}{'ratio':>8}{'worst':>8}")
    report, is_good = {}, True
    for name, stages in errors.items():
        for stage, pairs in stages.items():
            ratios = [a / b for a, b in pairs]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            good = max(ratios) <= MAX_STAGE_RATIO and mean <= MAX_MEAN_RATIO
            is_good &= good
            row = {
                "ours": sum(a for a, _ in pairs) / len(pairs),
                "hf": sum(b for _, b in pairs) / len(pairs),
                "ratio_geometric_mean": mean,
                "ratio_worst": max(ratios),
            }
            report[f"{name}, {stage}"] = {key: four_digits(value) for key, value in row.items()}
            if not good or stage in ("patch_embed", "block.0", "block.7", "block.31", "merger"):
                print(
                    f"{name:<16}{stage:<14}{row['ours']:>10.2e}{row['hf']:>10.2e}"
                    f"{mean:>8.3f}{max(ratios):>8.3f}{'' if good else '  <- too large'}"
                )
    line = ledger_row(
        "parity",
        commit,
        device,
        ("triton", "transformers"),
        seeds=seeds,
        good=is_good,
        worst_ratio=max(row["ratio_worst"] for row in report.values()),
        worst_geometric_mean=max(row["ratio_geometric_mean"] for row in report.values()),
        stages=report,
    )
    publish(line, ledger)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
