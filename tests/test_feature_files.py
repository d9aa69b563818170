"""Feature files are read lazily, by position or by id, and every damage is named."""

import errno
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.feature_files import read as feature_files
from qwen_vit.feature_files.read import SHARDS_OPEN, FeatureFolder, load_features
from qwen_vit.feature_files.schema import METADATA_KEY
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage
from tests.support.features import METADATA, ODD_IDS, features_of
from tests.support.reading_stress import Folder, many_shards


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
    assert caught.value.name.startswith(str(path))
    assert message.startswith(caught.value.name)
    return message


def test_every_cut_of_a_file_is_refused_with_its_name(path: Path) -> None:
    write_features(path, features_of("a", "b"), METADATA)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert f"truncated, or not a safetensors file ({length} bytes)." in refused(path)
    path.write_bytes(whole + b"x")
    refused(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"version https://git-lfs", b"PK\x03\x04", bytes(64)]
)
def test_what_is_no_safetensors_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "Expected a feature file. Write it again with `qwen-vit encode`." in refused(path)


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    expected = "Expected a feature file of `qwen-vit encode`"
    assert f"does not exist. {expected}" in refused(tmp_path / "x")
    assert "a folder without export.json. Expected a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert f"not a regular file. {expected}" in refused(tmp_path / "pipe")


