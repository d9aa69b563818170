"""Test that temporary faults of the Hub are retried, and that other errors give a remedy."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_cases import INDEX, OURS, SETTINGS, hash_of, own_folder
from tests.support.hub_server import COMMIT, Fault, Hub
from tests.support.hub_worker import Worker, running_worker

# Temporary faults

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
def test_a_temporary_fault_is_retried(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], fault: Fault
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [replace(fault)]
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert loaded["files"] == OURS
    if fault.status == 429:
        assert 8.0 in loaded["waits"]  # one second more than the server's Retry-After


NO_RANGES = {
    "ignores-ranges": Fault("*.safetensors", ranges=True, ignore_range=True),
    "no-method": Fault("*.safetensors", ranges=True, status=405),
    "other-range": Fault("*.safetensors", ranges=True, skip=4, shift=-8),
    "encoded": Fault("*.safetensors", ranges=True, encoding="gzip"),
    "size-changes": Fault("*.safetensors", ranges=True, skip=5, times=1, wrong_total=7),
    "always-cut": Fault("*.safetensors", ranges=True, cut=0.0),
}


@pytest.mark.parametrize("fault", NO_RANGES.values(), ids=NO_RANGES)
def test_whole_shards_are_downloaded_with_a_warning_if_ranges_fail(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], fault: Fault
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [replace(fault)]
    loaded = worker("load", **call)
    assert loaded.get("weights") == hash_of(repo), loaded
    assert "snapshots" in loaded["folder"]
    assert any("downloading whole files instead: model-00001" in line for line in loaded["log"])
    assert not own_folder(call).exists()
    assert list(own_folder(call).parent.glob(".*")) == []  # no partial folder is left


def test_wrong_bytes_of_a_whole_shard_are_found_and_downloaded_again(
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
    assert list(Path(call["cache_dir"]).glob("**/model-00002*")) == []  # it is deleted


def test_a_damaged_shard_is_removed_if_the_second_attempt_fails(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """A damaged shard once kept its final name, and the next call used the shard without a
    check."""
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
def test_a_damaged_small_file_in_the_hub_cache_is_repaired(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], name: str
) -> None:
    """huggingface_hub uses an existing file by its name, so it would always use the same wrong
    config."""
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
def test_a_cache_of_copies_instead_of_links_works_without_a_network(
    hub: Hub, repo: Path, tmp_path: Path
) -> None:
    """After `cp -rL`, or on a disk without links, the cache records no checksums."""
    write_checkpoint(repo, SMALL, shards=2)
    home = tmp_path / "home"
    with running_worker(home, hub.endpoint) as worker:
        worker("load", model="org/tiny", full=True)
    for link in (home / "hub").glob("**/snapshots/*/*"):
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content)
    for endpoint in ("http://127.0.0.1:9", "http://hub.invalid"):  # a closed port; an unknown host
        with running_worker(home, endpoint) as worker:
            for revision in (None, COMMIT):
                loaded = worker("load", model="org/tiny", revision=revision)
                assert loaded.get("weights") == hash_of(repo), loaded
                warnings = [line for line in loaded["log"] if "checksum unavailable" in line]
                assert len(warnings) == len(set(warnings)) == 2  # one for each shard


def test_a_shard_that_another_program_left_damaged_is_not_used(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL, shards=2)
    hub.faults = [Fault("*-00002-*", flip=-5, ranges=False, method="GET")]
    for path in repo.iterdir():
        cached = {"repo_id": "org/tiny", "filename": path.name, "cache_dir": call["cache_dir"]}
        worker("whole", **cached)  # huggingface_hub compares only sizes
    offline = worker("load", **call, local_files_only=True)
    assert "model-00002-of-00002.safetensors (" in offline["message"]
    assert "corrupt: its hash is" in offline["message"]
    loaded = worker("load", **call)
    assert loaded["weights"] == hash_of(repo)
    assert loaded["files"] == OURS


# Permanent faults: the request, the fault, and words of the cause and of the remedy

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
        assert refused["waits"] == []  # a retry would not help
    assert not own_folder(call).exists()
    assert list(own_folder(call).parent.glob(".*")) == []
    hub.faults.clear()
    if change == {}:  # the failure leaves no file
        assert worker("load", **call).get("weights") == hash_of(repo)


def test_one_wrong_404_for_a_file_does_not_last(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any]
) -> None:
    """The Hub's cache records such an answer. This once made a sharded checkpoint unreadable until
    a user cleared the cache. Settings would have been missing without an error."""
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
