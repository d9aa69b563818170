"""Fuzz a parser of untrusted bytes with atheris, starting with the corpus in tests/fuzz/.

\b
    python -m tools.checks.fuzz images --seconds 600 --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.fuzz all --seconds 10 --jobs 16

A target may raise only the package's own errors, each one printable line. An input may take 5 s of
CPU time, and the process 2 GB. An input 10 times as long may take 30 times the time. A JPEG that a
target accepts without a note must not make libjpeg warn. The command writes a finding to --findings
and exits with 1. Minimise the finding, fix its cause, and add it to the corpus.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import click

from tests.support import checkout_first
from tools.checks.fuzz_targets import MAX_BYTES, TARGETS
from tools.common import ROOT, ledger_options, ledger_row, publish

CORPUS = ROOT / "tests" / "fuzz"
TIMEOUT_S, MEMORY_MB = 3_600, 2_048  # of wall time; a busy machine gives little CPU time
CHILD = "from tools.checks.fuzz_child import main; main()"
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
FINDING = re.compile(r"Test unit written to (\S+)")


@click.command(help=__doc__)
@click.argument("target", type=click.Choice([*TARGETS, "all"]))
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option(
    "--seed", type=int, default=0, help="Set libFuzzer's seed; 0 chooses a new seed each time."
)
@click.option(
    "--findings",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("fuzz-findings"),
    show_default=True,
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True)
@ledger_options
def main(
    target: str, seconds: int, seed: int, findings: Path, jobs: int, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    """Fuzz one target or all of them."""
    names = [*TARGETS] if target == "all" else [target]
    targets = [names[i % len(names)] for i in range(max(jobs, len(names)))]  # at least one per job
    failed = False
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(fuzz, name, seconds, seed, findings): name for name in targets}
        for done in as_completed(runs):  # print each row at once, in case of an interrupt
            run = done.result()
            row = ledger_row(
                f"fuzz {runs[done]}", commit, "cpu", ("pillow", "atheris"), cpu_s=round(run.cpu_s),
                inputs=run.inputs, findings=len(run.findings),
            )  # fmt: skip
            publish(row, ledger)
            if run.findings or not run.inputs:
                failed = True
                click.echo(run.output[-4_000:], err=True)
    sys.exit(failed)


class Run(NamedTuple):
    """Hold the number of inputs, CPU seconds, files of findings, and atheris's output."""

    inputs: int
    cpu_s: float
    findings: list[str]
    output: str


def fuzz(name: str, seconds: int, seed: int, findings: Path) -> Run:
    """Run one process of atheris until the time limit or a finding."""
    findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as grown:  # libFuzzer writes new inputs here
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", CHILD, name, grown, str(CORPUS / name)),
                *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-seed={seed}"),
                *(f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}", "-print_final_stats=1"),
                f"-report_slow_units={TIMEOUT_S}",
                f"-artifact_prefix={findings}/{name}-",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": checkout_first(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = printed(process)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    executed = EXECUTED.search(output)
    found = FINDING.findall(output)
    if process.returncode and not found:
        found = [f"exit code {process.returncode}"]
    inputs = int(executed[1]) if executed else 0
    return Run(inputs, usage.ru_utime + usage.ru_stime, found, output)


def printed(process: subprocess.Popen[bytes]) -> str:
    """Return a process's whole output."""
    assert process.stdout is not None
    with process.stdout as stream:
        return stream.read().decode(errors="replace")


if __name__ == "__main__":
    main()
