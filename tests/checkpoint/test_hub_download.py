"""Test that a download from the Hub fetches and checks only the vision tensors of any layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.common.safetensors_header import read_header
from tests.support.checkpoints import SMALL, WIDE, random_tensors, write_checkpoint, write_weights
from tests.support.hub_cases import INDEX, MOVED, OURS, SETTINGS, hash_of, own_folder, serve
from tests.support.hub_server import COMMIT, Fault, Hub
from tests.support.hub_worker import Worker, running_worker


def write_sharded(folder: Path, *, language: int = 9) -> int:
    """Write ten shards, of which three have vision tensors, and `language` times as many other
    bytes.

    Returns the bytes of the vision tensors.
    """
    write_checkpoint(folder, WIDE)
    (folder / "model.safetensors").unlink()
    vision = {f"visual.{name}": tensor for name, tensor in random_tensors(WIDE).items()}
    names = sorted(vision)
    vision_bytes = sum(tensor.nbytes for tensor in vision.values())
    weight_map: dict[str, str] = {}
    total = 0
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


# Download


def test_only_the_vision_tensors_are_downloaded_and_then_cached(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    vision_bytes = write_sharded(repo)
    first = worker("load", **call, part_bytes=200_000)
    sent = hub.sent_bytes()
    headers = sum(r.sent for r in hub.requests if r.range and r.range[0] < 64 + 8_000)
    print(f"{sent} bytes were sent for {vision_bytes} bytes of vision tensors")
    assert vision_bytes < sent <= 1.01 * vision_bytes + headers
    assert abs(first["fetched_bytes"] - sent) < 2_000  # fetched_bytes excludes the file listing
    assert first["saved_bytes"] == pytest.approx(9 * vision_bytes, rel=0.01)
    assert (first["commit"], first["licence"]) == (COMMIT, "apache-2.0")
    assert first["files"] == OURS
    assert (first["weights"], first["folder"]) == (hash_of(repo), str(own_folder(call)))
    spans = [r for r in hub.requests if r.range and r.sent > 50_000]
    assert len(spans) > 10  # the download has parallel parts of 200,000 bytes

    hub.requests.clear()
    again = worker("load", **call)
    assert hub.fetched() == []  # the loader checks the branch with one HEAD request
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
def test_a_single_file_is_preferred_to_an_index_as_in_a_folder(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], full: bool
) -> None:
    write_checkpoint(repo, SMALL, shards=2, seed=1)
    write_checkpoint(repo, SMALL)
    found = worker("load", **call, full=full)
    assert found["weights"] == hash_of(repo)
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == [
        "model.safetensors"
    ]
    for name in ("model.safetensors", INDEX):  # another program may have cached both
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
def test_whole_weight_files_of_another_name_are_used_offline(
    worker: Worker, repo: Path, call: dict[str, Any], shards: int
) -> None:
    """Without a file listing, the loader chooses among the names in the cache."""
    write_checkpoint(repo, SMALL, shards=shards)
    for path in list(repo.glob("model.safetensors*")):
        path.rename(path.with_name(path.name.replace("model", "tower")))
    online = worker("load", **call, full=True)
    offline = worker("load", **call, local_files_only=True)
    assert "snapshots" in online["folder"]
    assert (offline["weights"], offline["folder"]) == (hash_of(repo), online["folder"])


def test_weights_in_a_folder_of_the_repository_are_ignored(
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
    assert "org/tiny: no weights (the folder contains config.json" in refused["message"]


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


def test_a_mirror_without_a_file_listing_works(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    hub.faults = [Fault("*/api", status=404)]
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert loaded["licence"].startswith("unknown")


@pytest.mark.parametrize("total", ["1e300", '"many"', "-1.5", "true"])
def test_a_total_that_is_no_size_is_not_needed(
    worker: Worker, repo: Path, call: dict[str, Any], total: str
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    text = (repo / INDEX).read_text()
    (repo / INDEX).write_text(text.replace("{}", f'{{"total_size": {total}}}', 1))
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert loaded["saved_bytes"] in (None, 0)


def test_full_downloads_whole_shards_and_checks_their_sha256(
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
    # The same command repairs a damaged shard in the cache.
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


def test_checked_whole_shards_replace_earlier_ranges(
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


def test_large_files_come_from_the_second_host_without_the_token(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.redirects, hub.token = True, "hf_secret"
    refused = worker("load", **call, token="hf_wrong")
    assert "org/tiny: the repository is gated" in refused["message"]
    loaded = worker("load", **call, token="hf_secret")
    assert loaded["weights"] == hash_of(repo)
    from_cdn = [request for request in hub.requests if request.cdn]
    assert {request.status for request in from_cdn} == {206}
    assert {request.authorization for request in from_cdn} == {None}


def test_a_load_uses_one_commit_while_its_branch_moves(
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
    del hub.commits[f"org/tiny@{COMMIT}"]  # the cached commit works after the Hub deletes it
    pinned = worker("load", **call, revision=COMMIT)
    assert pinned["weights"] == first["weights"]


def test_a_wrong_ref_in_the_cache_does_not_mix_two_commits(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], tmp_path: Path
) -> None:
    """The Hub's client follows a ref whose name looks like a commit, and a wrong answer writes such
    a ref."""
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
    as_json = worker("command", arguments=[*arguments, "--json"])
    assert as_json["err"] == ""
    assert json.loads(as_json["out"])["fetched_bytes"] > 1_000_000
