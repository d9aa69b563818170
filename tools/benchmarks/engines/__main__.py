"""Time vision towers inside vLLM on a GPU: vLLM's tower in three settings, and our tower.

\b
    python -m tools.benchmarks.engines towers --folder /dev/shm/engines
    python -m tools.benchmarks.engines requests --folder /dev/shm/engines --ledger L
    python -m tools.benchmarks.engines chart docs/engines.png

`towers` starts one engine for each setting. The settings are vLLM's default, encoder graphs with
exactly fitting budgets, compilation with graphs, and our tower with the plugin, in bf16 and in fp8.
It first compares the answers of 128 requests with transformers in float64, except in fp8. Then it
times the towers. `requests` sends requests to vLLM's API server, whose processor runs beside the
engine. The weights are random. Both need vLLM in this environment. `chart` draws the ledger's rows.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from tools.benchmarks.engines.chart import draw_towers, newest_towers
from tools.benchmarks.engines.judge import judge_answers
from tools.benchmarks.engines.model import small_folder, write_large, write_small
from tools.benchmarks.engines.requests import as_table, measure
from tools.common import ROOT, append_row, four_digits, ledger_options, ledger_row, require_gpu

VARIANTS = ("default", "graphs", "compiled", "plugin", "plugin-fp8")
WAYS = ("default", "plugin", "features")
PACKAGES = ("vllm", "torch", "triton", "transformers")
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
folder_option = click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder for models, results and logs (4 GB).",
)  # fmt: skip


def rounded(value: Any) -> Any:
    """Round all numbers as the ledger does, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return four_digits(value) if isinstance(value, float) else value


@click.group(help=__doc__)
def main() -> None:
    """Measure inside vLLM."""


@main.command()
@folder_option
@click.option("--variant", multiple=True, type=click.Choice(VARIANTS), default=VARIANTS)
@click.option(
    "--runner",
    type=click.Choice(["1", "2"]),
    default="1",
    show_default=True,
    help="Set vLLM's model runner. The first has encoder graphs; vLLM 0.25 uses the second.",
)
@click.option("--answers-only", is_flag=True, help="Check answers without timing a tower.")
@click.option(
    "--weights", default=1, show_default=True, help="Number of random models that answer."
)
@ledger_options
def towers(
    folder: Path, variant: tuple[str, ...], runner: str, weights: int, ledger: Path | None,
    commit: str, *, answers_only: bool,
) -> None:  # fmt: skip
    """Check the answers of the engines, then time their towers."""
    device = require_gpu()
    for seed in range(weights):
        write_missing_small(folder, device, seed)
    options = ["--weights", str(weights), *(["--answers-only"] if answers_only else [])]
    found = {name: run_child(name, folder, runner, *options) for name in variant}
    answers = {name: each.pop("answers") for name, each in found.items() if "answers" in each}
    report = judge_answers(folder, answers, device) if answers else {}
    if not answers_only:
        print_towers(found)
    click.echo(json.dumps(rounded(report), indent=1))
    row = ledger_row(
        "engines towers", commit, device, PACKAGES, runner=runner, answers=report, engines=found
    )
    append_row(rounded(row), ledger)
    print(json.dumps(rounded(row)))


def write_missing_small(folder: Path, device: torch.device, seed: int = 0) -> None:
    """Write the small model with these weights, unless it exists."""
    if not (small_folder(folder, seed) / "model.safetensors").exists():
        write_small(small_folder(folder, seed), device, seed)
        torch.cuda.empty_cache()


def run_child(variant: str, folder: Path, runner: str, *options: str) -> dict[str, Any]:
    """Run one engine in a child process, and return the measurements."""
    started = time.perf_counter()
    plugin = "qwen_vit" if variant.startswith("plugin") else ""
    environment = {
        **os.environ, **ENVIRONMENT, "VLLM_PLUGINS": plugin,
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner) - 1), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tools.benchmarks.engines.child", variant, str(folder)]
    command += options
    log = folder / f"{variant}.log"
    with open(log, "w") as file:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    click.echo(f"{variant}: {time.perf_counter() - started:.0f} s, exit code {done.returncode}")
    if done.returncode:
        lines = log.read_text().splitlines()
        click.echo("\n".join(lines[-25:]))
        return {"failed": "\n".join(lines[-25:]), "towers": {}}
    figures: dict[str, Any] = json.loads((folder / f"{variant}.json").read_text())
    return figures


def print_towers(found: dict[str, dict[str, Any]]) -> None:
    """Print milliseconds per workload, and the ratio of vLLM's time to our time in the same
    process."""
    names = next((list(each["towers"]) for each in found.values() if each["towers"]), [])
    click.echo(f"{'':12}" + "".join(f"{variant:>22}" for variant in found))
    for name in names:
        if name == "graph_use":
            continue
        line = f"{name:12}"
        for figures in found.values():
            cell = figures["towers"].get(name, {})
            ratio = f" ({cell['ratio']:.2f}x)" if "ratio" in cell else ""
            line += f"{cell.get('ms', float('nan')):13.2f}{ratio:>9}"
        click.echo(line)


@main.command()
@folder_option
@click.option("--way", multiple=True, type=click.Choice(WAYS), default=WAYS)
@ledger_options
def requests(folder: Path, way: tuple[str, ...], ledger: Path | None, commit: str) -> None:
    """Time vLLM's API server by default, with our tower, and with our features."""
    device = require_gpu()
    write_missing_small(folder, device)
    write_large(folder / "large")
    os.environ.update(ENVIRONMENT)
    found = {name: measure(folder, name) for name in way}
    click.echo(as_table(found))
    row = ledger_row("engines requests", commit, device, PACKAGES, ways=found)
    append_row(rounded(row), ledger)
    print(json.dumps(rounded(row)))


@main.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def chart(out: Path) -> None:
    """Draw a PNG that compares vLLM's towers with our tower, from the ledger."""
    lines = (ROOT / "tools" / "benchmarks" / "ledger.jsonl").read_text().splitlines()
    draw_towers(newest_towers(json.loads(line) for line in lines), out)
    click.echo(out)


if __name__ == "__main__":
    main()
