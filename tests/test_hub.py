"""Checkpoints from the Hub: the vision tower alone, checked, and each failure says what to do.

Real client code talks to the stand-in of hub_server.py, from processes of its own.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.checkpoint import cache as store
from qwen_vit.checkpoint.hub import find_checkpoint
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.checkpoint.published import packaged_weights
from qwen_vit.checkpoint.repository import Repository, explain
from qwen_vit.common.safetensors_header import read_header
from qwen_vit.errors import ArgumentError, CheckpointError, HubError
from tests.support.checkpoints import SMALL, WIDE, random_tensors, write_checkpoint, write_weights
from tests.support.hub_server import COMMIT, Fault, Hub, etag_of, serving
from tests.support.hub_worker import Worker, running_worker

SETTINGS = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
OURS = ["config.json", "manifest.json", SETTINGS, "vision.safetensors"]
MOVED = "f" * 40


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving({}) as running:
        yield running


@pytest.fixture(scope="module")
def worker(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with running_worker(tmp_path_factory.mktemp("home"), hub.endpoint) as running:
        yield running


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Iterator[Path]:
    """The folder of org/tiny, which each test fills; nothing is wrong with the hub yet."""
    folder = tmp_path / "repo"
    serve(hub, "org/tiny", folder)
    yield folder
    hub.faults.clear()
    hub.requests.clear()
    hub.token, hub.redirects = None, False


def serve(hub: Hub, name: str, folder: Path, commit: str = COMMIT) -> None:
    hub.commits[f"{name}@{commit}"] = folder
    hub.branches[f"{name}@main"] = commit


@pytest.fixture
def call(tmp_path: Path) -> dict[str, Any]:
    """The arguments of a call, with a cache of its own."""
    return {"model": "org/tiny", "cache_dir": tmp_path / "cache"}


def own_folder(call: dict[str, Any], commit: str = COMMIT) -> Path:
    return store.folder_of(Path(call["cache_dir"]), call["model"], commit)


def hash_of(folder: Path) -> str:
    return load_checkpoint(folder).weights_sha256()


def write_sharded(folder: Path, *, language: int = 9) -> int:
    """Ten shards, three of them with vision tensors, and `language` times as many other bytes.

    Returns the bytes of the vision tensors.
    """
    write_checkpoint(folder, WIDE)
    (folder / "model.safetensors").unlink()
    vision = {f"visual.{name}": tensor for name, tensor in random_tensors(WIDE).items()}
    names = sorted(vision)
    vision_bytes = sum(tensor.nbytes for tensor in vision.values())
    weight_map, total = {}, 0
    for i in range(10):
        part = {name: vision[name] for name in names[i::3]} if i < 3 else {}
        rows = language * vision_bytes // 10 // 2 // 512
        part |= {f"model.layers.{i}.weight": torch.full((rows, 512), 1.0).bfloat16()}
        file = f"model-{i + 1:05}-of-00010.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return vision_bytes


# What is fetched


def test_only_the_vision_tensors_cross_the_wire_and_serve_ever_after(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    vision_bytes = write_sharded(repo)
    first = worker("load", **call, part_bytes=200_000)
    sent = hub.sent_bytes()
    headers = sum(r.sent for r in hub.requests if r.range and r.range[0] < 64 + 8_000)
    print(f"{sent} bytes were sent for {vision_bytes} bytes of vision tensors")
    assert vision_bytes < sent <= 1.01 * vision_bytes + headers
    assert abs(first["fetched_bytes"] - sent) < 2_000  # the listing is not counted
    assert first["saved_bytes"] == pytest.approx(9 * vision_bytes, rel=0.01)
    assert (first["commit"], first["licence"]) == (COMMIT, "apache-2.0")
    assert first["files"] == OURS
    assert (first["weights"], first["folder"]) == (hash_of(repo), str(own_folder(call)))
    spans = [r for r in hub.requests if r.range and r.sent > 50_000]
    assert len(spans) > 10  # parts of 200,000 bytes, several at a time

    hub.requests.clear()
    again = worker("load", **call)
    assert hub.fetched() == []  # one HEAD tells whether the branch moved
    hub.requests.clear()
    pinned = worker("load", **call, revision=COMMIT)
    offline = worker("load", **call, local_files_only=True)
    assert hub.requests == []
    for later in (again, pinned, offline):
        assert later == {**first, "fetched_bytes": 0}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "prefix", ["visual.", "model.visual.", "thinker.visual.", "", "base_model.model.visual."]
)
def test_every_key_layout_arrives_as_it_is_locally(
    worker: Worker, repo: Path, call: dict[str, Any], prefix: str, shards: int
) -> None:
    write_checkpoint(repo, SMALL, prefix=prefix, shards=shards, dtype=torch.float32)
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert loaded["files"] == OURS


def test_types_of_different_width_stay_aligned(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, replace(SMALL, intermediate_size=13))  # biases of 26 bytes
    tensors = load_file(repo / "model.safetensors")
    for name in list(tensors)[::3]:
        tensors[name] = tensors[name].float()
    write_weights(repo, tensors)
    assert worker("load", **call)["weights"] == hash_of(repo)
    path = own_folder(call) / "vision.safetensors"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    offsets = {(info.dtype, info.start % 4) for info in read_header(path).values()}
    assert offsets == {("F32", 0), ("BF16", 0), ("BF16", 2)}


@pytest.mark.parametrize("full", [False, True])
def test_of_a_single_file_and_an_index_the_file_is_taken_as_in_a_folder(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], full: bool
) -> None:
    write_checkpoint(repo, SMALL, shards=2, seed=1)
    write_checkpoint(repo, SMALL)
    found = worker("load", **call, full=full)
    assert found["weights"] == hash_of(repo)
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == [
        "model.safetensors"
    ]
    for name in ("model.safetensors", INDEX):  # whatever else of it another program has cached
        cached = {"repo_id": "org/tiny", "filename": name, "cache_dir": call["cache_dir"]}
        worker("whole", **cached)
    shutil.rmtree(own_folder(call), ignore_errors=True)
    assert worker("load", **call, local_files_only=True)["weights"] == hash_of(repo)


def test_a_single_file_of_another_name_is_found_in_the_listing(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    (repo / "model.safetensors").rename(repo / "tower.safetensors")
    assert worker("load", **call)["weights"] == hash_of(repo)


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_another_name_serve_offline_when_they_were_taken_whole(
    worker: Worker, repo: Path, call: dict[str, Any], shards: int
) -> None:
    """Where nothing can be listed, the names in the cache are what there is to choose from."""
    write_checkpoint(repo, SMALL, shards=shards)
    for path in list(repo.glob("model.safetensors*")):
        path.rename(path.with_name(path.name.replace("model", "tower")))
    online = worker("load", **call, full=True)
    offline = worker("load", **call, local_files_only=True)
    assert "snapshots" in online["folder"]
    assert (offline["weights"], offline["folder"]) == (hash_of(repo), online["folder"])


def test_weights_in_a_folder_of_the_repository_are_not_its_own(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    (repo / "model.safetensors").rename(repo / "tower.safetensors")
    (repo / "checkpoint-500").mkdir()
    shutil.copyfile(repo / "tower.safetensors", repo / "checkpoint-500" / "model-a.safetensors")
    assert worker("load", **call)["weights"] == hash_of(repo)
    shutil.rmtree(call["cache_dir"])
    (repo / "tower.safetensors").unlink()
    refused = worker("load", **call)
    assert "org/tiny: no weights (it holds config.json" in refused["message"]


def test_a_cache_in_the_home_folder_is_the_same_for_each_function_of_the_client(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    write_checkpoint(repo, SMALL)
    call = {"repo_id": "org/tiny", "filename": "model.safetensors"}
    with running_worker(tmp_path / "hf", hub.endpoint, HOME=str(tmp_path)) as worker:
        worker("whole", **call, cache_dir=tmp_path / "mine")
        hub.requests.clear()
        loaded = worker("load", model="org/tiny", cache_dir="~/mine")
    assert loaded["weights"] == hash_of(repo)
    assert "model.safetensors" not in hub.fetched()


def test_a_mirror_without_a_listing_will_do(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    hub.faults = [Fault("*/api", status=404)]
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert loaded["licence"].startswith("unknown")


@pytest.mark.parametrize("total", ["1e999", '"many"', "-1.5", "true"])
def test_a_total_that_is_no_size_is_not_needed(
    worker: Worker, repo: Path, call: dict[str, Any], total: str
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    text = (repo / INDEX).read_text()
    (repo / INDEX).write_text(text.replace("{}", f'{{"total_size": {total}}}', 1))
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert loaded["saved_bytes"] in (None, 0)


def test_a_shard_in_the_cache_is_used_and_only_the_others_are_fetched(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=3)
    shards = sorted(path.name for path in repo.glob("*.safetensors"))
    cached = {"repo_id": "org/tiny", "filename": shards[0], "cache_dir": call["cache_dir"]}
    path = Path(worker("whole", **cached)["path"])
    hub.requests.clear()
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert [name for name in hub.fetched() if name in shards] == shards[1:]
    assert loaded["files"] == OURS
    # damaged in the meantime: it is hashed before it is used
    shutil.rmtree(own_folder(call))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    hub.requests.clear()
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert [name for name in hub.fetched() if name in shards] == shards
    assert any("corrupt: its hash is" in line for line in loaded["log"])


def test_a_whole_checkpoint_in_the_cache_is_used_as_it_lies(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    for path in repo.iterdir():
        cached = {"repo_id": "org/tiny", "filename": path.name, "cache_dir": call["cache_dir"]}
        worker("whole", **cached)
    hub.requests.clear()
    loaded = worker("load", **call)
    assert (loaded["weights"], loaded["fetched_bytes"]) == (hash_of(repo), 0)
    assert "snapshots" in loaded["folder"]
    assert hub.fetched() == []
    assert not own_folder(call).exists()


def test_full_takes_whole_shards_and_checks_their_sha256(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_sharded(repo, language=1)
    command = ["download", "org/tiny", "--full", "--json", "--cache-dir", str(call["cache_dir"])]
    done = worker("command", arguments=command)
    facts = json.loads(done["out"])
    vision_shards = sorted(path.name for path in repo.glob("*.safetensors"))[:3]
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == vision_shards
    assert facts["kept_bytes"] == sum((repo / name).stat().st_size for name in vision_shards)
    assert 0 < facts["saved_bytes"] < facts["fetched_bytes"]
    assert "snapshots" in facts["folder"]
    # once one of them is damaged in the cache, the same command mends it
    path = Path(facts["folder"], vision_shards[1]).resolve()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verify = ["info", "org/tiny", "--verify", "--cache-dir", str(call["cache_dir"])]
    damaged = worker("command", arguments=[*verify, "--local-files-only"])
    assert damaged["code"] == 2
    assert f"{vision_shards[1]} (" in damaged["err"]
    assert "corrupt: its hash is" in damaged["err"]
    assert worker("command", arguments=command)["code"] == 0
    checked = worker("command", arguments=[*verify, "--json"])
    assert json.loads(checked["out"])["verified"][vision_shards[1]] == "the Hub's sha256"
    assert json.loads(checked["out"])["verified"]["config.json"] == "the Hub's git sha1"


def test_once_whole_shards_were_checked_they_serve_instead_of_earlier_ranges(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=3)
    assert worker("load", **call)["folder"] == str(own_folder(call))
    checked = worker("load", **call, full=True)
    assert checked["licence"] == "apache-2.0"
    hub.requests.clear()
    pinned = worker("load", **call, revision=COMMIT)
    assert (pinned["weights"], hub.requests) == (hash_of(repo), [])
    assert pinned["folder"] == checked["folder"] != str(own_folder(call))


def test_large_files_come_from_the_second_host_which_never_sees_the_token(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.redirects, hub.token = True, "hf_secret"
    refused = worker("load", **call, token="hf_wrong")
    assert "org/tiny: the repository is gated" in refused["message"]
    loaded = worker("load", **call, token="hf_secret")
    assert loaded["weights"] == hash_of(repo)
    elsewhere = [request for request in hub.requests if request.cdn]
    assert {request.status for request in elsewhere} == {206}
    assert {request.authorization for request in elsewhere} == {None}


def test_a_branch_that_moves_meanwhile_gives_one_commit_and_later_the_next(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    write_checkpoint(tmp_path / "next", SMALL, shards=2, seed=1)
    hub.faults = [
        Fault(f"*/{SETTINGS}", then=lambda hub: serve(hub, "org/tiny", tmp_path / "next", MOVED))
    ]
    first = worker("load", **call)
    second = worker("load", **call)
    assert (first["commit"], first["weights"]) == (COMMIT, hash_of(repo))
    assert (second["commit"], second["weights"]) == (MOVED, hash_of(tmp_path / "next"))
    del hub.commits[f"org/tiny@{COMMIT}"]  # even when it is gone from the Hub
    pinned = worker("load", **call, revision=COMMIT)
    assert pinned["weights"] == first["weights"]


def test_a_wrong_ref_in_the_cache_does_not_mix_two_commits(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], tmp_path: Path
) -> None:
    """The Hub's client follows a ref that is called like a commit; one wrong answer writes it."""
    write_checkpoint(repo, SMALL, shards=2)
    write_checkpoint(tmp_path / "next", SMALL, shards=2, seed=1)
    serve(hub, "org/tiny", tmp_path / "next", MOVED)
    for path in repo.iterdir():
        for commit in (COMMIT, MOVED):
            worker("whole", repo_id="org/tiny", filename=path.name, revision=commit,
                   cache_dir=call["cache_dir"])  # fmt: skip
    refs = own_folder(call).parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / MOVED).write_text(COMMIT)
    loaded = worker("load", **call, revision=MOVED)
    assert loaded.get("weights") == hash_of(tmp_path / "next"), loaded


