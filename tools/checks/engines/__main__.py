"""Check real engines with our features and our tower, on a CPU, with a small random model.

\b
    python -m tools.checks.engines vllm
    python -m tools.checks.engines vllm --only offline --keep /tmp/work
    python -m tools.checks.engines vllm --soak 1000
    python -m tools.checks.engines all --ledger tools/benchmarks/ledger.jsonl

It builds the engine's pinned environment (minutes, 3 GB) or reuses it. It compares every answer
with transformers in float64. Greedy tokens must be equal, and log-probabilities of the whole
vocabulary must be within 1e-4. Controls must change the answer. The last line is JSON. It exits
with 1 if an answer is wrong, and with 3 if it cannot build an environment.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import click

from tools.checks.engines import sglang_checks, vllm_checks
from tools.checks.engines.answers import TOLERANCE, Result, as_json, plain, table
from tools.checks.engines.context import Context, Scenario
from tools.checks.engines.cpu_time import adopt_orphans, cpu_s
from tools.checks.engines.environment import Environment, prepare
from tools.checks.engines.reference import reference_answers
from tools.checks.engines.small_model import write_model
from tools.common import append_row, four_digits, ledger_options, ledger_row

ENGINES = {"sglang": sglang_checks, "vllm": vllm_checks}


def engine_versions(environment: Environment, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions in an engine's environment."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [str(environment.python), "-c", code, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _run(name: str, scenario: Scenario, context: Context) -> list[Result]:
    """Run a scenario. A scenario that stops early gives a failed line."""
    started = time.perf_counter()
    try:
        results = scenario(context)
    except RuntimeError as error:
        results = [plain(name, "", passed=False, fact=str(error))]
    verdict = "passed" if all(row.passed for row in results) else "FAILED"
    click.echo(f"{name}: {verdict} in {time.perf_counter() - started:.0f} s", err=True)
    return results


@click.command(help=__doc__)
@click.argument("engine", type=click.Choice([*ENGINES, "all"]))
@click.option("--only", multiple=True, metavar="SCENARIO", help="Run only these scenarios.")
@click.option(
    "--soak", "n_soak", type=click.IntRange(min=20), metavar="N",
    help="Send N requests at once to vLLM's server instead, with our tower as plugin.",
)  # fmt: skip
@click.option(
    "--env", "env", type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the engine's environment.  [default: a folder in ~/.cache/qwen_vit/engines]",
)  # fmt: skip
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path),
    help="Keep the model, the answers and the engines' logs in this folder.",
)  # fmt: skip
@click.option("--json", "as_one_json", is_flag=True, help="Print only the JSON line.")
@ledger_options
def main(
    engine: str, only: tuple[str, ...], n_soak: int | None, env: Path | None, keep: Path | None,
    as_one_json: bool, ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    """Prepare, answer, compare, and print."""
    adopt_orphans()
    # SIGTERM must raise SystemExit, so that `finally` blocks stop the engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if env is not None and engine == "all":
        raise click.UsageError("--env is the environment of one engine: name the engine")
    if n_soak is not None and (engine != "vllm" or only):
        raise click.UsageError("--soak is for vllm alone, and without --only")
    chosen = list(ENGINES) if engine == "all" else [engine]
    failed = False
    for name in chosen:
        checks, started, cpu_before = ENGINES[name], time.perf_counter(), cpu_s()
        if unknown := set(only) - set(checks.SCENARIOS):
            names = ", ".join(checks.SCENARIOS)
            raise click.UsageError(f"--only {min(unknown)}: the scenarios of {name} are {names}")
        scenarios: dict[str, Scenario] = {
            each: run for each, run in checks.SCENARIOS.items() if not only or each in only
        }
        if n_soak is not None:
            scenarios = {"soak": partial(checks.run_soak, n_requests=n_soak)}
        folder = nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory()
        with folder as path:
            work = Path(path).absolute()
            environment = prepare(checks.RECIPE, env)
            for part in ("answers", "facts", "logs"):
                (work / part).mkdir(parents=True, exist_ok=True)
            write_model(work / "model")
            context = Context(environment, work, reference_answers(work / "model"))
            results: list[Result] = []
            for scenario, run in scenarios.items():
                results += _run(scenario, run, context)
        passed = all(row.passed for row in results)
        failed = failed or not passed
        if not as_one_json:
            click.echo(table(results))
        compared = [row.distance for row in results if row.tokens and not row.must_differ]
        row = ledger_row(
            f"engines {name}", commit, "cpu", ("transformers",), passed=passed,
            engine=engine_versions(environment, checks.PACKAGES), tolerance=TOLERANCE,
            scenarios=list(scenarios), lines=len(results),
            largest_distance=four_digits(max(compared, default=0.0)),
            build_s=round(environment.built_in_s), total_s=round(time.perf_counter() - started),
            cpu_s=round(cpu_s() - cpu_before),
        )  # fmt: skip
        append_row(row, ledger)
        click.echo(json.dumps({**row, "results": as_json(results)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
