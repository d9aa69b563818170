"""Check thousands of random cases against Hugging Face and float64.

It prints one table and one JSON line, and exits with 1 if a check fails. On a CPU it checks float32
values. On a GPU it checks bf16 and float32 values, and bits. `--fraction 0.02` runs a sample.

\b
    python -m tools.checks.trust --device cpu --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.trust --device cuda --ledger tools/benchmarks/ledger.jsonl
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from qwen_vit.compare.huggingface import package_versions
from qwen_vit.metadata import DECODERS
from tools.checks.trust_bits import batches, kernel, repeats
from tools.checks.trust_values import (
    PUBLISHED,
    CheckCounts,
    adversarial,
    configs,
    layouts,
    photographs,
    published_shapes,
    weight_faults,
)
from tools.common import four_digits, ledger_options, ledger_row, publish

CPU = torch.device("cpu")
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Check:
    """Define a row of the table: the number of cases, the device, and the check's function."""

    name: str
    device: str
    count: int
    run: Callable[[int, int, torch.device], CheckCounts]


def checks() -> Iterable[Check]:
    fp32 = torch.float32
    yield Check("random layouts, small tower, fp32", "cpu", 10_000, layouts)
    yield Check("unpublished configs, fp32", "cpu", 400, partial(configs, dtype=fp32))
    yield Check("adversarial inputs, fp32", "cpu", 40, partial(adversarial, dtype=fp32))
    yield Check("photographs, fp32", "cpu", 3, partial(photographs, dtype=fp32))
    yield Check("weight faults found", "cpu", 132, weight_faults)
    # On a GPU, the compilation of each config takes most of the time.
    for dtype, n_batches, n_configs in ((torch.bfloat16, 10_000, 6), (fp32, 300, 2)):
        name = DTYPE_NAMES[dtype]
        for what, count, run in (
            ("batch equals alone, bitwise", n_batches, batches),
            ("repeats, bitwise", n_batches, repeats),
            ("published shapes, depth 32", len(PUBLISHED), published_shapes),
            ("adversarial inputs", 40, adversarial),
            ("photographs", 3, photographs),
            ("unpublished configs", n_configs, configs),
        ):
            yield Check(f"{what}, {name}", "cuda", count, partial(run, dtype=dtype))
    for what, run in (("batch equals alone", batches), ("repeats", repeats)):
        yield Check(
            f"{what}, bitwise, fp8", "cuda", 2_000,
            partial(run, dtype=torch.bfloat16, quantization="fp8"),
        )  # fmt: skip
    for kind in ("window", "full", "alone"):
        yield Check(
            f"kernel against oracle, {kind}, bf16", "cuda", 1_000,
            partial(kernel, kind=kind),
        )  # fmt: skip


def row_of(check: Check, counts: CheckCounts, seconds: float) -> dict[str, Any]:
    return {
        "runs": counts.runs,
        "worst": four_digits(counts.worst) if math.isfinite(counts.worst) else None,
        "unit": counts.unit,
        "allowed": counts.allowed,
        "failures": len(counts.failures),
        "examples": counts.failures[:3],
        "seconds": round(seconds, 1),
    }


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option(
    "--fraction", default=1.0, show_default=True, help="Run this fraction of each check's cases."
)
@click.option("--only", multiple=True, help="Run checks whose name contains this text. Repeatable.")
@click.option("--seed", default=0, show_default=True)
@ledger_options
def main(
    device: str | None, fraction: float, only: tuple[str, ...], seed: int, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    """Run the checks of one device, print a table, and exit with 1 if a check fails."""
    has_gpu = torch.cuda.is_available()
    chosen = device or ("cuda" if has_gpu else "cpu")
    if chosen == "cuda" and not has_gpu:
        raise click.ClickException("--device cuda needs an NVIDIA GPU: torch finds none")
    place = torch.device("cuda", 0) if chosen == "cuda" else CPU
    names = [check.name for check in checks() if check.device == chosen]
    for word in only:
        if not any(word in name for name in names):
            raise click.UsageError(
                f"no check on {chosen} has {word!r} in its name; there are: {'; '.join(names)}"
            )
    rows: dict[str, dict[str, Any]] = {}
    print(
        f"{'check':<44}{'cases':>7}{'failed':>8}{'worst':>10}  {'what':<26}{'allowed':<32}{'s':>6}"
    )
    for check in checks():
        if check.device != chosen or (only and not any(word in check.name for word in only)):
            continue
        start = time.perf_counter()
        count = max(1, math.ceil(check.count * fraction))
        try:
            counts = check.run(count, seed, place)
        except Exception as error:  # noqa: BLE001 a check that dies is a failure; the others go on
            counts = CheckCounts("-", "-", failures=[f"died: {type(error).__name__}: {error}"])
        row = rows[check.name] = row_of(check, counts, time.perf_counter() - start)
        print(
            f"{check.name:<44}{row['runs']:>7,}{row['failures']:>8}{counts.worst:>10.2e}  "
            f"{row['unit']:<26}{row['allowed']:<32}{row['seconds']:>6.0f}",
            flush=True,
        )
        for example in row["examples"]:
            print(f"    {example}", flush=True)
    good = all(row["runs"] and not row["failures"] for row in rows.values())
    line = ledger_row(
        "trust",
        commit,
        place,
        (*(name for name in package_versions() if name not in DECODERS), "triton"),
        fraction=fraction,
        seed=seed,
        good=good,
        rows=rows,
    )
    publish(line, ledger)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
