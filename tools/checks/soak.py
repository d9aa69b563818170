"""Run the tests' trials with full counts: kills, full disks, outages, memory and hostile input.

\b
    python -m tools.checks.soak kills --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.soak all --fraction 0.02
    python -m tools.checks.soak remote-kills --count images=2000 --count kills=5

It prints one JSON line for each trial, and exits with 1 if a trial fails. `full-disk` mounts small
file systems, which needs root.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from qwen_vit.errors import QwenVitError
from tools.common import ledger_options, ledger_row, publish


@dataclass(frozen=True)
class Trial:
    """Define a trial and its full counts.

    `run` is "MODULE.FUNCTION" in tests.support. The tool imports the function late, because only
    some trials need certain packages. `setting` names the function that prepares the trial.
    """

    run: str
    counts: dict[str, int]
    fixed: dict[str, Any]
    has_seed: bool = True
    setting: str = ""
    forks: bool = False

    @property
    def may_fork(self) -> bool:
        """Return whether its exports may be forks of this process."""
        return self.forks or self.setting == EXPORT

    def load(self) -> Callable[..., dict[str, Any]]:
        """Return the function that takes a folder and the counts."""
        trial = in_support(self.run)
        return in_support(self.setting)(trial) if self.setting else trial


def in_support(name: str) -> Callable[..., Any]:
    """Return the "MODULE.FUNCTION" of tests.support."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"tests.support.{module}"), function)  # type: ignore[no-any-return]


EXPORT, HUB = "export_stress.on_an_export", "hub_fault_injection.on_a_hub"
TRIALS = {
    "kills": Trial("export_stress.kills", {"kills": 200}, {"images": 4_000}, setting=EXPORT),
    "full-disk": Trial("disk_stress.full_disks", {"disks": 20}, {"images": 2_000}, setting=EXPORT),
    "outages": Trial("shortage_stress.outages", {"outages": 50}, {"images": 2_000}, setting=EXPORT),
    "memory-edges": Trial("shortage_stress.memory_edges", {"runs": 30}, {"images": 40}, forks=True),
    "interrupts": Trial(
        "export_stress.interrupts", {"times": 40}, {"images": 2_000}, setting=EXPORT
    ),
    "memory": Trial("export_stress.flat_memory", {"images": 100_000, "first": 5_000}, {}, False),
    "ray": Trial("cluster_stress.cluster_kills", {"kills": 20, "images": 2_000}, {}),
    "hub-kills": Trial("hub_fault_injection.kill_at_random", {"times": 200}, {}, setting=HUB),
    "hub-crowd": Trial("hub_fault_injection.crowd", {"times": 40}, {"processes": 16}, setting=HUB),
    "hub-storm": Trial("hub_fault_injection.storm", {"times": 200}, {}, setting=HUB),
    "hub-headers": Trial("hub_fault_injection.wrong_headers", {"times": 500}, {}, setting=HUB),
    "hub-versions": Trial("hub_fault_injection.hub_versions", {}, {}, False),
    "mutated-weights": Trial("mutated_files.mutated_weights", {"times": 100_000}, {}),
    "mutated-documents": Trial("mutated_files.mutated_documents", {"times": 10_000}, {}),
    "reading": Trial("reading_stress.many_shards", {"shards": 10_000}, {}),
    "parquet": Trial(
        "store_stress.flat_memory_of_parquet", {"images": 200_000, "first": 5_000}, {}, False
    ),
    "listing": Trial(
        "store_stress.large_listing", {"objects": 10_000_000, "real": 5_000}, {}, has_seed=False
    ),
    "remote": Trial("store_stress.random_reads", {"images": 10_000, "chosen": 100}, {}),
    "remote-kills": Trial(
        "remote_stress.kills_of_nodes",
        {"images": 200_000, "kills": 50, "first": 20_000},
        {"nodes": 3},
    ),
    "video": Trial(
        "video_stress.flat_memory_of_videos", {"clips": 1_000}, {"first": 200}, has_seed=False
    ),
    "hostile": Trial("export_stress.hostile", {"bad": 1_000, "good": 10_000}, {}),
}


@click.command(help=__doc__)
@click.argument("name", type=click.Choice([*TRIALS, "all"]))
@click.option("--fraction", type=float, default=1.0, help="Run this fraction of the full counts.")
@click.option(
    "--count",
    "counts",
    multiple=True,
    metavar="NAME=N",
    callback=lambda _, __, texts: _counts(texts),
    help="Replace one full count, for example kills=5 or images=800.",
)
@click.option(
    "--seed", type=int, help="Set the seed of the random moments.  [default: a new seed each time]"
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run this number of copies of each trial at once, each with all counts and its own seed.",
)
@click.option(
    "--fork",
    is_flag=True,
    help="Fork a process that has imported torch for each export, which saves its seconds.",
)
@ledger_options
def main(
    name: str, fraction: float, counts: dict[str, int], seed: int | None, jobs: int, fork: bool,
    ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    """Run a trial, or all of them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = False
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for each in TRIALS if name == "all" else (name,):
            first = random.randrange(2**31 - jobs) if seed is None else seed
            seeds = range(first, first + jobs)
            results = pool.map(partial(run, each, fraction, chosen=counts, fork=fork), seeds)
            for number, figures in zip(seeds, results, strict=True):
                failed |= "failed" in figures
                row = ledger_row(f"soak {each}", commit, "cpu", (), seed=number, **figures)
                publish(row, ledger)
    sys.exit(1 if failed else 0)


def _counts(texts: Sequence[str]) -> dict[str, int]:
    counts = {}
    for text in texts:
        key, _, count = text.partition("=")
        if not count.isdecimal():
            raise click.BadParameter(f"{text!r}, expected NAME=N")
        counts[key] = int(count)
    return counts


def run(
    name: str, fraction: float, seed: int, chosen: Mapping[str, int], fork: bool = False
) -> dict[str, Any]:
    """Run one trial and return the results. `chosen` counts replace the full counts."""
    trial = TRIALS[name]
    counts = {key: max(1, round(fraction * count)) for key, count in trial.counts.items()}
    if unknown := set(chosen) - set(counts) - set(trial.fixed):
        raise click.UsageError(f"{name} has no count {', '.join(sorted(unknown))}")
    arguments = {**counts, **trial.fixed, **chosen, **({"seed": seed} if trial.has_seed else {})}
    if fork:
        if not trial.may_fork:
            raise click.UsageError(f"{name} cannot fork")
        arguments["forked"] = True
    with tempfile.TemporaryDirectory() as folder:
        try:
            return trial.load()(Path(folder), **arguments)
        except (AssertionError, QwenVitError) as error:
            return {"failed": f"{type(error).__name__}: {error}"[:2_000]}


if __name__ == "__main__":
    main()
