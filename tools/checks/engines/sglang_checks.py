"""Define SGLang's environment and scenarios on a CPU.

SGLang's wheel runs on a CPU with `stand_ins/sgl_kernel.py`. Each scenario starts its own engine, in
a process of `sglang_child` or as a server.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.checks.engines.answers import TOLERANCE, Result, compare, plain
from tools.checks.engines.cases import CASES, NEW_TOKENS, PICTURES, Case
from tools.checks.engines.changed import Changed, write_unfit
from tools.checks.engines.context import Context, Scenario
from tools.checks.engines.environment import Recipe
from tools.checks.engines.server import (
    CHAT,
    MODEL,
    Server,
    content_of,
    picture_part,
    running_module,
)
from tools.checks.engines.sglang_child import SAMPLING, SETTINGS, has_no_video, parse_answer
from tools.checks.engines.small_model import N_TOKENS
from tools.common import ROOT

CHILD = "tools.checks.engines.sglang_child"
STAND_INS = ROOT / "tools" / "checks" / "engines" / "stand_ins"
OURS = "our tower: "
BY_PACKAGE = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "qwen_vit.integrations.sglang"}
ONE_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
IT_RUNS = "qwen_vit runs the vision tower"

RECIPE = Recipe(
    name="sglang",
    lock=Path(__file__).with_name("sglang.txt"),
    torch="2.13.0",
    variables={
        "PYTHONPATH": f"{ROOT}:{STAND_INS}",
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    },
)
PACKAGES = ("sglang", "torch", "transformers", "triton", "numpy")  # versions in the ledger row

CLIENTS, ROUNDS = 8, 12  # parallel clients; repetitions of all cases by each client


def which_tower(context: Context, name: str, *, ours: bool, ranks: int = 1) -> Result:
    """Return the tower that ran, by the log line of our tower in each process."""
    n = context.log(name).read_text(errors="replace").count(IT_RUNS)
    wanted = ranks if ours else 0
    return plain(name, "which tower", n == wanted, f"ours in {n} of {ranks} processes")


def in_engine(
    context: Context, *, scenario: str, ours: bool = False, cached: bool = False, ranks: int = 1
) -> list[Result]:
    """Run a scenario of `sglang_child`, and check its tower and, if needed, its cache."""
    more = {**(BY_PACKAGE if ours else {}), **(ONE_CORE_EACH if ranks > 1 else {})}
    context.run_child(CHILD, scenario, scenario, **more)
    label = OURS if ours else ""
    results = context.compare(
        scenario, lambda way: way if way.startswith("control") else f"{label}{way}"
    )
    results.append(which_tower(context, scenario, ours=ours, ranks=ranks))
    if cached:
        hits = context.facts(scenario)["cached_tokens"]
        results.append(
            plain(scenario, "cache hits", hits > 0, f"{hits} tokens from the radix cache")
        )
    return results


def updates(context: Context) -> list[Result]:
    """Check that answers follow weight updates. Changed weights must give other answers than the
    model."""
    changed = Changed.write(context)
    context.run_child(CHILD, "updates", "updates", **BY_PACKAGE)
    facts = context.facts("updates")
    refused = [text for is_good, text in facts["replies"] if not is_good]
    return [
        *changed.compare("updates", lambda way: f"{OURS}{way}"),
        plain("updates", "dummy weights", facts["finite"], "finite answers"),
        plain("updates", "SGLang's word", not refused, "; ".join(refused) or "success"),
        which_tower(context, "updates", ours=True),
    ]


def video_features(context: Context) -> list[Result]:
    """Check that our code rejects features of videos, and that SGLang's scheduler crashes on such
    features."""
    died = _error_of(context, "video-features")
    path = context.work / "facts" / "refusal.json"
    refusal = json.loads(path.read_text()) if path.exists() else ""
    return [
        plain("features", "a video: ours", bool(refusal), refusal or "not refused"),
        plain("SGLang unprotected", "a video", "Scheduler hit an exception" in died,
              "its scheduler dies" if died else "it lives"),
    ]  # fmt: skip


def refusals(context: Context) -> list[Result]:
    """Check that the engine's start fails, with the reason, if our tower cannot run."""
    write_unfit(context.work)
    results = []
    for scenario, expected in (
        ("float16", "float16"),
        ("quantised", "of a quantised or other type"),
        ("incomplete", "vision tower were not loaded"),
    ):
        log = _error_of(context, scenario, **BY_PACKAGE)
        lines = [line for line in log.splitlines() if line.startswith("qwen_vit.errors.")]
        is_refused = bool(lines) and expected in lines[0]
        text = lines[0].split(": ", 1)[1] if lines else f"no error of ours, but:\n{log[-500:]}"
        results.append(plain("our tower: refusals", scenario, is_refused, text))
    return results


