"""Compare the bits, and on a GPU the speed, of this checkout and another checkout.

Use it for a change that must not alter results. It hashes outputs over random layouts in both
checkouts. On a GPU, it times both checkouts in interleaved runs. It times the other checkout twice
(A/A), to show the noise. float32 is slow, so it gets a fifth of the layouts. Without --model, it
also gets a tower of the same widths with 4 blocks, of which one has full attention.

    git worktree add ../before HEAD~1
    python -m tools.checks.against ../before
    python -m tools.checks.against ../before --model tiny --layouts 20 --pairs 0   # on a CPU
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from tools.common import ROOT, default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

CHILD = Path(__file__).with_name("against_child.py")


def run_child(checkout: Path, *arguments: str) -> Any:
    """Return the child's output, with `qwen_vit` imported from `checkout`."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *arguments],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=tempfile.gettempdir(),  # in this checkout, Python would import this checkout's package
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"{checkout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def kinds_of(layouts: int) -> dict[str, list[str]]:
    """Return the child's arguments, after the model, for each kind of hash."""
    if not torch.cuda.is_available():
        return {"float32": ["float32", str(layouts)]}
    fewer = str(max(layouts // 5, 1))
    return {
        "bfloat16, graphs": ["bfloat16", str(layouts), "--graphs"],
        "bfloat16, no graphs": ["bfloat16", str(layouts)],
        "float32, graphs": ["float32", fewer, "--graphs"],
        "float32, no graphs": ["float32", fewer],
    }


def same_bits(other: Path, models: dict[str, str], layouts: int) -> dict[str, bool]:
    """Return whether both checkouts give the same bits, for each of `kinds_of`.

    `models` has a folder for each dtype.
    """
    kinds = kinds_of(layouts)
    with ThreadPoolExecutor(2 * len(kinds)) as pool:
        digests = {
            kind: [
                pool.submit(run_child, checkout, "hash", models[arguments[0]], *arguments)
                for checkout in (ROOT, other)
            ]
            for kind, arguments in kinds.items()
        }
        return {kind: ours.result() == theirs.result() for kind, (ours, theirs) in digests.items()}


def medians(other: Path, model: str, pairs: int) -> dict[str, dict[str, float]]:
    """Map each workload to the median milliseconds of this checkout, of the other checkout, and of
    the other checkout's second run."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(pairs):
        for side, checkout in (("ours", ROOT), ("other", other), ("again", other)):
            for workload, ms in run_child(checkout, "speed", model).items():
                times[workload][side].append(ms)
    return {
        workload: {side: four_digits(statistics.median(ms)) for side, ms in sides.items()}
        for workload, sides in times.items()
    }


@click.command(help=__doc__)
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--model", help="Use this folder, or 'tiny'.  [default: the 7B shape, random weights]"
)
@click.option("--layouts", default=200, show_default=True)
@click.option(
    "--pairs",
    default=5,
    show_default=True,
    help="Number of timed runs per checkout; 0 skips timing.",
)
@ledger_options
def main(
    other: Path, model: str | None, layouts: int, pairs: int, ledger: Path | None, commit: str
) -> None:
    """Hash, time and print. Exit with 1 if a bit differs."""
    other = other.resolve()
    git = ["git", "-C", str(other), "rev-parse", "--short", "HEAD"]
    named = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        chosen, shallow = model or f"{folder}/7b", model or f"{folder}/shallow"
        if model is None:
            write_model(Path(chosen), default_device())
            write_model(Path(shallow), default_device(), depth=4, fullatt_block_indexes=[2])
        same = same_bits(other, {"bfloat16": chosen, "float32": shallow}, layouts)
        times = medians(other, chosen, pairs) if pairs and torch.cuda.is_available() else {}
    for kind, equal in same.items():
        print(f"{kind:<24}{'the same bits' if equal else 'OTHER BITS'}")
    for workload, ms in times.items():
        ratios = f"{ms['ours'] / ms['other']:.4f}   A/A {ms['again'] / ms['other']:.4f}"
        print(f"{workload:<24}{ms['ours']:>8.3f} / {ms['other']:.3f} ms = {ratios}")
    row = ledger_row(
        "against", commit, default_device(), ("triton",), other=named or other.name,
        same_bits=all(same.values()),
        model=model or "7B shape, random weights", layouts=layouts, pairs=pairs, ms=times,
    )  # fmt: skip
    publish(row, ledger)
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
