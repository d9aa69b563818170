"""Checkpoints from the Hub: only what is needed is fetched, and each failure says what to do.

huggingface_hub reads its endpoint when it is imported, so every session is a process of its own,
whose environment points at the stand-in of hub_server.py and at an empty cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, random_tensors, write_checkpoint
from hub_server import COMMIT, serving
from safetensors.torch import save_file

from qwen_vit.errors import HubError
from qwen_vit.hub import find_checkpoint, packaged_weights

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "preprocessor_config.json"

# Each argument is one call, in JSON: {"model": ..., keyword arguments}; "encode" uses it, too.
SESSION = """
import json, sys, time
time.sleep = lambda seconds: None  # the client waits between its attempts
from qwen_vit import QwenVitError, VisionEncoder
from qwen_vit.hub import find_checkpoint
for call in map(json.loads, sys.argv[1:]):
    encode = call.pop("encode", False)
    try:
        if encode:
            import numpy
            encoder = VisionEncoder.from_pretrained(**call, device="cpu")
            source = encoder.source
            [features] = encoder.encode([numpy.zeros((28, 56, 3), numpy.uint8)])
            values = features.embeds.flatten().tolist()
        else:
            source, values = find_checkpoint(**call), None
        print(json.dumps({"commit": source.commit, "name": source.name, "values": values,
                          "files": sorted(path.name for path in source.folder.iterdir())}))
    except QwenVitError as error:
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
"""


def session(home: Path, endpoint: str, *calls: dict[str, Any]) -> list[Any]:
    """What the calls gave, in a process that knows no other hub, cache or token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION, *map(json.dumps, calls)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_mixed_shards(folder: Path) -> None:
    """Three shards: vision and language, language alone, vision alone; and a README."""
    write_checkpoint(folder, SMALL)
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("never fetched")
    vision = {f"visual.{name}": tensor for name, tensor in random_tensors(SMALL).items()}
    names = sorted(vision)
    language = {f"model.layers.{i}.weight": torch.ones(2, 2) for i in range(2)}
    parts = [
        {name: vision[name] for name in names[::2]} | {"model.layers.0.weight": torch.ones(2, 2)},
        {"model.layers.1.weight": language["model.layers.1.weight"]},
        {name: vision[name] for name in names[1::2]},
    ]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FETCHED = [
    "config.json",
    "model-00001-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    SETTINGS,
]


def test_only_vision_shards_are_fetched_and_serve_offline_afterwards(tmp_path: Path) -> None:
    write_mixed_shards(tmp_path / "repo")
    call = {"model": "org/tiny", "encode": True}
    with serving({"org/tiny": tmp_path / "repo"}) as hub:
        local_call = {**call, "model": str(tmp_path / "repo")}
        online, again, local = session(tmp_path / "home", hub.endpoint, call, call, local_call)
        assert sorted(hub.fetched) == FETCHED  # and nothing of it twice
    assert (online["name"], online["commit"], online["files"]) == ("org/tiny", COMMIT, FETCHED)
    assert (local["values"], local["commit"]) == (online["values"], None)
    # the server is gone
    kept, offline, fresh, away = session(
        tmp_path / "home",
        hub.endpoint,
        {**call, "local_files_only": True},
        {**call, "revision": COMMIT},
        {"model": "org/tiny", "cache_dir": str(tmp_path / "empty"), "local_files_only": True},
        {"model": "org/tiny", "cache_dir": str(tmp_path / "empty")},
    )
    for other in (again, kept, offline):
        assert other == online
    assert fresh["kind"] == away["kind"] == "HubError"
    assert "is not in the local cache" in fresh["message"]
    assert "leave out local_files_only" in fresh["message"]
    assert "could not be reached" in away["message"]
    assert "HF_HUB_OFFLINE" in away["message"]


def broken_repos(folder: Path) -> dict[str, Path]:
    """One repository for each failure, by the failure's name."""
    repos = {f"org/{name}": folder / name for name in ("whole", "no-weights", "no-config", "cut")}
    for path in repos.values():
        write_checkpoint(path, SMALL)
    (folder / "no-weights" / "model.safetensors").rename(folder / "no-weights" / "model.bin")
    (folder / "no-config" / "config.json").unlink()
    indexes = {
        "text-only": {"weight_map": {"model.norm.weight": "a.safetensors"}},
        "escaping": {"weight_map": {"visual.patch_embed.proj.weight": "../a.safetensors"}},
        "no-map": {"metadata": {}},
    }
    for name, index in indexes.items():
        write_checkpoint(folder / name, SMALL)
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
        repos[f"org/{name}"] = folder / name
    return repos


