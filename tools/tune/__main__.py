"""Sweep the tiles of the kernels' tables on this GPU, and propose rows without changing files.

It tests every GEMM and attention of the 7B-shaped tower at each number of patches. It compiles and
runs each candidate in a child process, which may fail or crash. If tiles must not change bits, the
result must have the bits of the current row. Otherwise its error against float64 must be as small.
It times passing candidates in interleaved CUDA graphs, with weights outside the cache. It prints a
table and the rows to paste.

\b
    python -m tools.tune --list                             # prints the candidates; needs no GPU
    python -m tools.tune --only down --only proj --rows 1024,4096
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
import torch

from qwen_vit.kernels import IS_KNOWN_GLUON
from tools.tune.kernels import GLUON, KERNELS, OTHER, PLAIN, Kernel
from tools.tune.sweep import sweep


def chosen(only: Iterable[str], on_hopper: bool) -> list[Kernel]:
    """Return the requested kernels, or the kernels that a GPU of this kind runs in bf16."""
    place = OTHER if not on_hopper else GLUON if IS_KNOWN_GLUON else PLAIN
    names = list(only) or [
        kernel.name
        for kernel in KERNELS.values()
        if place in kernel.places and not kernel.name.endswith("fp32")
    ]
    return [KERNELS[name] for name in names]


def listed(kernel: Kernel, patches: Sequence[int]) -> dict[str, Any]:
    return {
        "kernel": kernel.name,
        "table": kernel.table,
        "present": {n: asdict(kernel.present(n)) for n in patches},
        "candidates": [asdict(tile) for tile in kernel.candidates],
    }


def as_table(swept: Sequence[Mapping[str, Any]]) -> str:
    line = "{:<16}{:>8}  {:<20}{:>10}  {:<20}{:>10}{:>8}  {}"
    head = ("kernel", "patches", "present", "us", "best", "us", "gain", "bits")
    lines = [line.format(*head)]
    for each in swept:
        for row in each["rows"]:
            best, present = ("x".join(map(str, row[k].values())) for k in ("best", "present"))
            lines.append(
                line.format(
                    each["kernel"], row["patches"], present, f"{row['present_us']:.1f}", best,
                    f"{row['best_us']:.1f}", f"{row['gain']:+.1%}",
                    "same" if row["same_bits"] else "other",
                )
            )  # fmt: skip
        for problem, count in each["skipped"].items():
            lines.append(f"    {count} skipped: {problem}")
    lines.append("\nProposed rows (from how many rows on, tile); the others stay:")
    for each in swept:
        if each["proposed"] is not None:
            lines.append(f"{each['table']}  # {each['kernel']}\n    {each['proposed']}")
    return "\n".join(lines)


def numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} contains no numbers, expected 1024,4096") from None
    if any(n < 4 or n % 4 for n in found):
        raise click.BadParameter(f"{value!r}: patches come in fours")
    return tuple(sorted(set(found)))


@click.command(help=__doc__)
@click.option(
    "--only", multiple=True, type=click.Choice(list(KERNELS)), help="Tune this kernel. Repeatable."
)
@click.option("--rows", "patches", default="1024,2304,4096,9216,32768", callback=numbers,
              show_default=True, help="Set the numbers of patches.")  # fmt: skip
@click.option(
    "--least-gain", default=0.02, show_default=True, help="Keep the current row below this gain."
)
@click.option(
    "--jobs", type=int, help="Number of concurrent candidates.  [default: one per core, at most 12]"
)
@click.option(
    "--seconds", default=120.0, show_default=True, help="Set the time limit of one candidate."
)
@click.option("--list", "only_list", is_flag=True, help="Print the candidates without a run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    only: tuple[str, ...], patches: tuple[int, ...], least_gain: float, jobs: int | None,
    seconds: float, only_list: bool, as_json: bool,
) -> None:  # fmt: skip
    has_gpu = torch.cuda.is_available()
    on_hopper = not has_gpu or torch.cuda.get_device_capability(0) == (9, 0)
    selected = chosen(only, on_hopper)
    if only_list:
        rows = [listed(kernel, patches) for kernel in selected]
        if as_json:
            print(json.dumps(rows))
            return
        for kernel in selected:
            print(f"{kernel.name:<22}{len(kernel.candidates):>4} candidates  {kernel.table}")
            for n in patches:
                print(f"{n:>12} patches: {kernel.present(n)}")
        return
    if not has_gpu:
        raise click.ClickException("this needs an NVIDIA GPU: torch finds none; try --list")
    if not on_hopper and any(OTHER not in kernel.places for kernel in selected):
        raise click.ClickException(
            "--only names a kernel for Hopper, but this GPU is of another kind"
        )
    jobs = jobs or min(12, os.cpu_count() or 1)
    swept = [sweep(kernel, patches, jobs, seconds, least_gain) for kernel in selected]
    document = {
        "what": "tune",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "kernels": swept,
    }
    print(json.dumps(document) if as_json else as_table(swept))


if __name__ == "__main__":
    main()