# Faults that pass


PASSING = {
    "cut-in-the-header": Fault("*-1-of*", ranges=True, times=1, cut=0.3),
    "cut-again-and-again": Fault("*.safetensors", ranges=True, times=5, cut=0.5),
    "cut-at-once": Fault("*.safetensors", ranges=True, times=3, cut=0.0),
    "500": Fault("*.safetensors", times=3, status=500),
    "503": Fault("*.safetensors", times=3, status=503),
    "429-retry-after": Fault("*.safetensors", times=2, status=429, headers={"Retry-After": "7"}),
    "429-rate-limit": Fault(
        "*.safetensors", times=2, status=429, headers={"RateLimit": '"api";r=0;t=7'}
    ),
    "too-slow": Fault("*-00002-*", skip=2, times=1, drip=3.0),
    "slow-drip": Fault("*.safetensors", times=8, drip=0.05),
    "small-files-500": Fault("*.json", times=1, status=500),
    "small-file-cut": Fault("*/config.json", method="GET", times=1, cut=0.5),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_waited_out(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], fault: Fault
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [replace(fault)]
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert loaded["files"] == OURS
    if fault.status == 429:
        assert 8.0 in loaded["waits"]  # a second more than asked for


NO_RANGES = {
    "ignores-ranges": Fault("*.safetensors", ranges=True, ignore_range=True),
    "no-method": Fault("*.safetensors", ranges=True, status=405),
    "other-range": Fault("*.safetensors", ranges=True, skip=4, shift=-8),
    "encoded": Fault("*.safetensors", ranges=True, encoding="gzip"),
    "size-changes": Fault("*.safetensors", ranges=True, skip=5, times=1, wrong_total=7),
    "always-cut": Fault("*.safetensors", ranges=True, cut=0.0),
}


@pytest.mark.parametrize("fault", NO_RANGES.values(), ids=NO_RANGES)
def test_where_ranges_fail_whole_shards_come_with_a_warning(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], fault: Fault
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [replace(fault)]
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert "snapshots" in loaded["folder"]
    assert any("taking whole files instead: model-00001" in line for line in loaded["log"])
    assert not own_folder(call).exists()
    assert list(own_folder(call).parent.glob(".*")) == []  # nothing half-filled is left


def test_wrong_bytes_of_a_whole_shard_are_found_and_fetched_once_more(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    damaged = Fault("*-00002-*", flip=-5, ranges=False, method="GET", times=1)
    hub.faults = [damaged, replace(NO_RANGES["ignores-ranges"])]
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    shutil.rmtree(call["cache_dir"])
    hub.faults = [replace(damaged, times=None), replace(NO_RANGES["ignores-ranges"])]
    refused = worker("load", **call)
    assert refused["kind"] == "HubError"
    assert "model-00002-of-00002.safetensors arrived damaged twice" in refused["message"]
    assert list(Path(call["cache_dir"]).glob("**/model-00002*")) == []  # not kept either


def test_a_damaged_shard_does_not_stay_when_the_second_attempt_fails(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """Once it did, under its final name, and the next call used it unchecked."""
    write_checkpoint(repo, SMALL, shards=2)
    shard = "*-00002-*"
    hub.faults = [
        replace(NO_RANGES["ignores-ranges"]),
        Fault(shard, flip=-5, ranges=False, method="GET", times=1),
        Fault(shard, skip=1, status=403),
    ]
    assert worker("load", **call)["kind"] == "HubError"
    assert list(Path(call["cache_dir"]).glob("**/model-00002*")) == []


@pytest.mark.parametrize("name", ["config.json", SETTINGS, INDEX])
def test_a_small_file_that_is_damaged_in_the_hubs_cache_is_mended(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], name: str
) -> None:
    """huggingface_hub takes what lies there, by name: the same wrong config for good."""
    write_checkpoint(repo, SMALL, shards=2)
    full = ["download", "org/tiny", "--full", "--cache-dir", str(call["cache_dir"])]
    assert worker("command", arguments=full)["code"] == 0
    cached = {"repo_id": "org/tiny", "filename": name, "cache_dir": call["cache_dir"]}
    path = Path(worker("whole", **cached)["path"]).resolve()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"2", 1))
    refused = worker("load", **call, local_files_only=True)
    assert refused["kind"] == "CheckpointError"
    assert f"{name} (" in refused["message"]
    assert "download it again (qwen-vit download MODEL)" in refused["message"]
    for arguments in (full, [argument for argument in full if argument != "--full"]):
        path.write_bytes(content[:20])
        done = worker("command", arguments=arguments)
        assert done["code"] == 0, done["err"]
        assert path.read_bytes() == content


