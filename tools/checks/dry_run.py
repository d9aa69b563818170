"""Compare the time estimate of `qwen-vit export --dry-run` with the time of the export.

It makes small and large JPEGs from tests/photographs. Without --model, it uses a 7B-shaped tower in
bf16 with random weights. It runs a user's commands in child processes to estimate and export each
workload. It prints a table and one JSON line. It exits with 1 if an estimate is off by more than a
factor of 1.5.

\b
    python -m tools.checks.dry_run --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.dry_run --images 40 --sides 56 280 --model tiny    # anywhere
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from tools.benchmarks.export import write_jpeg
from tools.common import ROOT, default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

MAX_FACTOR = 1.5  # the allowed ratio of estimate and export
# (sides, images). In an export of seconds, the start of the first batches would dominate.
WORKLOADS = (((224, 448), 20_000), ((448, 1344), 3_000))


def export(images: Path, model: str, out: Path, *options: str) -> dict[str, Any]:
    """Return the JSON that `qwen-vit export` prints."""
    command = [sys.executable, "-m", "qwen_vit", "export", str(images), "--model", model]
    done = subprocess.run(
        [*command, "--out", str(out), "--json", "--yes", "--quiet", *options],
        stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def measure(folder: Path, sides: tuple[int, int], count: int, model: str) -> dict[str, Any]:
    """Estimate and export one workload. The first export compiles kernels, and is not timed."""
    images = folder / f"images-{sides[0]}-{sides[1]}"
    images.mkdir()
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_jpeg, images, sides), range(count), chunksize=8))
    some = folder / "some.txt"
    some.write_text("".join(f"{path}\n" for path in sorted(images.iterdir())[:50]))
    export(some, model, folder / f"warm-{sides[0]}")
    estimate = export(images, model, folder / f"out-{sides[0]}", "--dry-run")
    done = export(images, model, folder / f"out-{sides[0]}")
    return {
        "sides_px": sides,
        "images": count,
        "rows": [estimate["rows"], done["rows"]],
        "bytes": [estimate["bytes"], done["bytes"]],
        "estimate_s": estimate["seconds"],
        "export_s": four_digits(done["seconds"]),
        "estimate_over_export": four_digits(estimate["seconds"] / done["seconds"]),
        "waits_s": {stage: four_digits(seconds) for stage, seconds in done["waits"].items()},
    }


def is_close(workload: dict[str, Any]) -> bool:
    """Return whether an estimate is within the factor.

    >>> is_close({"estimate_over_export": 1.4}), is_close({"estimate_over_export": 0.6})
    (True, False)
    """
    ratio: float = workload["estimate_over_export"]
    return 1 / MAX_FACTOR <= ratio <= MAX_FACTOR


@click.command(help=__doc__)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    help="Number of images.  [default: 20,000 small, 3,000 large]",
)
@click.option(
    "--sides", nargs=2, type=int, help="Measure one workload with sides in this range, in pixels."
)
@click.option("--model", help="Use this model instead of a 7B-shaped tower with random weights.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for images and shards.")
@ledger_options
def main(
    images: int | None, sides: tuple[int, int] | None, model: str | None, folder: Path | None,
    ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    if model is None and not torch.cuda.is_available():
        raise click.ClickException(
            "this needs an NVIDIA GPU: torch finds none; to try it out, add --model tiny"
        )
    workloads = WORKLOADS if sides is None else ((sides, WORKLOADS[1][1]),)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        folder = Path(temporary)
        if model is None:
            (folder / "model").mkdir()
            write_model(folder / "model", torch.device("cuda"))
            model = str(folder / "model")
        found = [measure(folder, sides, images or count, model) for sides, count in workloads]
    print(f"{'sides':<14}{'images':>8}{'estimate':>12}{'export':>12}{'ratio':>8}")
    for each in found:
        low, high = each["sides_px"]
        times = f"{each['estimate_s']:>10.1f} s{each['export_s']:>10.1f} s"
        ratio = f"{each['estimate_over_export']:>8.2f}"
        print(f"{f'{low} to {high}':<14}{each['images']:>8,}{times}{ratio}")
    publish(ledger_row("dry run", commit, default_device(), ("pillow",), workloads=found), ledger)
    if not all(map(is_close, found)):
        sys.exit(1)


if __name__ == "__main__":
    main()
