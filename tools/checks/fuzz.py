"""Fuzz a parser of bytes from outside, by atheris, from the corpus in tests/fuzz/.

\b
    python -m tools.checks.fuzz images --seconds 600 --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.fuzz all --seconds 10

Only the package's own errors may leave a target, each one printable line. An input may take 5 s,
and the process 2 GB. A JPEG that is accepted without a note must not make libjpeg warn. A finding
is written to --findings: minimise it, mend its kind, and add it to the corpus. Exits 1 at one.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from tools.checks.fuzz_targets import MAX_BYTES, TARGETS
from tools.common import ROOT, ledger_options, ledger_row, publish

CORPUS = ROOT / "tests" / "fuzz"
TIMEOUT_S, MEMORY_MB = 5, 2_048
CHILD = "from tools.checks.fuzz_child import main; main()"
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
FINDING = re.compile(r"Test unit written to (\S+)")


@click.command(help=__doc__)
@click.argument("target", type=click.Choice([*TARGETS, "all"]))
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=int, default=0, help="libFuzzer's; 0 takes another each time.")
@click.option(
    "--findings",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("fuzz-findings"),
    show_default=True,
)
@ledger_options
def main(
    target: str, seconds: int, seed: int, findings: Path, ledger: Path | None, commit: str
) -> None:
    """Fuzz one target or all of them."""
    failed = False
    for name in TARGETS if target == "all" else (target,):
        executed, found, said = fuzz(name, seconds, seed, findings)
        figures = {"seconds": seconds, "inputs": executed, "findings": len(found)}
        publish(ledger_row(f"fuzz {name}", commit, "cpu", ("pillow", "atheris"), **figures), ledger)
        if found or not executed:
            failed = True
            click.echo(said[-4_000:], err=True)
    sys.exit(failed)


def fuzz(name: str, seconds: int, seed: int, findings: Path) -> tuple[int, list[str], str]:
    """The inputs that were tried, the files of findings, and the end of what atheris printed."""
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as grown:  # the corpus itself stays as it is
        done = subprocess.run(
            [
                *(sys.executable, "-c", CHILD, name, grown, str(CORPUS / name)),
                *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-seed={seed}"),
                *(f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"),
                f"-artifact_prefix={findings}/{name}-",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = done.stdout.decode(errors="replace")
    executed = EXECUTED.search(said)
    found = FINDING.findall(said)
    if done.returncode and not found:
        found = [f"exit code {done.returncode}"]
    return int(executed[1]) if executed else 0, found, said


if __name__ == "__main__":
    main()