@pytest.mark.slow
def test_a_cache_of_copies_instead_of_links_serves_without_a_network(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    """As `cp -rL` or a disk without links leaves it: nobody can be asked for checksums."""
    write_checkpoint(repo, SMALL, shards=2)
    home = tmp_path / "home"
    with running_worker(home, hub.endpoint) as worker:
        worker("load", model="org/tiny", full=True)
    for link in (home / "hub").glob("**/snapshots/*/*"):
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content)
    for endpoint in ("http://127.0.0.1:9", "http://hub.invalid"):  # nobody listens; no such name
        with running_worker(home, endpoint) as worker:
            for revision in (None, COMMIT):
                loaded = worker("load", model="org/tiny", revision=revision)
                assert loaded.get("weights") == hash_of(repo), loaded
                told = [line for line in loaded["log"] if "checksum unavailable" in line]
                assert len(told) == len(set(told)) == 2  # one for each shard


def test_a_shard_that_another_program_left_damaged_is_not_used(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [Fault("*-00002-*", flip=-5, ranges=False, method="GET")]
    for path in repo.iterdir():
        cached = {"repo_id": "org/tiny", "filename": path.name, "cache_dir": call["cache_dir"]}
        worker("whole", **cached)  # its client compares sizes alone
    offline = worker("load", **call, local_files_only=True)
    assert "model-00002-of-00002.safetensors (" in offline["message"]
    assert "corrupt: its hash is" in offline["message"]
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert loaded["files"] == OURS


# Faults that stay: what is asked for, what is wrong, and words of the cause and of the remedy


FAILURES: dict[str, tuple[dict[str, Any], Fault | None, tuple[str, ...]]] = {
    "gated": (
        {},
        Fault(status=403, code="GatedRepo"),
        ("org/tiny: the repository is gated", "Accept its licence", "hf auth login"),
    ),
    "absent": ({"model": "org/absent"}, None, ("org/absent: not found", "Check the name")),
    "private": (
        {},
        Fault(status=401, code="RepoNotFound"),
        ("org/tiny: not found, or private", "hf auth login"),
    ),
    "forbidden": ({}, Fault(status=403), ("org/tiny", "HTTP 403", "hf auth login")),
    "forbidden-shards": (
        {},
        Fault("*.safetensors", status=403),
        ("org/tiny: the Hub denies access", "HTTP 403"),
    ),
    "down": ({}, Fault(status=503), ("org/tiny", "HTTP 503", "Try again later")),
    "shards-down": ({}, Fault("*.safetensors", status=500), ("HTTP 500", "Try again later")),
    "too-often": (
        {},
        Fault("*.safetensors", status=429),
        ("too many requests", "HTTP 429", "Wait five minutes"),
    ),
    "revision": ({"revision": "v9"}, None, ("org/tiny at v9: no such revision", "branches")),
    "commit": (
        {"revision": "a" * 40},
        None,
        ("org/tiny at aaaaaaaa", ": no such revision", "commits"),
    ),
    "shard-absent": (
        {},
        Fault("*.safetensors", status=404, code="EntryNotFound"),
        ("no safetensors",),
    ),
    "config-cut": (
        {},
        Fault("*/config.json", method="GET", cut=0.5),
        ("org/tiny: could not be fetched", "Try again"),
    ),
    "name": (
        {"model": "org/bad--name"},
        None,
        ("org/bad--name: could not be fetched", "HFValidationError"),
    ),
}


@pytest.mark.parametrize(("change", "fault", "words"), FAILURES.values(), ids=FAILURES)
def test_each_failure_of_the_hub_has_its_cause_and_its_remedy(
    hub: Hub,
    worker: Worker,
    repo: Path,
    call: dict[str, Any],
    change: dict[str, Any],
    fault: Fault | None,
    words: tuple[str, ...],
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [] if fault is None else [replace(fault)]
    refused = worker("load", **{**call, **change})
    assert refused.get("kind") == "HubError", refused
    assert "\n" not in refused["message"]
    for word in words:
        assert word in refused["message"]
    if fault is not None and fault.status == 403:
        assert refused["waits"] == []  # asking again would not help
    assert not own_folder(call).exists()
    assert list(own_folder(call).parent.glob(".*")) == []
    hub.faults.clear()
    if change == {}:  # nothing of the failure stays
        assert worker("load", **call).get("weights") == hash_of(repo)


def test_one_wrong_answer_that_a_file_is_not_there_does_not_last(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """The Hub's cache remembers such an answer, and once that made a sharded checkpoint unreadable
    until the cache was cleared; settings would have been left out in silence."""
    write_checkpoint(repo, SMALL, shards=2)
    for name in (SETTINGS, INDEX):
        for listing in (True, False):
            hub.faults = [Fault(f"*/{name}", status=404, code="EntryNotFound", times=1)]
            hub.faults += [] if listing else [Fault("*/api", status=500)]
            refused = worker("load", **call)
            if listing:
                assert f"org/tiny: lists {name} but returned 404. Try again." in refused["message"]
            hub.faults.clear()
            shutil.rmtree(own_folder(call), ignore_errors=True)
            loaded = worker("load", **call)
            assert loaded.get("weights") == hash_of(repo), loaded
            assert loaded["files"] == OURS
            shutil.rmtree(call["cache_dir"])


# Repositories that are refused by name, before any weight is fetched


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_index(folder: Path, **changes: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")} | changes
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder: Path, **added: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    added = {f"visual.{name.replace('__', '.')}": tensor for name, tensor in added.items()}
    write_weights(folder, tensors | added)


def make_lora(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    base = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(base))


def rename_weights(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return rename


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    assert old in header
    header = header.replace(old, new, 1).ljust(length)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def cut_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


EIGHT_BITS = torch.zeros(96, 32).to(torch.float8_e4m3fn)
REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "lora": (make_lora, ("LoRA adapter for 'Qwen/Qwen2.5-VL-7B-Instruct'", "Merge it")),
    "pickles": (rename_weights("model.bin"), ("only model.bin: pickles are never opened",)),
    "gguf": (rename_weights("a.gguf"), ("only GGUF (a.gguf)", "Use the safetensors checkpoint")),
    "no-weights": (
        rename_weights("notes.txt"),
        ("org/tiny: no weights", "Expected model.safetensors"),
    ),
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        ("org/tiny: no config.json", "Choose a repository"),
    ),
    "qwen2-vl": (
        lambda folder: edit_config(folder, model_type="qwen2_vl"),
        ("this is Qwen2-VL", "Use transformers' Qwen2VLForConditionalGeneration."),
    ),
    "qwen3-vl": (
        lambda folder: edit_config(folder, model_type="qwen3_vl"),
        ("this is Qwen3-VL", "Use transformers' Qwen3VLForConditionalGeneration."),
    ),
    "unknown": (
        lambda folder: edit_config(folder, model_type="llava"),
        ("model_type is 'llava'. Expected one of qwen2_5_vl",),
    ),
    "remote-code": (
        lambda folder: edit_config(folder, auto_map={"AutoModel": "modeling.Model"}),
        ("auto_map asks for remote code, and remote code is never imported",),
    ),
    "qwen2-vl-tower": (
        lambda folder: edit_tensors(folder, blocks__0__mlp__fc1__weight=torch.zeros(4)),
        ("holds the vision tower of Qwen2-VL",),
    ),
    "qwen3-vl-tower": (
        lambda folder: edit_tensors(folder, pos_embed__weight=torch.zeros(4)),
        ("holds the vision tower of Qwen3-VL",),
    ),
    "fp8": (
        lambda folder: edit_tensors(folder, blocks__0__attn__qkv__weight=EIGHT_BITS),
        ("is F8_E4M3", "Use a checkpoint that leaves the vision tower unquantised"),
    ),
    "awq": (
        lambda folder: edit_tensors(folder, blocks__0__attn__qkv__qweight=torch.zeros(4)),
        ("quantised or of another type (blocks.0.attn.qkv.qweight",),
    ),
    "missing": (
        lambda folder: edit_config(folder, vision_config=replace(SMALL, depth=4).to_json()),
        ("12 of 54 vision tensors are missing", "Use the config.json that belongs"),
    ),
    "shape": (
        lambda folder: edit_tensors(folder, merger__ln_q__weight=torch.zeros(31)),
        ("has the shape [31]. Expected [32]",),
    ),
    "text-only": (
        lambda folder: edit_index(folder, weight_map={"model.norm.weight": "a.safetensors"}),
        ("names no patch_embed.proj.weight", "Choose a repository"),
    ),
    "escaping": (
        lambda folder: edit_index(folder, weight_map={"visual.a": "../a.safetensors"}),
        ("'../a.safetensors'", "Expected the plain name", "Do not use this checkpoint"),
    ),
    "no-map": (lambda folder: edit_index(folder, weight_map=[]), ("weight_map is []",)),
    "page": (lambda folder: (folder / INDEX).write_text("<html>"), ("not JSON", INDEX)),
    "lfs-pointer": (
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        ("org/tiny: model.safetensors (63 bytes): a git-lfs pointer",),
    ),
    "nothing-inside": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}"),
        (": no vision tower: none of its 0 tensors",),
    ),
    "empty": (lambda folder: cut_file(folder, 0), ("(0 bytes): empty.",)),
    "cut-in-the-header": (lambda folder: cut_file(folder, 1_000), ("larger than the file",)),
    "truncated": (
        lambda folder: cut_file(folder, 60_000),
        ("(60000 bytes): truncated", "are missing"),
    ),
    "duplicate-keys": (
        lambda folder: edit_header(folder, b"visual.blocks.0.norm1", b"visual.blocks.0.norm2"),
        ("the key 'visual.blocks.0.norm2.weight' appears twice",),
    ),
    "overlap": (
        lambda folder: edit_header(folder, b'"data_offsets":[0,', b'"data_offsets":[2,'),
        ("but its shape",),
    ),
    "huge-header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4_000),
        ("declares a header of", "corrupt, or not a safetensors file"),
    ),
}


