"""Feature files: written whole or not at all, read lazily, and every damage is named."""

import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit import features as features_module
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.features import METADATA_KEY, ImageFeatures, load_features, write_features

METADATA = {"model": "tiny", "commit": None, "dtype": "float32"}


def features_of(
    *names: str, dtype: torch.dtype = torch.float32, width: int = 6
) -> list[ImageFeatures]:
    """Images of 1, 2, 3, ... tokens, each with its own values."""
    made = []
    for index, name in enumerate(names, start=1):
        values = torch.randn(index, width, generator=torch.Generator().manual_seed(index))
        made.append(ImageFeatures(name, values.to(dtype), (1, 2, 2 * index)))
    return made


def failed(name: str) -> ImageFeatures:
    return ImageFeatures(name, None, None, error=ImageError(f"{name} ends early", code="truncated"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_back(path: Path, dtype: torch.dtype) -> None:
    written = features_of("a.jpg", "b/c.png", "d", dtype=dtype)
    assert write_features(path, written, METADATA) == path
    read = load_features(path)
    assert len(read) == 3
    assert read.ids == ["a.jpg", "b/c.png", "d"]
    assert read.metadata["model"] == "tiny"
    assert read.metadata["schema_version"] == 1
    assert read.image_grid_thw.dtype == torch.int64
    for there, then in zip(read, written, strict=True):
        assert there.id == then.id
        assert there.grid_thw == then.grid_thw
        assert there.embeds is not None
        assert there.embeds.dtype == dtype
        assert torch.equal(there.embeds, then.embeds)


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
    assert load_features(path).ids == ["a", "b", "c"]  # the failed one is left out


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    """safetensors writes several metadata keys in random order; one key of sorted JSON repeats."""
    texts = set()
    for attempt in range(4):
        shuffled = dict(sorted(METADATA.items(), reverse=attempt % 2 == 0))
        file = write_features(tmp_path / f"{attempt}", features_of("a", "b"), shuffled)
        texts.add(file.read_bytes())
    assert len(texts) == 1


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


ODD_IDS = {
    "unicode": "фото/猫 🐈.jpg",
    "newline": "two\nlines\r\t.jpg",
    "bytes": os.fsdecode(b"caf\xe9\xff.jpg"),  # surrogates: not a Unicode name at all
    "255 bytes": "n" * 251 + ".jpg",
    "leading dash": "--out",
    "quotes": '"\\',
    "nul and delete": "a\x00b\x7f",
    "empty": "",
}


def test_odd_ids_come_back_as_they_were(path: Path) -> None:
    ids = list(ODD_IDS.values())
    write_features(path, features_of(*ids), METADATA)
    read = load_features(path)
    assert read.ids == ids
    for index, name in enumerate(ids):
        found = read[name].embeds
        assert found is not None
        assert len(found) == index + 1
    assert os.fsencode(read.ids[2]) == b"caf\xe9\xff.jpg"


@pytest.mark.parametrize("name", ["n" * 255, "--out", "два\nlines"])
def test_a_file_may_have_any_name_the_system_allows(tmp_path: Path, name: str) -> None:
    path = write_features(tmp_path / name, features_of("a"), METADATA)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert load_features(path).ids == ["a"]


def test_others_may_read_the_file_as_the_umask_says(path: Path) -> None:
    """safetensors makes files that only their owner can read, whatever the umask."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            write_features(path, features_of("a"), METADATA)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


# Refusals before anything is written


NAN = ImageFeatures("bad.jpg", torch.tensor([[1.0, float("nan")]]), (1, 2, 2))
INFINITE = ImageFeatures("bad.jpg", torch.tensor([[float("-inf"), 1.0]]), (1, 2, 2))
REFUSED = {
    "duplicate ids": (features_of("a", "b", "a"), METADATA, ("'a'", "give each one its own")),
    "NaN": ([NAN], METADATA, ("'bad.jpg'", "NaN or infinity", "float32")),
    "infinity": (
        [*features_of("a", width=2), INFINITE],
        METADATA,
        ("'bad.jpg' (1 of 2", "NaN or infinity"),
    ),
    "all failed": ([failed("a"), failed("b")], METADATA, ("no image", "2 failed")),
    "nothing": ([], METADATA, ("no image",)),
    "two widths": (
        [*features_of("a"), *features_of("b", width=4)],
        METADATA,
        ("(n, 4), (n, 6)", "one file for each"),
    ),
    "NaN in the metadata": (features_of("a"), {"x": float("nan")}, ("cannot be JSON",)),
    "no JSON": (features_of("a"), {"x": object}, ("cannot be JSON", "metadata()")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_no_good_file_is_refused_and_nothing_is_touched(
    path: Path, reason: str
) -> None:
    write_features(path, features_of("old"), METADATA)
    before = path.read_bytes()
    features, metadata, words = REFUSED[reason]
    with pytest.raises(ExportError) as caught:
        write_features(path, features, metadata)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Atomic


class FaultError(Exception):
    """Stands for what the package does not expect."""


def half_then(error: BaseException) -> Callable[..., None]:
    """A save_file that writes half a file, and then fails."""

    def save(tensors: Any, name: Any, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    return save


FAULTS = [
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
    FaultError(),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["save", "replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    path: Path, error: BaseException, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_features(path, features_of("old"), METADATA)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error

    if step == "save":
        monkeypatch.setattr(features_module, "save_file", half_then(error))
    else:
        monkeypatch.setattr(features_module.os, step, fail)
    expected = ExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_features(path, features_of("new"), METADATA)
    monkeypatch.undo()
    if expected is ExportError:
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "disk" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/f.safetensors", "file/f.safetensors", "n" * 256])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match="could not be written") as caught:
        write_features(tmp_path / where, features_of("a"), METADATA)
    assert str(tmp_path / where) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_two_threads_that_write_one_file_leave_one_whole_file(path: Path) -> None:
    choices = [features_of(f"{i}", width=64) for i in range(4)]
    threads = [threading.Thread(target=write_features, args=(path, c, METADATA)) for c in choices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_features(path).ids in [["0"], ["1"], ["2"], ["3"]]
    assert list(path.parent.iterdir()) == [path]


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


def test_merged_and_patch_features_do_not_share_a_file(tmp_path: Path) -> None:
    merged = ImageFeatures("a.jpg", torch.zeros(4, 8), (1, 4, 4))
    patch = ImageFeatures("b.jpg", torch.zeros(16, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r"4 patches per row and .b\.jpg. has 1"):
        write_features(tmp_path / "f.safetensors", [merged, patch], {})
    for features, expected in ((merged, 4), (patch, 1)):
        path = write_features(tmp_path / f"{expected}.safetensors", [features], {})
        assert load_features(path).metadata["patches_per_row"] == expected


def test_rows_that_do_not_fit_their_grid_are_refused(tmp_path: Path) -> None:
    wrong = ImageFeatures("a.jpg", torch.zeros(5, 8), (1, 4, 4))
    with pytest.raises(ExportError, match=r".a\.jpg. has 5 rows for a grid of"):
        write_features(tmp_path / "f.safetensors", [wrong], {})
