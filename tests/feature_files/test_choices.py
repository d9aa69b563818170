"""Test that slices and lists select images, also in other processes."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch

from qwen_vit.common.missing_name import missing_name
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from tests.support.features import METADATA, features_of
from tests.support.reading_stress import Folder

# Choices


def test_slices_and_lists_select_images_in_order(path: Path) -> None:
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
        (pa.chunked_array([["c"], ["b"]]), "cb"),
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


def test_columns_and_masks_of_pandas_select_images(path: Path) -> None:
    """pandas 3 has its own arrays of text, also in the `.values` of a column."""
    pd = pytest.importorskip("pandas", reason="pip install -e '.[pandas]'")
    write_features(path, features_of(*"abc"), METADATA)
    features = load_features(path)
    frame = features.to_pandas()
    table = pd.DataFrame({"id": pd.array(["c", "a", "b"], dtype="string"), "size": [3, 1, 2]})
    for key, expected in (
        (frame.index[:2], "ab"),
        (frame.index.to_series()[::-1], "cba"),
        (table.id, "cab"),
        (table[table["size"] > 1].id.values, "cb"),
        (table["size"] > 1, "ac"),
        (pd.array([True, False, True], dtype="boolean"), "ac"),
        (pd.array([2, 0], dtype="Int64"), "ca"),
        (table["size"] - 2, "bca"),
    ):
        assert features[key].ids == list(expected)
    with pytest.raises(IndexError, match=r"the mask has 2 values\. Expected 3"):
        features[pd.Series([True, False])]
    for odd, kind in (
        (pd.array([True, None, True], dtype="boolean"), "bool"),
        (table, "DataFrame"),
    ):
        with pytest.raises(TypeError, match=rf"\({kind}\) does not select images") as caught:
            features[odd]
        assert "\n" not in str(caught.value)


def test_a_path_is_an_id_and_a_truth_value_is_not(path: Path, folder: Folder) -> None:
    stored = load_features(folder.path)
    first = Path(stored.ids[0])
    assert first in stored
    assert stored[first].id == stored.ids[0]
    write_features(path, features_of("im/cat.jpg", "im/dog.jpg"), METADATA)
    features = load_features(path)
    dog = Path("im/dog.jpg")
    for chosen in (features, features[:]):
        assert chosen[dog].id == "im/dog.jpg"
        assert dog in chosen
        assert Path("cat.jpg") not in chosen
        assert chosen[[dog]].ids == ["im/dog.jpg"]
        with pytest.raises(KeyError, match=r"Did you mean 'im/cat\.jpg'"):
            chosen[Path("cat.jpg")]
        with pytest.raises(TypeError, match=r"True \(bool\) does not select images"):
            chosen[True]


def test_the_error_of_a_missing_image_names_a_close_id(path: Path) -> None:
    write_features(path, features_of("im/cat.jpg", "im/dog.jpg"), METADATA)
    features = load_features(path)
    for key in ("dog.jpg", "other/dog.jpg", "im/dgo.jpg"):
        for chosen in (features, features[:]):
            assert key not in chosen
            with pytest.raises(KeyError, match=r"2 images. Did you mean 'im/dog.jpg'\?"):
                chosen[key]
    with pytest.raises(KeyError, match=r"2 images, such as 'im/cat\.jpg'"):
        features["bicycle"]


def test_selecting_a_missing_image_is_an_error(path: Path) -> None:
    write_features(path, features_of(*"abc"), METADATA)
    features = load_features(path)
    with pytest.raises(KeyError, match="'z' is not in"):
        features[["a", "z"]]
    with pytest.raises(IndexError, match=r"image 3 is not in .*, which contains 3 images"):
        features[[0, 3]]
    with pytest.raises(KeyError, match=r"'c' is not in a subset of .*features.safetensors"):
        features[:2]["c"]
    with pytest.raises(IndexError, match=r"image 2 is not in a subset of .*which contains 2"):
        features[:2][2]
    with pytest.raises(IndexError, match=r": the mask has 2 values\. Expected 3, one"):
        features[np.array([True, False])]
    odd: Any
    for odd in (None, 1.0, np.array([0.5]), np.zeros((1, 1), int), {"a"}):
        words = r"does not select images of .*\. Expected a position or an id"
        with pytest.raises(TypeError, match=words):
            features[odd]


def test_the_repr_is_one_line(path: Path, folder: Folder) -> None:
    """The repr must be short, because notebooks show it."""
    write_features(path, features_of(*"abc"), METADATA)
    file, export = load_features(path), load_features(folder.path)
    assert repr(file) == f"FeatureFile({str(path)!r}: 3 images)"
    assert repr(file[:2]) == f"<2 images of {file!r}>"
    assert repr(file[:1]) == f"<1 image of {file!r}>"
    assert repr(export) == f"FeatureFolder({str(folder.path)!r}: 7 images listed, 3 of 3 shards)"
    assert repr(file["b"]) == "ImageFeatures('b', embeds=(2, 6) float32, grid_thw=(1, 2, 4))"


# Folders


def test_files_folders_and_subsets_can_be_pickled(folder: Folder) -> None:
    """A data loader's workers need a pickle."""
    features = load_features(folder.path)
    for each in (features, features[1:], features[["g", "a"]], load_features(folder.shard(0))):
        other = pickle.loads(pickle.dumps(each))
        assert list(other.ids) == list(each.ids)
        assert torch.equal(other[0].embeds, each[0].embeds)


def test_a_missing_long_id_is_not_compared_with_every_id() -> None:
    """A comparison of two ids of 3,000 characters takes milliseconds."""
    for length, expected in ((100, "Did you mean 'xxx"), (3_000, "images, such as 'xxx")):
        names = [f"{'x' * length}{number}" for number in range(200)]
        assert expected in missing_name(f"{'x' * length}-", "f.safetensors", names)
