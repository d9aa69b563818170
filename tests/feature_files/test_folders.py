"""Test that a folder of shards reads as one collection, and that errors name every damage."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.feature_files import file as feature_files
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import SHARDS_OPEN, FeatureFolder, load_features
from qwen_vit.feature_files.schema import METADATA_KEY
from qwen_vit.features import FailedImage
from tests.support.feature_file_cases import refused
from tests.support.features import ODD_IDS
from tests.support.reading_stress import Folder, many_shards


def test_a_folder_has_the_good_images_in_the_order_of_the_listing(folder: Folder) -> None:
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


def test_the_description_of_a_folder_reports_a_damaged_shard(folder: Folder) -> None:
    """The error once named a checkpoint, with the remedy to download a model."""
    path = folder.shard(0)
    good_bytes = path.read_bytes()
    for damaged in (good_bytes[:5], good_bytes[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"00000.*truncated.*qwen-vit export"):
            describe_features(folder.path)


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
        with pytest.raises(IndexError, match=rf"image {index} is not in .*export, which"):
            features[index]


def test_the_finished_shards_of_an_unfinished_export_are_read(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts of an export may finish in any order. In this test, the last shard came first."""
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
    assert len(features) == 1  # a folder keeps its state; a new load has the new shard
    assert len(load_features(folder.path)) == 3


def test_a_folder_without_shards_is_empty(folder: Folder) -> None:
    for index in range(3):
        folder.shard(index).unlink()
    features = load_features(folder.path)
    assert (len(features), list(features), features.is_complete) == (0, [], False)


def test_a_missing_shard_is_named(folder: Folder) -> None:
    features = load_features(folder.path)
    folder.shard(2).unlink()
    for use in (len, list, lambda f: f["g"], lambda f: f.errors, lambda f: f.ids):
        with pytest.raises(ExportError, match=r"shard-00000002.safetensors: missing .* again"):
            use(features)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_the_error_of_a_torn_shard_suggests_a_resume(folder: Folder, length: int) -> None:
    good_bytes = folder.shard(2).read_bytes()
    folder.shard(2).write_bytes(good_bytes[:length])
    features = load_features(folder.path)
    assert features["a"].id == "a"  # the other shards are readable
    for use in (len, list, lambda f: f["g"], lambda f: f.errors):
        words = r"shard-00000002.safetensors: truncated, .* \(\d+ bytes\)\."
        with pytest.raises(ExportError, match=rf"{words} .* Run the same `qwen-vit export`"):
            use(features)


def edited(folder: Folder, index: int, **changes: Any) -> None:
    """Change the facts of a shard."""
    file = load_features(folder.shard(index))
    text = json.dumps(file.metadata | changes)
    save_file(load_file(folder.shard(index)), folder.shard(index), metadata={METADATA_KEY: text})


STRANGE: dict[str, dict[str, Any]] = {
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


def test_exchanged_shards_are_refused(folder: Folder) -> None:
    folder.shard(0).replace(folder.shard(2))
    features = load_features(folder.path)
    words = (
        r"belongs to a different export\. .* lines 7 to 7 of listing\.jsonl.*\. Move the shard away"
    )
    with pytest.raises(ExportError, match=words):
        features["g"]


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(change((path / name).read_text()))


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda path: (path / "export.json").unlink(), "without export.json"),
    "settings cut": (rewrite("export.json", lambda text: text[:9]), "export.json: not JSON"),
    "settings a list": (
        rewrite("export.json", lambda _: "[]"),
        "Expected an object. Run the original",
    ),
    "a newer schema": (
        rewrite(
            "export.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 9')
        ),
        "export.json: its schema version is 9. Expected 1 or 2. Read it with the version",
    ),
    "no size": (
        rewrite("export.json", lambda text: text.replace("shard_size", "x")),
        "export.json: shard_size is None. Expected an integer. Run the original",
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
def test_the_error_of_a_damaged_folder_names_the_file(folder: Folder, damage: str) -> None:
    break_it, words = DAMAGED[damage]
    break_it(folder.path)
    assert words in refused(folder.path)


def test_unusual_names_are_read_unchanged(tmp_path: Path) -> None:
    names = tuple(name for name in ODD_IDS.values())
    folder = Folder(tmp_path / "export", names, failed=names[:1], size=2).write()
    features = load_features(folder.path)
    assert features.ids == list(names[1:])
    assert [features[name].id for name in names[1:]] == list(names[1:])
    assert features.errors[0].id == names[0]


def test_few_shards_are_mapped_at_a_time_and_no_file_remains_open(tmp_path: Path) -> None:
    figures = many_shards(tmp_path, shards=200)
    assert 1 <= figures["mapped_most"] <= SHARDS_OPEN + 1


def test_finding_an_image_by_its_id_opens_one_shard(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting the images reads only the headers."""
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


def test_a_pickled_folder_does_not_grow(folder: Folder) -> None:
    """Positions would name other images after another shard exists."""
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