@pytest.mark.parametrize(("where", "call"), [(Path, "is_dir"), (os, "scandir"), (Path, "open")])
def test_what_may_not_be_read_is_not_called_torn(
    folder: Folder, path: Path, where: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(path, features_of("a"), METADATA)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(where, call, refuse)
        message = refused(path if call == "open" else folder.path)
    assert "cannot be read (Permission denied). Check its permissions" in message


def test_other_safetensors_files_are_no_feature_files(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)
    assert "a safetensors file, but not a feature file. Expected image_embeds" in refused(path)
    save_file({"x": torch.ones(2)}, path, metadata={METADATA_KEY: "{}"})
    assert "not a feature file" in refused(path)


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
    message = refused(path)
    assert message.endswith(" Write it again with `qwen-vit encode`.")
    assert "ownload" not in message


def test_a_header_that_promises_more_than_the_file_is_refused(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert "truncated" in refused(path)


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


def test_what_is_written_to_the_rows_stays_in_memory(path: Path) -> None:
    write_features(path, features_of("a", "b"), METADATA)
    before = path.read_bytes()
    rows = load_features(path)["b"].embeds
    rows.zero_()
    assert path.read_bytes() == before


# Choices


def test_slices_and_lists_choose_images_in_their_order(path: Path) -> None:
    write_features(path, features_of(*"abcdef"), METADATA)
    features = load_features(path)
    for key, expected in (
        (slice(2, 5), "cde"),
        (slice(None, None, -2), "fdb"),
        (slice(4, 100), "ef"),
        (slice(3, 3), ""),
        ([5, 0, -1], "faf"),
        (["d", "a"], "da"),
        ((4, 1), "eb"),
        (range(5, 0, -2), "fdb"),
        (np.array([2, -6]), "ca"),
        (np.array(["c", "b"]), "cb"),
        (torch.tensor([3, 0]), "da"),
        (np.arange(6) % 2 == 1, "bdf"),
        (torch.arange(6) < 2, "ab"),
        ([], ""),
    ):
        chosen = features[key]
        assert list(chosen.ids) == list(expected)
        assert len(chosen) == len(expected)
        assert [image.id for image in chosen] == list(expected)
        assert [image.grid_thw for image in chosen] == [features[n].grid_thw for n in expected]
    assert features[1:5][1:3].ids == ["c", "d"]
    assert features[1:5]["d"].grid_thw == features["d"].grid_thw
    assert features[1:5][["e", "b"]][0].id == "e"
    assert features[1:5].metadata is features.metadata


def test_a_choice_refuses_what_is_not_there(path: Path) -> None:
    write_features(path, features_of(*"abc"), METADATA)
    features = load_features(path)
    with pytest.raises(KeyError, match="'z' is not in"):
        features[["a", "z"]]
    with pytest.raises(IndexError, match=r"image 3 of .*, which holds 3 images"):
        features[[0, 3]]
    with pytest.raises(KeyError, match=r"'c' is not in a subset of .*features.safetensors"):
        features[:2]["c"]
    with pytest.raises(IndexError, match=r"image 2 of a subset of .*which holds 2 images"):
        features[:2][2]
    with pytest.raises(IndexError, match=r"a mask of 2 values for .*, which holds 3 images"):
        features[np.array([True, False])]
    odd: Any
    for odd in (None, 1.0, np.array([0.5]), np.zeros((1, 1), int), {"a"}):
        words = r"does not select images of .*\. Expected a position or an id"
        with pytest.raises(TypeError, match=words):
            features[odd]


def test_what_is_opened_says_in_a_line_what_it_is(path: Path, folder: Folder) -> None:
    """As a notebook shows it."""
    write_features(path, features_of(*"abc"), METADATA)
    file, export = load_features(path), load_features(folder.path)
    assert repr(file) == f"FeatureFile({str(path)!r}: 3 images)"
    assert repr(file[:2]) == f"<2 images of {file!r}>"
    assert repr(file[:1]) == f"<1 image of {file!r}>"
    assert repr(export) == f"FeatureFolder({str(folder.path)!r}: 7 images listed, 3 of 3 shards)"
    assert repr(file["b"]) == "ImageFeatures('b', embeds=(2, 6) float32, grid_thw=(1, 2, 4))"


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "export").write()


def test_a_folder_holds_the_good_images_in_the_listings_order(folder: Folder) -> None:
    features = load_features(folder.path)
    assert isinstance(features, FeatureFolder)
    assert features.is_complete
    assert len(features) == 3
    assert features.ids == [image.id for image in features] == ["a", "b", "g"]
    assert features.metadata["output"] == "merged"
    written = folder.images
    for key in ("a", "b", "g", 0, 1, 2, -1, -3):
        image = features[key]
        assert image.id == (key if isinstance(key, str) else features.ids[key])
        assert image.grid_thw == written[image.id].grid_thw
        assert torch.equal(image.embeds, written[image.id].embeds)
        assert image.size_px == (28, 1 if image.id == "b" else 0)
        assert image.notes == ("EXIF",)
    assert [image.id for image in features[::-1]] == ["g", "b", "a"]
    assert features[["g", "a"]].ids == ["g", "a"]
    shard = load_features(folder.shard(0))
    for some, expected in ((features, "abg"), (features[:2], "ab"), (shard, "ab")):
        assert [name for name in [*folder.names, "z", 0] if name in some] == list(expected)


def test_failed_images_are_listed_with_their_reasons(folder: Folder) -> None:
    features = load_features(folder.path)
    assert [each.id for each in features.errors] == ["c", "d", "e", "f"]
    first = features.errors[0]
    assert isinstance(first, FailedImage)
    assert (first.stage, first.code, first.message) == ("decode", "truncated", "c ends")
    assert isinstance(first.error, ImageError)
    with pytest.raises(KeyError, match=r"'c' has no features in .*00000.*: truncated: c ends"):
        features["c"]
    with pytest.raises(KeyError, match=r"'z' is not in .*export, which lists 7 images"):
        features["z"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"image {index} of .*export, which holds 3"):
            features[index]


def test_a_folder_in_progress_is_read_as_far_as_it_goes(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts of an export need not come in order: here the last shard came first."""
    folder.shard(0).rename(folder.path / "later")
    folder.shard(1).unlink()
    features = load_features(folder.path)
    assert not features.is_complete
    assert "export is not complete: it has 1 of 3 shards" in caplog.text
    assert features.ids == [image.id for image in features] == ["g"]
    assert features[0].id == features["g"].id == "g"
    assert list(features.errors) == []
    assert [name for name in folder.names if name in features] == ["g"]
    words = r"shard-00000000.safetensors: missing \(the folder has 1 of 3 shards\)"
    missing = rf"{words}\. Run the same `qwen-vit export`"
    with pytest.raises(ExportError, match=missing):
        features["a"]
    (folder.path / "later").rename(folder.shard(0))
    assert len(features) == 1  # as it was found; opened again, it has grown
    assert len(load_features(folder.path)) == 3


def test_a_folder_without_shards_is_empty(folder: Folder) -> None:
    for index in range(3):
        folder.shard(index).unlink()
    features = load_features(folder.path)
    assert (len(features), list(features), features.is_complete) == (0, [], False)


def test_a_shard_that_goes_missing_is_named(folder: Folder) -> None:
    features = load_features(folder.path)
    folder.shard(2).unlink()
    for use in (len, list, lambda f: f["g"], lambda f: f.errors, lambda f: f.ids):
        with pytest.raises(ExportError, match=r"shard-00000002.safetensors: missing .* again"):
            use(features)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_torn_shard_is_named_with_how_to_resume(folder: Folder, length: int) -> None:
    whole = folder.shard(2).read_bytes()
    folder.shard(2).write_bytes(whole[:length])
    features = load_features(folder.path)
    assert features["a"].id == "a"  # the others are read
    for use in (len, list, lambda f: f["g"], lambda f: f.errors):
        words = r"shard-00000002.safetensors: truncated, .* \(\d+ bytes\)\."
        with pytest.raises(ExportError, match=rf"{words} .* Run the same `qwen-vit export`"):
            use(features)


def edited(folder: Folder, index: int, **changes: Any) -> None:
    """A shard whose facts were changed."""
    file = load_features(folder.shard(index))
    text = json.dumps(file.metadata | changes)
    save_file(load_file(folder.shard(index)), folder.shard(index), metadata={METADATA_KEY: text})


STRANGE = {
    "another listing": {"ids": ["a", "x"]},
    "another order": {"ids": ["b", "a"]},
    "an image too few": {"errors": []},
    "an error too many": {
        "errors": [{"id": name, "stage": "", "code": "", "message": ""} for name in "cx"]
    },
    "another model": {"model": "large"},
    "another shard size": {"shard_size": 4},
    "another schema": {"schema_version": 2},
    "errors no list": {"errors": 3},
    "errors no dicts": {"errors": ["c"]},
    "errors without a reason": {"errors": [{"id": "c"}]},
    "errors of numbers": {"errors": [{"id": "c", "stage": "", "code": 1, "message": ""}]},
    "images no list": {"images": 3},
    "images too few": {"images": [{"size_px": [1, 2], "notes": []}]},
    "images without sizes": {"images": [{"notes": []}, {"notes": []}]},
    "images of text": {"images": 2 * [{"size_px": "ab", "notes": []}]},
}


@pytest.mark.parametrize("change", STRANGE)
def test_a_shard_of_another_export_is_refused(folder: Folder, change: str) -> None:
    edited(folder, 0, **STRANGE[change])
    features = load_features(folder.path)
    with pytest.raises(ExportError, match=r"shard-00000000\.safetensors") as caught:
        features["a"]
    assert change == "another schema" or "`qwen-vit export`" in str(caught.value)


def test_shards_that_changed_places_are_refused(folder: Folder) -> None:
    folder.shard(0).replace(folder.shard(2))
    features = load_features(folder.path)
    words = r"belongs to a different export\. .* lines 7 to 7 of listing\.jsonl.*\. Move it away"
    with pytest.raises(ExportError, match=words):
        features["g"]


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(change((path / name).read_text()))


DAMAGED = {
    "no settings": (lambda path: (path / "export.json").unlink(), "without export.json"),
    "settings cut": (rewrite("export.json", lambda text: text[:9]), "export.json: not JSON"),
    "settings a list": (rewrite("export.json", lambda _: "[]"), "Expected an object. Export into"),
    "a newer schema": (
        rewrite(
            "export.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 9')
        ),
        "export.json: its schema version is 9. Expected 1 or 2. Read it with the version",
    ),
    "no size": (
        rewrite("export.json", lambda text: text.replace("shard_size", "x")),
        "export.json: shard_size is None. Expected an integer. Export into a new folder.",
    ),
    "size 0": (
        rewrite("export.json", lambda text: text.replace('"shard_size": 3', '"shard_size": 0')),
        "export.json: shard_size is 0. Expected 1 to",
    ),
    "another count": (
        rewrite("export.json", lambda text: text.replace('"n_images": 7', '"n_images": 8')),
        "corrupt: 7 lines with 7 different ids. Expected 8 of each",
    ),
    "no listing": (lambda path: (path / "listing.jsonl").unlink(), "No such file"),
    "listing cut": (rewrite("listing.jsonl", lambda text: text[:-5]), "corrupt in lines 1 to 7."),
    "a line less": (rewrite("listing.jsonl", lambda text: text[: 2 * len(text) // 7]), "2 lines"),
    "ids twice": (rewrite("listing.jsonl", lambda text: text.replace('"b"', '"a"')), "6 different"),
    "ids no names": (
        rewrite("listing.jsonl", lambda text: text.replace('"b"', "2")),
        "6 different",
    ),
    "lines no objects": (rewrite("listing.jsonl", lambda _: "[]\n"), "corrupt in lines 1 to 1."),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_refused_with_the_files_name(folder: Folder, damage: str) -> None:
    break_it, words = DAMAGED[damage]
    break_it(folder.path)
    assert words in refused(folder.path)


def test_odd_names_come_back_as_they_were(tmp_path: Path) -> None:
    names = tuple(name for name in ODD_IDS.values())
    folder = Folder(tmp_path / "export", names, failed=names[:1], size=2).write()
    features = load_features(folder.path)
    assert features.ids == list(names[1:])
    assert [features[name].id for name in names[1:]] == list(names[1:])
    assert features.errors[0].id == names[0]


def test_few_shards_are_mapped_at_a_time_and_no_file_stays_open(tmp_path: Path) -> None:
    figures = many_shards(tmp_path, shards=200)
    assert 1 <= figures["mapped_most"] <= SHARDS_OPEN + 1


def test_an_image_is_found_by_its_id_in_one_shard_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counting the images reads no more than the headers."""
    opened: list[str] = []
    real = feature_files.FeatureFile.__init__

    def spy(self: Any, path: Path, remedy: str = "", **options: bool) -> None:
        opened.append(path.name)
        real(self, path, remedy, **options)

    monkeypatch.setattr(feature_files.FeatureFile, "__init__", spy)
    features = load_features(folder.path)
    assert len(features) == 3
    assert opened == []
    assert features["g"].id == features[2].id == "g"
    assert opened == [folder.shard(2).name]


def test_a_growing_folder_is_the_same_in_other_processes(folder: Folder) -> None:
    """Positions would lead to other images there, once another shard has come."""
    missing, content = folder.shard(0), folder.shard(0).read_bytes()
    missing.unlink()
    features = load_features(folder.path)
    chosen = features[[-1]]
    packed = pickle.dumps((features, chosen))
    missing.write_bytes(content)
    other, other_chosen = pickle.loads(packed)
    assert list(other.ids) == list(features.ids) != list(load_features(folder.path).ids)
    assert (len(other), other.is_complete) == (len(features), False)
    assert other_chosen[0].id == chosen[0].id


def test_files_folders_and_choices_travel_to_other_processes(folder: Folder) -> None:
    """As a data loader's workers need it."""
    features = load_features(folder.path)
    for each in (features, features[1:], features[["g", "a"]], load_features(folder.shard(0))):
        other = pickle.loads(pickle.dumps(each))
        assert list(other.ids) == list(each.ids)
        assert torch.equal(other[0].embeds, each[0].embeds)