def _error_of(context: Context, scenario: str, **variables: str) -> str:
    """Return the log of a child that must fail, or "" if it did not fail."""
    try:
        context.run_child(CHILD, scenario, scenario, **variables)
    except RuntimeError:
        return context.log(scenario).read_text(errors="replace")
    return ""


def server(context: Context) -> list[Result]:
    """Check SGLang's server with our tower, through its own interface, OpenAI's interface, and many
    clients at once."""
    name = "server"
    options = {name: value for name, value in SETTINGS.items() if name != "log_level"}
    command = ["sglang.launch_server", "--model-path", str(context.work / "model")]
    for option, value in {**options, "served_model_name": MODEL}.items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    cases = [each for each in CASES if has_no_video(each)]
    with running_module(context, name, command, **BY_PACKAGE) as running:
        results = [
            compare(f"{OURS}server", each.name, _generate(running, each),
                    context.reference[each.name])
            for each in cases
        ]  # fmt: skip
        results += [_chat(context, running, each) for each in cases]
        results.append(_many_clients(context, running, cases))
    results.append(which_tower(context, name, ours=True))
    return results


def _generate(running: Server, each: Case) -> Any:
    """Answer a case of images over SGLang's own interface."""
    images = [picture_part(name)["image_url"]["url"] for name in each.pictures]
    body = {
        "text": each.text,
        "sampling_params": SAMPLING,
        "return_logprob": True,
        "top_logprobs_num": N_TOKENS,
        **({"image_data": images} if images else {}),
    }
    status, found = running.post(body, path="/generate")
    if status != 200:
        raise RuntimeError(f"status {status}: {str(found)[:500]}")
    return parse_answer(found)


def _chat(context: Context, running: Server, each: Case) -> Result:
    """Check chosen tokens' log-probabilities over OpenAI's interface, which names tokens by
    text."""
    parts = {name: picture_part(name) for name in PICTURES}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content_of(each, parts)}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "logprobs": True,
    }
    status, found = running.post(body, path=CHAT)
    if status != 200:
        raise RuntimeError(f"status {status}: {str(found)[:500]}")
    right = context.reference[each.name]
    wanted = right.logprobs[torch.arange(NEW_TOKENS), right.tokens]
    steps = found["choices"][0]["logprobs"]["content"]
    distance = float((torch.tensor([step["logprob"] for step in steps]) - wanted).abs().max())
    fact = f"log-probabilities of {len(steps)} tokens within {distance:.1e}"
    return plain(f"{OURS}OpenAI server", each.name, distance <= TOLERANCE, fact)


def _many_clients(context: Context, running: Server, cases: list[Case]) -> Result:
    """Send all cases from several clients at once, in different orders, and check all answers."""

    def client(k: int) -> list[bool]:
        turned = [cases[(i + k) % len(cases)] for i in range(len(cases))]
        return [
            compare("", each.name, _generate(running, each), context.reference[each.name]).passed
            for _ in range(ROUNDS)
            for each in turned
        ]

    with ThreadPoolExecutor(CLIENTS) as clients:
        right = [one for answers in clients.map(client, range(CLIENTS)) for one in answers]
    fact = f"{sum(right)} of {len(right)} answers right, {CLIENTS} clients at once"
    return plain(f"{OURS}server", "many clients", all(right), fact)


SCENARIOS: dict[str, Scenario] = {
    "own": partial(in_engine, scenario="own", cached=True),
    "own-without-cache": partial(in_engine, scenario="own-without-cache"),
    "video-features": video_features,
    "tower": partial(in_engine, scenario="tower", ours=True, cached=True),
    "tower-without-cache": partial(in_engine, scenario="tower-without-cache", ours=True),
    "updates": updates,
    "parallel": partial(in_engine, scenario="parallel", ours=True, ranks=2),
    "server": server,
    "refusals": refusals,
}
