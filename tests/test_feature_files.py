"""Feature files are read lazily, by position or by id, and every damage is named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_features import METADATA, features_of

from qwen_vit.errors import ExportError
from qwen_vit.feature_files import load_features
from qwen_vit.features import METADATA_KEY, write_features


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.safetensors"


@pytest.mark.parametrize("key", [0, 1, 2, -1, -3, "a", "c"])
def test_an_image_is_found_by_position_or_by_id(path: Path, key: int | str) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    names = ["a", "b", "c"]
    expected = key if isinstance(key, str) else names[key]
    found = load_features(path)[key]
    assert found.id == expected
    assert found.embeds is not None
    assert len(found.embeds) == names.index(expected) + 1


def test_one_that_is_not_there_is_named_with_the_file(path: Path) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    read = load_features(path)
    with pytest.raises(KeyError, match=r"'z' is not in .*features.safetensors, which holds 3"):
        read["z"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"image {index} of .*features.safetensors.* 3"):
            read[index]


# Damaged and foreign files


def refused(path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        load_features(path)
    message = str(caught.value)
    assert str(path) in message
    return message


def test_every_cut_of_a_file_is_refused_with_its_name(path: Path) -> None:
    write_features(path, features_of("a", "b"), METADATA)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "torn" in refused(path)
        assert f"({length} bytes)" in refused(path)
    path.write_bytes(whole + b"x")
    refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"version https://git-lfs", b"PK\x03\x04", bytes(64)]
)
def test_what_is_no_safetensors_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "expected a feature file" in refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        assert "is not a file, expected a feature file" in refused(path)


def test_other_safetensors_files_are_no_feature_files(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)
    assert "no feature file" in refused(path)
    save_file({"x": torch.ones(2)}, path, metadata={METADATA_KEY: "{}"})
    assert "no feature file" in refused(path)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> str:
    """A good file of two images after a change of its facts or tensors; how it is refused."""
    write_features(path, features_of("a", "b"), METADATA)
    facts, tensors = load_features(path).metadata, load_file(path)
    change(facts, tensors)
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, path, metadata={METADATA_KEY: text})
    return refused(path)


def set_fact(name: str, value: Any) -> Any:
    return lambda facts, tensors: facts.__setitem__(name, value)


def set_tensor(name: str, value: torch.Tensor) -> Any:
    return lambda facts, tensors: tensors.__setitem__(name, value)


EDITED = {
    "newer schema": (set_fact("schema_version", 2), "schema 2, expected 1"),
    "no schema": (lambda facts, tensors: facts.pop("schema_version"), "schema None, expected 1"),
    "no ids": (lambda facts, tensors: facts.pop("ids"), "its ids are None"),
    "ids no list": (set_fact("ids", "ab"), "its ids are 'ab'"),
    "ids no names": (set_fact("ids", [1, 2]), r"its ids are [1, 2]"),
    "ids unhashable": (set_fact("ids", [["a"], {}]), "expected names"),
    "ids twice": (set_fact("ids", ["a", "a"]), "2 ids, 1 of them different"),
    "too few ids": (set_fact("ids", ["a"]), "disagrees with itself (1 ids"),
    "too many ids": (set_fact("ids", ["a", "b", "c"]), "disagrees with itself (3 ids"),
    "grid of 2": (set_tensor("image_grid_thw", torch.ones(2, 2, dtype=torch.int64)), "(2, 2)"),
    "flat grid": (set_tensor("image_grid_thw", torch.ones(2, dtype=torch.int64)), "(2,)"),
    "float grid": (set_tensor("image_grid_thw", torch.ones(2, 3)), "'F32'"),
    "float offsets": (set_tensor("image_token_offsets", torch.tensor([0.0, 1, 3])), "'F32'"),
    "late start": (set_tensor("image_token_offsets", torch.tensor([1, 1, 3])), "from 1 to 3"),
    "early end": (set_tensor("image_token_offsets", torch.tensor([0, 1, 2])), "from 0 to 2"),
    "past the end": (set_tensor("image_token_offsets", torch.tensor([0, 1, 9])), "over 3 rows"),
    "falling": (set_tensor("image_token_offsets", torch.tensor([0, 5, 3])), "disagrees"),
    "no offsets": (lambda facts, tensors: tensors.pop("image_token_offsets"), "no feature file"),
    "flat embeds": (set_tensor("image_embeds", torch.ones(3)), "image_embeds of shape (3,)"),
}


@pytest.mark.parametrize("edit", EDITED)
def test_a_file_that_was_edited_is_refused_with_its_name(path: Path, edit: str) -> None:
    change, word = EDITED[edit]
    assert word in rewritten(path, change)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ids": [], "ids": []}', '{"x": NaN}'])
def test_metadata_that_is_no_json_object_is_refused(path: Path, text: str) -> None:
    write_features(path, features_of("a"), METADATA)
    save_file(load_file(path), path, metadata={METADATA_KEY: text})
    refused(path)


def test_a_header_that_promises_more_than_the_file_is_refused(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert "torn" in refused(path)


def test_an_image_is_read_only_when_it_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    read = load_features(path)
    slices = []

    class Spy:
        def get_slice(self, name: str) -> Any:
            slices.append(name)
            return file.get_slice(name)

    file, read._file = read._file, Spy()
    assert slices == []
    assert read["b"].grid_thw == (1, 2, 4)
    assert slices == ["image_embeds"]
