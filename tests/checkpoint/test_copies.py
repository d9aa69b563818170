"""Test that checkpoints can be copied, pickled and opened by several threads."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from qwen_vit.checkpoint import published_tensors
from qwen_vit.checkpoint.load import Checkpoint, load_checkpoint
from qwen_vit.checkpoint.published_tensors import weights_hash
from tests.support.checkpoint_cases import QKV, assert_same_tensors
from tests.support.checkpoints import (
    SMALL,
    write_checkpoint,
)

IN_ANOTHER_PROCESS = """
import pickle, sys
checkpoint = pickle.load(sys.stdin.buffer)
tensor = checkpoint.tensors["merger.mlp.0.weight"]
print(checkpoint.weights_sha256(), len(checkpoint.tensors), tensor.float().sum().item())
"""


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
@pytest.mark.parametrize("when", ["before reading", "after reading", "after hashing"])
@pytest.mark.parametrize("prefix", ["visual.", "thinker.visual."])
def test_a_copy_or_a_pickle_reads_the_same_tensors(
    tmp_path: Path, prefix: str, when: str, duplicate: Callable[[Checkpoint], Checkpoint]
) -> None:
    """After reading, a checkpoint could not be copied, because safetensors' open files cannot be
    copied."""
    tensors = write_checkpoint(tmp_path, SMALL, prefix=prefix, shards=2)
    checkpoint = load_checkpoint(tmp_path)
    if when == "after reading":
        assert_same_tensors(checkpoint.tensors, tensors)
    if when == "after hashing":
        checkpoint.weights_sha256()
    twin = duplicate(checkpoint)
    assert_same_tensors(twin.tensors, tensors)
    assert_same_tensors(checkpoint.tensors, tensors)  # the original still has its files open
    for field in ("config", "image_config", "files", "prefix", "dtypes"):
        assert getattr(twin, field) == getattr(checkpoint, field)
    assert twin.locate(QKV) == checkpoint.locate(QKV)
    assert twin.weights_sha256() == weights_hash(tensors)


def test_a_pickle_keeps_the_hash_that_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.weights_sha256()
    twin = pickle.loads(pickle.dumps(checkpoint))
    monkeypatch.setattr(published_tensors, "weights_hash", None)  # a second computation would fail
    assert twin.weights_sha256() == weights_hash(tensors)


@pytest.mark.parametrize("given", [False, True])
def test_a_pickle_is_read_by_another_process(tmp_path: Path, given: bool) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    checkpoint = load_checkpoint(tmp_path)
    if given:
        checkpoint = Checkpoint.from_tensors(tensors, SMALL)
    sums = checkpoint.tensors["merger.mlp.0.weight"].float().sum().item()
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps(checkpoint),
        env={**os.environ, "PYTHONPATH": str(Path(published_tensors.__file__).parents[2])},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split() == [weights_hash(tensors), "42", str(sums)]


def test_two_threads_may_open_the_same_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    both, open_file = threading.Barrier(2, timeout=60), safe_open

    def open_together(*arguments: Any, **options: Any) -> Any:
        both.wait()
        return open_file(*arguments, **options)

    monkeypatch.setattr(published_tensors, "safe_open", open_together)
    checkpoint = load_checkpoint(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: dict(checkpoint.tensors), range(2)))
    for read in found:
        assert_same_tensors(read, tensors)
