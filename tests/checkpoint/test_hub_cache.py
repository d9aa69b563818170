"""Test the cached files of the Hub: checks, repairs, and sharing with other processes."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.checkpoint import cache as store
from tests.support.checkpoints import SMALL, WIDE, write_checkpoint
from tests.support.hub_cases import MOVED, OURS, edit_tensors, hash_of, own_folder, serve
from tests.support.hub_server import COMMIT, Hub
from tests.support.hub_worker import Worker, running_worker

# Download


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
    # The cached shard is now damaged. The loader must hash it before use.
    shutil.rmtree(own_folder(call))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    hub.requests.clear()
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert [name for name in hub.fetched() if name in shards] == shards
    assert any("corrupt: its hash is" in line for line in loaded["log"])


def test_a_complete_checkpoint_in_the_hub_cache_is_used_in_place(
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


# Cached files


def test_damaged_cached_files_are_found_and_repaired(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    worker("find", **call)
    folder = own_folder(call)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    header_end = 8 + int.from_bytes(contents["vision.safetensors"][:8], "little")
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
        (folder / name).write_bytes(change(contents[name]))
        offline = worker("load", **call, revision=COMMIT, local_files_only=True)
        assert offline.get("kind") == "CheckpointError", (name, offline)
        assert str(folder / name) in offline["message"]
        assert f"Delete {folder}, and download it again" in offline["message"]
        mended = worker("load", **call, revision=COMMIT)
        assert mended.get("weights") == hash_of(repo), mended
        assert (folder / name).read_bytes() == contents[name]
    for name in contents:  # only the hash shows damage inside the data
        if name == "manifest.json":
            continue
        (folder / name).write_bytes(flipped(contents[name], len(contents[name]) - 3))
        arguments = ["info", "org/tiny", "--verify", "--cache-dir", str(call["cache_dir"])]
        found = worker("command", arguments=[*arguments, "--revision", COMMIT])
        assert found["code"] == 1
        assert str(folder / name) in found["out"]
        (folder / name).write_bytes(contents[name])
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
    assert (
        "merger.ln_q.weight: damaged in transfer: contains 32 NaN and 0 infinite"
        in refused["message"]
    )
    assert list(own_folder(call).parent.glob("[!.]*[!k]")) == []


def test_leftovers_of_killed_processes_are_removed_and_running_downloads_are_not(
    worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """A cleanup once removed the files of a running download that took longer than a day."""
    write_checkpoint(repo, SMALL)
    parent = own_folder(call).parent
    own_space, other_space = f".{COMMIT}.{store._process_space()}", f".{COMMIT}.0123abcd"
    dead = parent / f"{own_space}-4194305.abc"  # no process has such a large id
    alive, unknown = parent / f"{own_space}-1.abc", parent / f".{COMMIT}.unknown-4194305.abc"
    foreign, downloading, stale = (parent / f"{other_space}-{process}.abc" for process in (1, 2, 3))
    no_process = parent / f"{own_space}-{9**99}.abc"
    for path in (dead, alive, unknown, foreign, downloading, stale, no_process):
        path.mkdir(parents=True)
        (path / "vision.safetensors").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (alive, stale, stale / "vision.safetensors", downloading):  # its file stays new
        os.utime(path, (two_days_ago, two_days_ago))
    worker("find", **call)
    assert not dead.exists()
    assert not stale.exists()
    for path in (alive, unknown, foreign, downloading, no_process):
        assert path.exists(), path


def test_leftovers_are_removed_by_age_if_their_process_is_unknown(
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


# Offline


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing(hub: Hub, repo: Path, tmp_path: Path) -> None:
    """Mount a separate file system of 1 MB, in a separate namespace."""
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
        assert sent == []  # the loader reserves the space before it downloads
        write_checkpoint(repo, SMALL)
        serve(hub, "org/tiny", repo, MOVED)
        assert worker("load", model="org/tiny").get("weights") == hash_of(repo)
