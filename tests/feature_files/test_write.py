"""Test that readers return the written types, names and bytes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import UNKNOWN_SIZE, ImageFeatures
from tests.support.feature_file_cases import failed
from tests.support.features import METADATA, ODD_IDS, features_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_features_are_read_unchanged(path: Path, dtype: torch.dtype) -> None:
    written = features_of("a.jpg", "b/c.png", "d", dtype=dtype)
    assert write_features(path, written, METADATA) == path
    read = load_features(path)
    assert isinstance(read, FeatureFile)
    assert len(read) == 3
    assert read.ids == ["a.jpg", "b/c.png", "d"]
    assert read.metadata["model"] == "tiny"
    assert read.metadata["schema_version"] == 2
    assert read.image_grid_thw.dtype == torch.int64
    for there, then in zip(read, written, strict=True):
        assert there.id == then.id
        assert there.grid_thw == then.grid_thw
        assert there.embeds.dtype == dtype
        assert torch.equal(there.embeds, then.embeds)


def test_features_of_two_dtypes_are_stored_in_the_wider_dtype(path: Path) -> None:
    narrow, wide = features_of("a", dtype=torch.bfloat16), features_of("b")
    write_features(path, [*narrow, *wide], METADATA)
    for there, then in zip(load_features(path), [*narrow, *wide], strict=True):
        assert there.embeds.dtype == torch.float32
        assert torch.equal(there.embeds, then.embeds.float())


def test_the_file_has_the_three_documented_tensors(path: Path) -> None:
    written = features_of("a", "b", "c")
    write_features(path, [written[0], failed("x"), *written[1:]], METADATA)
    tensors = load_file(path)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "image_embeds": (torch.float32, (6, 6)),
        "image_grid_thw": (torch.int64, (3, 3)),
        "image_token_offsets": (torch.int64, (4,)),
    }
    assert tensors["image_token_offsets"].tolist() == [0, 1, 3, 6]
    assert tensors["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4], [1, 2, 6]]
    assert load_features(path).ids == ["a", "b", "c"]  # without the failed image


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes several metadata keys in random order, but one key of sorted JSON has
    fixed bytes."""
    texts = set()
    for attempt in range(4):
        shuffled = dict(sorted(METADATA.items(), reverse=attempt % 2 == 0))
        file = write_features(tmp_path / f"{attempt}", features_of("a", "b"), shuffled)
        texts.add(file.read_bytes())
    assert len(texts) == 1


def test_unusual_ids_are_read_unchanged(path: Path) -> None:
    ids = list(ODD_IDS.values())
    write_features(path, features_of(*ids), METADATA)
    read = load_features(path)
    assert read.ids == ids
    for index, name in enumerate(ids):
        assert len(read[name].embeds) == index + 1
    assert os.fsencode(read.ids[2]) == b"caf\xe9\xff.jpg"


@pytest.mark.parametrize("name", ["n" * 255, "--out", "два\nlines"])
def test_a_file_may_have_any_name_the_system_allows(tmp_path: Path, name: str) -> None:
    path = write_features(tmp_path / name, features_of("a"), METADATA)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert load_features(path).ids == ["a"]


def test_the_permissions_of_a_file_follow_the_umask(path: Path) -> None:
    """safetensors makes files that only their owner can read, for every umask."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write_features(path, features_of("a"), METADATA, overwrite=True)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


# Atomic


def test_a_subset_of_a_shard_has_no_data_of_other_images(tmp_path: Path) -> None:
    """A subset once had the sizes of other images, or was an unreadable file."""
    images = [{"size_px": [number, 1], "notes": []} for number in range(3)]
    metadata = {**METADATA, "images": images, "errors": [{"id": "z"}], "ids": ["a", "b", "c"]}
    chosen = [ImageFeatures(name, torch.ones(1, 4), (1, 2, 2)) for name in ("c", "a")]
    again = load_features(write_features(tmp_path / "a.safetensors", chosen, metadata))
    assert (list(again.ids), again[0].size_px, list(again.errors)) == (["c", "a"], UNKNOWN_SIZE, [])


def test_means_of_images_of_any_size_go_into_one_file(tmp_path: Path) -> None:
    means = [
        ImageFeatures(name, torch.ones(1, 4), grid)
        for name, grid in (("a", (1, 2, 2)), ("b", (1, 4, 6)))
    ]
    metadata = {**METADATA, "output": "mean"}
    again = load_features(write_features(tmp_path / "a.safetensors", means, metadata))
    assert again["b"].grid_thw == (1, 4, 6)
    assert again.metadata["patches_per_row"] is None


def test_a_grid_may_be_a_list(tmp_path: Path) -> None:
    features = [ImageFeatures("a", torch.ones(1, 4), [1, 2, 2])]  # type: ignore[arg-type]
    again = load_features(write_features(tmp_path / "a.safetensors", features, METADATA))
    assert again["a"].grid_thw == (1, 2, 2)


def test_features_may_come_from_a_stream(tmp_path: Path) -> None:
    stream = (ImageFeatures(name, torch.ones(1, 4), (1, 2, 2)) for name in "ab")
    assert len(load_features(write_features(tmp_path / "a.safetensors", stream, METADATA))) == 2
    with pytest.raises(ExportError, match="2 images failed"):
        write_features(tmp_path / "b.safetensors", (failed(name) for name in "ab"), METADATA)


@pytest.mark.parametrize(
    ("given", "text"), [(None, "None"), (3, r"3 \(int\)"), ("", "''"), (b"a", r"b'a' \(bytes\)")]
)
def test_other_values_than_a_path_are_refused(path: Path, given: Any, text: str) -> None:
    """`write_features` and `to_parquet` once gave a TypeError that named no argument."""
    stored = load_features(write_features(path, features_of("a"), METADATA))
    calls = load_features, lambda path: write_features(path, stored, {}), stored.to_parquet
    for call in calls:
        with pytest.raises(ArgumentError, match=rf"path is {text}\. Expected the"):
            call(given)
