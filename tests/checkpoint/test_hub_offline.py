"""Test the cache and the environment variables without a network."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_cases import INDEX, SETTINGS, serve
from tests.support.hub_server import COMMIT, Hub
from tests.support.hub_worker import Worker, running_worker


def test_offline_without_image_settings_is_refused_rather_than_guessed(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """Settings that the client could not fetch once counted as absent. Images then had other size
    limits than the checkpoint's limits, without a warning."""
    write_checkpoint(repo, SMALL)
    cached = {"repo_id": "org/tiny", "cache_dir": call["cache_dir"]}
    for name in ("config.json", "model.safetensors"):  # as if another program had downloaded them
        worker("whole", **cached, filename=name)
    refused = worker("load", **call, local_files_only=True)
    assert refused["kind"] == "HubError", refused
    assert "org/tiny: not in the local cache" in refused["message"]
    assert "Leave out local_files_only" in refused["message"]
    (repo / SETTINGS).unlink()
    online = worker("load", **call)
    kept = worker("load", **call, local_files_only=True)
    assert "weights" in online
    assert kept == online  # the cache records that the repository has no image settings


@pytest.mark.slow
def test_environment_variables_work_as_in_huggingface_hub(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    write_checkpoint(repo, SMALL)
    home, cache = tmp_path / "home", tmp_path / "elsewhere"
    plain = {"model": "org/tiny"}
    with running_worker(home, hub.endpoint) as worker:
        online = worker("load", **plain)
        assert online["folder"].startswith(str(home / "hub"))
        absent = worker("load", model="org/other", local_files_only=True)
    with running_worker(home, hub.endpoint, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache)) as worker:
        hub.requests.clear()
        unknown = worker("load", **plain)
        offline = worker("load", **plain, cache_dir=home / "hub")
        pinned = worker("load", **plain, cache_dir=home / "hub", revision=COMMIT)
        assert hub.requests == []
    assert absent["kind"] == unknown["kind"] == "HubError"
    assert "HF_HUB_OFFLINE=1 rules out the network" in unknown["message"]
    for later in (offline, pinned):
        assert later["weights"] == online["weights"]
    with running_worker(
        home, "http://127.0.0.1:9", HF_HUB_CACHE=str(cache)
    ) as worker:  # a closed port
        away = worker("load", **plain)
        kept = worker("load", **plain, cache_dir=home / "hub")
    assert "not in the local cache, and the Hub could not be reached" in away["message"]
    assert kept["weights"] == online["weights"]


@pytest.mark.slow
def test_a_host_that_does_not_resolve_is_not_retried(hub: Hub, repo: Path, tmp_path: Path) -> None:
    write_checkpoint(repo, SMALL)
    home, nowhere = tmp_path / "home", "http://hub.invalid"  # never resolves
    with running_worker(home, hub.endpoint) as worker:
        online = worker("load", model="org/tiny")
        write_checkpoint(tmp_path / "sharded", SMALL, shards=2)
        serve(hub, "org/begun", tmp_path / "sharded")
        for name in ("config.json", SETTINGS, INDEX):
            worker("whole", repo_id="org/begun", filename=name)
    with running_worker(home, nowhere) as worker:
        away = worker("load", model="org/other")
        begun = worker("load", model="org/begun")
        kept = worker("load", model="org/tiny")
    for refused in (away, begun):
        assert "not in the local cache, and the Hub could not be reached" in refused["message"]
        assert refused["waits"] == refused["log"] == []  # retries would wait 25 s
    assert (kept["weights"], kept["waits"]) == (online["weights"], [])