# what is asked for, and words of the cause and of the remedy
FAILURES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": "org/gated"}, ("org/gated is gated", "accept its licence", "hf auth login")),
    ({"model": "org/absent"}, ("org/absent was not found", "check the name", "hf auth login")),
    ({"model": "org/private"}, ("org/private was not found, or is private", "hf auth login")),
    ({"model": "org/forbidden"}, ("org/forbidden", "HTTP 403", "hf auth login")),
    ({"model": "org/down"}, ("org/down", "HTTP 503", "try again later")),
    (
        {"model": "org/whole", "revision": "v9"},
        ("org/whole at v9 has no such revision", "branches"),
    ),
    ({"model": "org/no-weights"}, ("no safetensors weights", "no pickle", "choose a repository")),
    ({"model": "org/no-config"}, ("org/no-config has no config.json", "choose a repository")),
    ({"model": "org/text-only"}, ("names no patch_embed.proj.weight", "choose a repository")),
    ({"model": "org/escaping"}, ("'../a.safetensors'", "plain name", "do not use")),
    ({"model": "org/no-map"}, ("has no weight_map", "download it again")),
    ({"model": "org/cut"}, ("org/cut could not be fetched", "try again")),
    ({"model": "org/bad--name"}, ("org/bad--name could not be fetched", "HFValidationError")),
]


def test_each_failure_of_the_hub_has_its_cause_and_its_remedy(tmp_path: Path) -> None:
    with serving(broken_repos(tmp_path)) as hub:
        hub.status = {
            "org/gated": (403, "GatedRepo"),
            "org/private": (401, "RepoNotFound"),
            "org/forbidden": (403, ""),
            "org/down": (503, ""),
        }
        hub.cut_short = {"org/cut/config.json"}
        results = session(tmp_path / "home", hub.endpoint, *(call for call, _ in FAILURES))
    assert not list(tmp_path.glob("home/hub/models--org--cut/snapshots/*/*"))  # no half file
    for (call, words), result in zip(FAILURES, results, strict=True):
        print(result)
        assert result.get("kind") == "HubError", (call, result)
        assert "\n" not in result["message"]
        for word in words:
            assert word in result["message"], (word, result["message"])


def test_offline_without_image_settings_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    """Once, settings that could not be fetched counted as absent: images were resized to other
    limits than the checkpoint's, with no word about it."""
    repos = broken_repos(tmp_path)
    (tmp_path / "cut" / SETTINGS).unlink()  # a repository that has none
    (tmp_path / "no-map" / "model.safetensors.index.json").write_text("<html>")
    whole, bare, page = ({"model": f"org/{name}"} for name in ("whole", "cut", "no-map"))
    offline = {"local_files_only": True}
    with serving(repos) as hub:
        calls = (whole, bare, {**bare, **offline}, page)
        with_settings, online, cached, odd = session(tmp_path / "home", hub.endpoint, *calls)
    assert SETTINGS in with_settings["files"]
    assert cached == online  # the cache remembers that the repository has none
    assert SETTINGS not in online["files"]
    assert odd["kind"] == "CheckpointError"
    assert "model.safetensors.index.json: not JSON" in odd["message"]
    # another program filled the cache, and did not ask for the image settings
    [link] = tmp_path.glob(f"home/hub/models--org--whole/snapshots/*/{SETTINGS}")
    link.unlink()
    [refused] = session(tmp_path / "home", hub.endpoint, {**whole, **offline})
    assert refused["kind"] == "HubError", refused
    assert "not in the local cache" in refused["message"]


@pytest.mark.parametrize(
    "model", ["tinny", "", "a/b/c", "../no/such", "/no/such/folder", "weights.safetensors", "a b/c"]
)
def test_what_is_neither_a_folder_nor_a_repository_is_refused_without_the_network(
    model: str,
) -> None:
    with pytest.raises(HubError, match="neither a folder nor a Hub repository") as caught:
        find_checkpoint(model)
    assert repr(model) in str(caught.value)


def test_tiny_and_a_local_folder_need_no_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("tiny").folder == packaged_weights() / "tiny"
    found = find_checkpoint(tmp_path)
    assert (found.folder, found.name, found.commit) == (tmp_path, str(tmp_path), None)
