"""Test that readers read feature files on demand, by position or id, and report every damage."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.schema import METADATA_KEY
from qwen_vit.feature_files.write import write_features
from tests.support.feature_file_cases import refused, set_fact
from tests.support.features import METADATA, features_of
from tests.support.reading_stress import Folder


@pytest.mark.parametrize("key", [0, 1, 2, -1, -3, "a", "c"])
def test_an_image_is_found_by_position_or_by_id(path: Path, key: int | str) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    names = ["a", "b", "c"]
    expected = key if isinstance(key, str) else names[key]
    found = load_features(path)[key]
    assert found.id == expected
    assert len(found.embeds) == names.index(expected) + 1


def test_the_error_of_a_missing_image_names_the_file(path: Path) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    read = load_features(path)
    with pytest.raises(KeyError, match=r"'z' is not in .*features.safetensors, which contains 3"):
        read["z"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"image {index} is not in .*safetensors, .* 3"):
            read[index]


# Damaged and foreign files


def test_every_truncation_of_a_file_is_refused_with_its_name(path: Path) -> None:
    write_features(path, features_of("a", "b"), METADATA)
    good_bytes = path.read_bytes()
    for length in [*range(0, len(good_bytes), 37), len(good_bytes) - 1]:
        path.write_bytes(good_bytes[:length])
        assert f"truncated, or not a safetensors file ({length} bytes)." in refused(path)
    path.write_bytes(good_bytes + b"x")
    refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"version https://git-lfs", b"PK\x03\x04", bytes(64)]
)
def test_a_file_that_is_not_safetensors_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "a feature file. Pass another file. If this file is truncated, write it" in refused(path)


def test_a_missing_or_irregular_path_is_refused(tmp_path: Path) -> None:
    expected = "Expected a feature file of `qwen-vit encode`"
    assert f"does not exist. {expected}" in refused(tmp_path / "x")
    assert "a folder without export.json. Expected a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert f"not a regular file. {expected}" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(("where", "call"), [(Path, "is_dir"), (os, "scandir"), (Path, "open")])
def test_an_unreadable_file_is_not_called_torn(
    folder: Folder, path: Path, where: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(path, features_of("a"), METADATA)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(where, call, refuse)
        message = refused(path if call == "open" else folder.path)
    assert "cannot be read (Permission denied). Check its permissions" in message


def test_the_remedy_for_a_foreign_file_does_not_overwrite_it(path: Path) -> None:
    """The remedy once suggested to overwrite a checkpoint or a golden file with `encode`."""
    save_file({"visual.patch_embed.proj.weight": torch.ones(2)}, path)
    message = refused(path)
    assert "For a checkpoint, pass its folder as the model." in message
    assert "For a golden file, use `qwen-vit compare --golden`." in message
    assert "again" not in message
    # only a part of the tensors of a feature file
    save_file({"image_embeds": torch.ones(2, 2)}, path)
    assert refused(path).endswith("Write it again with `qwen-vit encode`.")


def test_other_safetensors_files_are_refused(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)
    assert "a safetensors file, but not a feature file. Expected image_embeds" in refused(path)
    save_file({"x": torch.ones(2)}, path, metadata={METADATA_KEY: "{}"})
    assert "not a feature file" in refused(path)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> str:
    """Change the facts or tensors of a good file with two images, and return the error."""
    write_features(path, features_of("a", "b"), METADATA)
    facts, tensors = load_features(path).metadata, load_file(path)
    change(facts, tensors)
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, path, metadata={METADATA_KEY: text})
    return refused(path)


def set_tensor(name: str, value: torch.Tensor) -> Any:
    return lambda facts, tensors: tensors.__setitem__(name, value)


EDITED = {
    "newer schema": (
        set_fact("schema_version", 3),
        "its schema version is 3. Expected 1 or 2. Read it",
    ),
    "no schema": (
        lambda facts, tensors: facts.pop("schema_version"),
        "its schema version is None. Expected 1 or 2.",
    ),
    "no ids": (lambda facts, tensors: facts.pop("ids"), "its ids are None. Expected a list of"),
    "ids no list": (set_fact("ids", "ab"), "its ids are 'ab'"),
    "ids no names": (set_fact("ids", [1, 2]), r"its ids are [1, 2]"),
    "ids unhashable": (set_fact("ids", [["a"], {}]), "Expected a list of names"),
    "ids twice": (set_fact("ids", ["a", "a"]), "2 ids, 1 of them different"),
    "too few ids": (set_fact("ids", ["a"]), "corrupt (1 ids"),
    "too many ids": (set_fact("ids", ["a", "b", "c"]), "corrupt (3 ids"),
    "grid of 2": (set_tensor("image_grid_thw", torch.ones(2, 2, dtype=torch.int64)), "(2, 2)"),
    "flat grid": (set_tensor("image_grid_thw", torch.ones(2, dtype=torch.int64)), "(2,)"),
    "float grid": (set_tensor("image_grid_thw", torch.ones(2, 3)), "'F32'"),
    "float offsets": (set_tensor("image_token_offsets", torch.tensor([0.0, 1, 3])), "'F32'"),
    "late start": (set_tensor("image_token_offsets", torch.tensor([1, 1, 3])), "from 1 to 3"),
    "early end": (set_tensor("image_token_offsets", torch.tensor([0, 1, 2])), "from 0 to 2"),
    "past the end": (set_tensor("image_token_offsets", torch.tensor([0, 1, 9])), "over 3 rows"),
    "falling": (set_tensor("image_token_offsets", torch.tensor([0, 5, 3])), "corrupt (offsets"),
    "no offsets": (
        lambda facts, tensors: tensors.pop("image_token_offsets"),
        "not a feature file",
    ),
    "whole embeds": (
        set_tensor("image_embeds", torch.ones(3, 8, dtype=torch.int16)),
        "corrupt (image_embeds has the dtype I16)",
    ),
    "flat embeds": (set_tensor("image_embeds", torch.ones(3)), "image_embeds of shape (3,)"),
}


@pytest.mark.parametrize("edit", EDITED)
def test_an_edited_file_is_refused_with_its_name(path: Path, edit: str) -> None:
    change, word = EDITED[edit]
    assert word in rewritten(path, change)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ids": [], "ids": []}', '{"x": NaN}'])
def test_metadata_that_is_not_a_json_object_is_refused(path: Path, text: str) -> None:
    write_features(path, features_of("a"), METADATA)
    save_file(load_file(path), path, metadata={METADATA_KEY: text})
    message = refused(path)
    assert message.endswith(" Write it again with `qwen-vit encode`.")
    assert "ownload" not in message


def test_a_header_longer_than_the_file_is_refused(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert "truncated" in refused(path)


def test_only_requested_images_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(path, features_of("a", "b", "c"), METADATA)
    read: Any = load_features(path)
    slices = []

    class Spy:
        def get_slice(self, name: str) -> Any:
            slices.append(name)
            return file.get_slice(name)

    file, read._file = read._file, Spy()
    assert slices == []
    assert read["b"].grid_thw == (1, 2, 4)
    assert slices == ["image_embeds"]


def test_changes_of_rows_do_not_change_the_file(path: Path) -> None:
    write_features(path, features_of("a", "b"), METADATA)
    before = path.read_bytes()
    rows = load_features(path)["b"].embeds
    rows.zero_()
    assert path.read_bytes() == before
