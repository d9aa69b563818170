"""Test model names without a network: folders, repositories, revisions and suggestions."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.checkpoint import cache as store
from qwen_vit.checkpoint.hub import find_checkpoint
from qwen_vit.checkpoint.published import packaged_weights
from qwen_vit.checkpoint.repository import Repository
from qwen_vit.errors import ArgumentError, CheckpointError, HubError
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_cases import OURS, SETTINGS, hash_of
from tests.support.hub_server import COMMIT, etag_of
from tests.support.hub_worker import Worker

# Revisions


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_a_revision_of_a_local_model_is_refused(tmp_path: Path, model: str) -> None:
    name = str(tmp_path) if model == "folder" else model
    with pytest.raises(ArgumentError, match=r"revision is 'v2', but .*\. Omit revision") as caught:
        find_checkpoint(name, revision="v2")
    assert name in str(caught.value)
    assert find_checkpoint(name, token="x", local_files_only=True).name == name


def test_an_empty_revision_is_refused() -> None:
    """An unset shell variable gives an empty revision, for which the Hub would report a missing
    file."""
    with pytest.raises(ArgumentError, match=r"revision is empty\. Expected a branch"):
        find_checkpoint("org/tiny", revision="")


# Without the Hub


@pytest.mark.parametrize("model", ["weights.safetensors", "a b/c", "seven"])
def test_a_name_of_neither_a_folder_nor_a_repository_is_refused_without_the_network(
    model: str,
) -> None:
    with pytest.raises(HubError, match="does not exist") as caught:
        find_checkpoint(model)
    assert str(caught.value).startswith(f"{model}: does not exist. Expected a local")
    assert caught.value.remedy == "Check the name."


@pytest.mark.parametrize(
    ("model", "text"), [("", "''"), (None, "None"), (3, r"3 \(int\)"), (b"", r"b'' \(bytes\)")]
)
def test_other_values_than_a_name_are_refused(model: Any, text: str) -> None:
    """`os.environ.get` of an unset variable once gave a TypeError that named no argument."""
    with pytest.raises(ArgumentError, match=f"model is {text}\\. Expected a local folder"):
        find_checkpoint(model)
    if model:
        with pytest.raises(ArgumentError, match="cache_dir is"):
            find_checkpoint("tiny", cache_dir=model)


@pytest.mark.parametrize(
    "model", ["a/b/c", "../no/such", "/no/such/folder", "./model", "~/model", "model/"]
)
def test_a_path_to_nothing_does_not_exist(model: str) -> None:
    """The error once named neither a folder nor a repository."""
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(model)
    assert (caught.value.name, caught.value.fact) == (model, "does not exist")


def test_the_error_for_a_weight_file_asks_for_its_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match=r"a file\. Expected a checkpoint's folder") as caught:
        find_checkpoint(tmp_path / "model.safetensors")
    assert caught.value.remedy == "Pass the folder that contains this file."
    other = tmp_path / "other" / "a.jpg"
    other.parent.mkdir()
    other.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(other)
    assert caught.value.remedy == "Pass a folder with config.json and the weights."


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tinny", "tiny"),
        ("7B", "Qwen/Qwen2.5-VL-7B-Instruct or Qwen/Qwen2.5-Omni-7B"),
        ("32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen2.5-VL-7B-Instuct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("https://huggingface.co/owner/name/tree/main", "owner/name"),
        ("huggingface.co/owner/name", "owner/name"),
    ],
)
def test_a_short_or_misspelt_name_gets_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(HubError) as caught:
        find_checkpoint(name)
    assert str(caught.value).endswith(f"Did you mean {suggestion}?")


def test_a_missing_repository_gets_a_suggestion() -> None:
    """The name looks like a repository's name, so only the Hub can report that it does not
    exist."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def remedy(name: str) -> str:
        missing = LocalEntryNotFoundError("")
        return Repository(name, None, None, None, True).explain(missing).remedy

    known = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert remedy("qwen/Qwen2.5-VL-7B-instruct").startswith(f"Did you mean {known}? Otherwise ")
    assert "did you mean" not in remedy(known)
    assert "did you mean" not in remedy("someone/else")
    assert "did you mean" not in remedy("someone/tiny")  # "tiny" without an owner is our model


def test_an_error_of_the_hub_names_the_variable_that_may_cause_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository = Repository("owner/name", None, None, None, False)
    no_folder = NotADirectoryError(errno.ENOTDIR, "Not a directory")
    for variable, error in (
        ("HF_HOME", no_folder), ("HF_ENDPOINT", LocalEntryNotFoundError(""))
    ):  # fmt: skip
        assert f"{variable}=wrong" not in repository.explain(error).remedy
        monkeypatch.setenv(variable, "wrong")
        assert f"{variable}=wrong" in repository.explain(error).remedy


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_folder_that_may_not_be_read_is_named(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dir(path: Path) -> bool:  # Python 3.11 raises; later versions return False
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with pytest.raises(
        CheckpointError, match=r"/closed/model: cannot be read .*\. Expected a folder\. Check its"
    ):
        find_checkpoint("/closed/model")


def test_tiny_and_a_local_folder_need_no_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # its import would fail
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("tiny").folder == packaged_weights() / "tiny"
    found = find_checkpoint(tmp_path)
    assert (found.folder, found.name, found.commit) == (tmp_path, str(tmp_path), None)


def test_a_folder_in_our_cache_is_a_local_checkpoint(
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


def test_a_link_that_another_process_recreates_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen processes run at once, and the client in each process removes and recreates a
    link."""
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
    with pytest.raises(LocalEntryNotFoundError):  # an answer of the Hub is not retried
        repository._request_file("config.json", COMMIT)
    assert answers == [None]
