"""Run in each checkout for `tools.checks.against`, with the public API only, for old checkouts.

python against_child.py hash MODEL DTYPE LAYOUTS   sha256 of outputs over random layouts, as JSON
python against_child.py speed MODEL                GPU milliseconds of some workloads, as JSON
"""

import hashlib
import json
import random
from typing import Any

import click
import numpy as np
import torch

from qwen_vit import VisionEncoder

WORKLOADS = ("1 x 448^2", "1 x 896^2", "1 x 1344^2", "32 x 448^2")


@click.group(help=__doc__)
def main() -> None:
    """Run one of the two commands."""


@main.command("hash")
@click.argument("model")
@click.argument("dtype")
@click.argument("layouts", type=int)
@click.option("--graphs", is_flag=True, help="Record CUDA graphs.")
def hash_outputs(model: str, dtype: str, layouts: int, *, graphs: bool) -> None:
    """Hash merged and un-merged outputs."""
    half = 24 if torch.cuda.is_available() else 8  # half the largest side in patches
    encoder = VisionEncoder.from_pretrained(model, dtype=dtype, cuda_graphs=graphs)
    chance, digest = random.Random(0), hashlib.sha256()
    for case in range(layouts):
        grids = [
            (chance.choice((1, 1, 1, 2)), *(2 * chance.randint(1, half) for _ in range(2)))
            for _ in range(chance.randint(1, 6))
        ]
        rows = torch.randn(
            sum(t * h * w for t, h, w in grids), 1176, device=encoder.device,
            generator=torch.Generator(encoder.device).manual_seed(case),
        )  # fmt: skip
        digest.update(bytes_of(encoder.encode_patches(rows, torch.tensor(grids))))
        if case % 4 == 0:
            numbers = np.random.default_rng(case)
            images = [
                numbers.integers(0, 256, (14 * h, 14 * w, 3), dtype=np.uint8) for _, h, w in grids
            ]
            both = [*encoder.encode(images), *encoder.encode(images, output="patch")]
            for features in both:
                digest.update(bytes_of(features.embeds))
    click.echo(json.dumps(digest.hexdigest()))


def bytes_of(rows: torch.Tensor) -> Any:
    return rows.contiguous().view(torch.uint8).cpu().numpy()


@main.command()
@click.argument("model")
def speed(model: str) -> None:
    """Measure milliseconds by workload."""
    from qwen_vit.benchmark import bench

    encoder = VisionEncoder.from_pretrained(model, device="cuda")
    click.echo(json.dumps({row.workload: row.ms for row in bench(encoder, WORKLOADS)}))


if __name__ == "__main__":
    main()