@pytest.mark.parametrize(("edit", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_used_is_refused_before_any_weight_is_fetched(
    hub: Hub,
    worker: Worker,
    repo: Path,
    call: dict[str, Any],
    edit: Callable[[Path], object],
    words: tuple[str, ...],
) -> None:
    write_checkpoint(repo, SMALL)
    edit(repo)
    refused = worker("load", **call)
    assert "message" in refused, refused
    for word in words:
        assert word in refused["message"]
    weights = [r for r in hub.requests if r.method == "GET" and r.file.endswith(".safetensors")]
    assert sum(request.sent for request in weights) < 8_000  # a header at most
    assert not own_folder(call).exists()


@pytest.mark.parametrize(
    "changes", [{"model_type": "qwen2_vl"}, {"model_type": "llava"}, {"auto_map": {"a": "b.c"}}]
)
def test_another_model_is_refused_before_any_weight_file_is_asked_for(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    edit_config(repo, **changes)
    assert worker("load", **call)["kind"] == "CheckpointError"
    assert hub.fetched() == ["config.json"]


# What is kept


def test_damage_of_what_is_kept_is_found_and_mended(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    worker("find", **call)
    folder = own_folder(call)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    header_end = 8 + int.from_bytes(whole["vision.safetensors"][:8], "little")
    damage: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("vision.safetensors", lambda content: content[:-1]),
        ("vision.safetensors", lambda content: content + b"\0"),
        ("vision.safetensors", lambda content: flipped(content, 1)),
        ("vision.safetensors", lambda content: flipped(content, header_end // 2)),
        ("vision.safetensors", lambda content: flipped(content, header_end - 1)),
        ("config.json", lambda content: content + b" "),
        ("manifest.json", lambda content: flipped(content, len(content) // 2)),
        ("manifest.json", lambda content: b""),
    ]
    for name, change in damage:
        (folder / name).write_bytes(change(whole[name]))
        offline = worker("load", **call, revision=COMMIT, local_files_only=True)
        assert offline.get("kind") == "CheckpointError", (name, offline)
        assert str(folder / name) in offline["message"]
        assert f"Delete {folder}, and download it again" in offline["message"]
        mended = worker("load", **call, revision=COMMIT)
        assert mended.get("weights") == hash_of(repo), mended
        assert (folder / name).read_bytes() == whole[name]
    for name in whole:  # inside the data only the hash can tell
        if name == "manifest.json":
            continue
        (folder / name).write_bytes(flipped(whole[name], len(whole[name]) - 3))
        arguments = ["info", "org/tiny", "--verify", "--cache-dir", str(call["cache_dir"])]
        found = worker("command", arguments=[*arguments, "--revision", COMMIT])
        assert found["code"] == 1
        assert str(folder / name) in found["out"]
        (folder / name).write_bytes(whole[name])
    good = worker("command", arguments=[*arguments, "--json"])
    assert set(json.loads(good["out"])["verified"]) == set(OURS) - {"manifest.json"}


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def test_nan_on_the_wire_is_not_kept(worker: Worker, repo: Path, call: dict[str, Any]) -> None:
    write_checkpoint(repo, SMALL)
    edit_tensors(repo, merger__ln_q__weight=torch.full((32,), float("nan")).bfloat16())
    refused = worker("load", **call)
    assert refused["kind"] == "CheckpointError"
    assert "org/tiny" in refused["message"]
    assert "merger.ln_q.weight: damaged in transfer: 32 NaN and 0 infinite" in refused["message"]
    assert list(own_folder(call).parent.glob("[!.]*[!k]")) == []


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """Once, a download that took longer than a day was removed under the hands of its process."""
    write_checkpoint(repo, SMALL)
    parent = own_folder(call).parent
    here, elsewhere = f".{COMMIT}.{store._process_space()}", f".{COMMIT}.0123abcd"
    dead = parent / f"{here}-4194305.abc"  # above the largest process id
    alive, unknown = parent / f"{here}-1.abc", parent / f".{COMMIT}.unknown-4194305.abc"
    foreign, writing, silent = (parent / f"{elsewhere}-{process}.abc" for process in (1, 2, 3))
    no_process = parent / f"{here}-{9**99}.abc"
    for path in (dead, alive, unknown, foreign, writing, silent, no_process):
        path.mkdir(parents=True)
        (path / "vision.safetensors").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (alive, silent, silent / "vision.safetensors", writing):  # its file is new
        os.utime(path, (two_days_ago, two_days_ago))
    worker("find", **call)
    assert not dead.exists()
    assert not silent.exists()
    for path in (alive, unknown, foreign, writing, no_process):
        assert path.exists(), path


def test_where_processes_cannot_be_told_apart_age_alone_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_process_space", lambda: "unknown")
    folder = tmp_path / COMMIT
    another = tmp_path / f".{COMMIT}.unknown-4194305.abc"
    another.mkdir()
    store.remove_abandoned(folder)
    assert another.exists()
    os.utime(another, (0, 0))
    store.remove_abandoned(folder)
    assert not another.exists()


def test_a_pinned_commit_needs_no_hub_cache_beside_our_folder(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    first = worker("load", **call)
    for name in ("snapshots", "blobs", "refs"):
        shutil.rmtree(own_folder(call).parent.parent / name)
    hub.requests.clear()
    again = worker("load", **call, revision=COMMIT)
    assert again["weights"] == first["weights"]
    assert hub.requests == []


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_a_revision_of_what_is_here_is_refused(tmp_path: Path, model: str) -> None:
    name = str(tmp_path) if model == "folder" else model
    with pytest.raises(
        ArgumentError, match=r"revision is 'v2', but .*\. Leave revision out"
    ) as caught:
        find_checkpoint(name, revision="v2")
    assert name in str(caught.value)
    assert find_checkpoint(name, token="x", local_files_only=True).name == name


def test_an_empty_revision_is_refused() -> None:
    """As of a shell variable that is not set; the Hub would answer that there is no such file."""
    with pytest.raises(ArgumentError, match=r"revision is empty\. Expected a branch"):
        find_checkpoint("org/tiny", revision="")


# Offline


def test_offline_without_image_settings_is_refused_rather_than_guessed(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """Once, settings that could not be fetched counted as absent: images were resized to other
    limits than the checkpoint's, with no word about it."""
    write_checkpoint(repo, SMALL)
    cached = {"repo_id": "org/tiny", "cache_dir": call["cache_dir"]}
    for name in ("config.json", "model.safetensors"):  # as another program may have
        worker("whole", **cached, filename=name)
    refused = worker("load", **call, local_files_only=True)
    assert refused["kind"] == "HubError", refused
    assert "org/tiny: not in the local cache" in refused["message"]
    assert "Leave out local_files_only" in refused["message"]
    (repo / SETTINGS).unlink()
    online = worker("load", **call)
    kept = worker("load", **call, local_files_only=True)
    assert "weights" in online
    assert kept == online  # the cache remembers that the repository has none


@pytest.mark.slow
def test_the_environment_means_what_it_means_to_huggingface_hub(
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
    assert "HF_HUB_OFFLINE" in unknown["message"]
    for later in (offline, pinned):
        assert later["weights"] == online["weights"]
    with running_worker(
        home, "http://127.0.0.1:9", HF_HUB_CACHE=str(cache)
    ) as worker:  # nobody listens
        away = worker("load", **plain)
        kept = worker("load", **plain, cache_dir=home / "hub")
    assert "not in the local cache, and the Hub could not be reached" in away["message"]
    assert kept["weights"] == online["weights"]


@pytest.mark.slow
def test_without_a_network_nothing_is_tried_again_and_again(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    write_checkpoint(repo, SMALL)
    home, nowhere = tmp_path / "home", "http://hub.invalid"  # a name that nobody may register
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
        assert refused["waits"] == refused["log"] == []  # between attempts: 25 s in all
    assert (kept["weights"], kept["waits"]) == (online["weights"], [])


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing(hub: Hub, repo: Path, tmp_path: Path) -> None:
    """A file system of 1 MB of its own, in a namespace of its own."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    disk = tmp_path / "disk"
    disk.mkdir()
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*private, mount, disk, "true"], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    write_checkpoint(repo, WIDE)
    with running_worker(disk, hub.endpoint, start=[*private, mount, str(disk)]) as worker:
        refused = worker("load", model="org/tiny")
        assert refused["kind"] == "HubError"
        fact = f"org/tiny: does not fit on the disk ({disk / 'hub'}). Free some space"
        assert fact in refused["message"]
        sent = [r for r in hub.requests if r.range and r.sent > 10_000]
        assert sent == []  # the space is taken before anything is fetched
        write_checkpoint(repo, SMALL)
        serve(hub, "org/tiny", repo, MOVED)
        assert worker("load", model="org/tiny").get("weights") == hash_of(repo)


# The command line


def test_the_command_reports_and_shows_progress_only_on_a_terminal(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_sharded(repo, language=1)
    arguments = ["download", "org/tiny", "--cache-dir", str(call["cache_dir"])]
    watched = worker("command", arguments=arguments, terminal=True)
    assert "B/s" in watched["err"]
    assert "100%" in watched["err"]
    lines = dict(line.split(None, 1) for line in watched["out"].splitlines())
    assert lines["commit"] == COMMIT
    assert lines["licence"] == "apache-2.0"
    assert lines["folder"] == str(own_folder(call))
    assert int(lines["fetched_bytes"].replace(",", "")) > 1_000_000
    assert int(lines["saved_bytes"].replace(",", "")) > 1_000_000
    shutil.rmtree(call["cache_dir"])
    silent = worker("command", arguments=[*arguments, "--json"])
    assert silent["err"] == ""
    assert json.loads(silent["out"])["fetched_bytes"] > 1_000_000


# Without the Hub


@pytest.mark.parametrize("model", ["", "weights.safetensors", "a b/c", "seven"])
def test_what_is_neither_a_folder_nor_a_repository_is_refused_without_the_network(
    model: str,
) -> None:
    with pytest.raises(HubError, match="neither a folder nor a Hub repository") as caught:
        find_checkpoint(model)
    assert repr(model) in str(caught.value)
    assert caught.value.remedy == ""


@pytest.mark.parametrize(
    "model", ["a/b/c", "../no/such", "/no/such/folder", "./model", "~/model", "model/"]
)
def test_a_path_to_nothing_does_not_exist(model: str) -> None:
    """It was called neither a folder nor a repository."""
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(model)
    assert (caught.value.name, caught.value.fact) == (model, "does not exist")


def test_a_file_is_not_a_checkpoint_and_its_folder_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match=r"a file\. Expected a checkpoint's folder") as caught:
        find_checkpoint(tmp_path / "model.safetensors")
    assert "pass the folder that holds it" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tinny", "tiny"),
        ("7B", "Qwen/Qwen2.5-VL-7B-Instruct or Qwen/Qwen2.5-Omni-7B"),
        ("32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen2.5-VL-7B-Instuct", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_a_short_or_misspelt_name_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(HubError) as caught:
        find_checkpoint(name)
    assert str(caught.value).endswith(f"Did you mean {meant}?")


def test_a_repository_that_is_not_found_gets_a_suggestion_too() -> None:
    """Its name has the form of a repository's: only the Hub can say that it has none."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def remedy(name: str) -> str:
        missing = LocalEntryNotFoundError("")
        return explain(missing, Repository(name, None, None, None, True)).remedy

    known = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert remedy("qwen/Qwen2.5-VL-7B-instruct").startswith(f"did you mean {known}? Otherwise ")
    assert "did you mean" not in remedy(known)
    assert "did you mean" not in remedy("someone/else")
    assert "did you mean" not in remedy("someone/tiny")  # theirs, whatever ours is called


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_folder_that_may_not_be_read_is_named(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dir(path: Path) -> bool:  # as Python 3.11's does; later ones return False
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(
        CheckpointError, match=r"/closed/model: cannot be read .*\. Expected a folder\. Check its"
    ):
        find_checkpoint("/closed/model")


def test_tiny_and_a_local_folder_need_no_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("tiny").folder == packaged_weights() / "tiny"
    found = find_checkpoint(tmp_path)
    assert (found.folder, found.name, found.commit) == (tmp_path, str(tmp_path), None)


def test_a_folder_of_ours_is_a_local_checkpoint_too(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    folder = Path(worker("find", **call)["folder"])
    assert hash_of(folder) == hash_of(repo)
    assert worker("find", model=folder)["licence"] == "apache-2.0"
    assert set(store.check(folder) or {}) == set(OURS) - {"manifest.json"}
    (folder / SETTINGS).unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: missing"):
        store.check(folder)
    assert etag_of(repo / "config.json") == etag_of(folder / "config.json")


def test_a_link_that_another_process_makes_anew_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen processes at once: the client removes a link and makes it again, in every one."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "config.json").write_text("{}")
    answers: list[Exception | None] = []

    def in_between(repo: str, name: str, **options: Any) -> str:
        error = answers.pop(0)
        if error is not None:
            raise error
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", in_between)
    repository = Repository("org/tiny", COMMIT, None, tmp_path / "cache", False)
    gone = FileNotFoundError(2, "No such file or directory")
    answers[:] = [gone, gone, None]
    assert repository._request_file("config.json", COMMIT) == tmp_path / "config.json"
    assert (repository.fetched_bytes, answers) == (2, [])
    answers[:] = [gone] * 5
    with pytest.raises(FileNotFoundError):
        repository._request_file("config.json", COMMIT)
    assert answers == []
    answers[:] = [LocalEntryNotFoundError("not in the cache"), None]
    with pytest.raises(LocalEntryNotFoundError):  # an answer is not asked for again
        repository._request_file("config.json", COMMIT)
    assert answers == [None]
