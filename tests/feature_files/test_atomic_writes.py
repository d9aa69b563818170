"""Test that a failed write leaves the old file and no other file."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qwen_vit.common.atomic_file import AtomicFile
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.feature_files import write as write_module
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.schema import ItemFacts
from qwen_vit.feature_files.write import write_features
from qwen_vit.feature_files.writer import FeatureWriter, RowTensor
from qwen_vit.features import ImageFeatures
from qwen_vit.integrations.vllm.ec_cache import read_ec_cache, write_ec_cache
from tests.support.features import METADATA, features_of
from tests.support.reading_stress import Folder


class FaultError(Exception):
    """Represent an unexpected error."""


def fail_after_header(error: BaseException) -> Callable[[torch.Tensor], Any]:
    """Write a header, and then raise an error instead of rows."""

    def bytes_of(tensor: torch.Tensor) -> Any:
        raise error

    return bytes_of


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
        monkeypatch.setattr(write_module, "bytes_of", fail_after_header(error))
    else:
        monkeypatch.setattr(os, step, fail)
    expected = ExportError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_features(path, features_of("new"), METADATA, overwrite=True)
    monkeypatch.undo()
    if expected is ExportError:
        assert str(path) in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "disk" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def small_writer(path: Path, head_bytes: int = 4096) -> FeatureWriter:
    return FeatureWriter(path, [RowTensor("image_embeds", 6, torch.float32)], head_bytes)


def add(writer: FeatureWriter, rows: torch.Tensor, **n_rows: int) -> None:
    """Append images with these numbers of merged rows, by name."""
    items = [ItemFacts(name, (1, 2, 2 * count), count) for name, count in n_rows.items()]
    writer.add({"image_embeds": rows}, items)


@pytest.mark.parametrize("shape", [(3, 5), (3, 7), (2, 6), (6,), (1, 3, 6), ()])
def test_rows_of_another_width_are_refused_by_a_growing_file(
    path: Path, shape: tuple[int, ...]
) -> None:
    """A fault once wrote such rows, and the file's header declared other bytes."""
    with small_writer(path) as writer:
        add(writer, torch.ones(1, 6), a=1)
        with pytest.raises(ExportError, match=r"2 images from b on have .* Expected \(3, 6\)\."):
            add(writer, torch.ones(shape), b=1, c=2)
        add(writer, torch.ones(3, 6), d=2, e=1)
        writer.save({**METADATA, "output": "merged"})
    file = load_features(path)
    assert file.ids == ["a", "d", "e"]
    assert [len(features.embeds) for features in file] == [1, 2, 1]


@pytest.mark.parametrize("head_bytes", [8, 4096])
def test_a_disk_that_fills_up_at_the_header_is_named(
    path: Path, head_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows may still be in a buffer, which a seek writes."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with small_writer(path, head_bytes) as writer:
        add(writer, torch.ones(1, 6), a=1)
        atomic = writer._growing[0].atomic
        monkeypatch.setattr(atomic, "file", Mock(wraps=atomic.file, seek=full))
        with pytest.raises(ExportError, match=r"features.safetensors: could not be .*No space"):
            writer.save(METADATA)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "named", "words"),
    [
        ("missing/f.safetensors", "missing", "does not exist. Create the folder first."),
        ("file/f.safetensors", "file", "not a folder. Create the folder first."),
        ("n" * 256, "n" * 256, "could not be written"),
    ],
)
def test_an_unwritable_path_is_named(tmp_path: Path, where: str, named: str, words: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match=words) as caught:
        write_features(tmp_path / where, features_of("a"), METADATA)
    assert str(tmp_path / named) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_two_threads_that_write_one_file_leave_a_complete_file(path: Path) -> None:
    choices = [features_of(f"{i}", width=64) for i in range(4)]
    threads = [
        threading.Thread(
            target=write_features, args=(path, c, METADATA), kwargs={"overwrite": True}
        )
        for c in choices
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_features(path).ids in [["0"], ["1"], ["2"], ["3"]]
    assert list(path.parent.iterdir()) == [path]


def test_an_existing_file_is_kept_by_default(path: Path) -> None:
    """By default, `write_features` once replaced the file."""
    path.write_text("of another")
    with pytest.raises(ExportError, match=r"already exists\. .*overwrite=True") as caught:
        write_features(path, features_of("a"), METADATA)
    assert "--overwrite" in caught.value.text(in_shell=True)
    assert path.read_text() == "of another"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_appears_during_the_write_is_kept(path: Path) -> None:
    """Two commands once checked for the file, and the second result replaced the first result."""
    growing = AtomicFile(path, overwrite=False)
    path.write_text("of another")
    with pytest.raises(ExportError, match="already exists"):
        growing.commit()
    assert path.read_text() == "of another"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_not_a_file_to_write(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(ExportError, match=r": a folder\. Expected a file"):
        write_features(tmp_path, features_of("a"), METADATA, overwrite=overwrite)


def test_a_disk_without_hard_links_gets_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links")))
    path, features = tmp_path / "a.safetensors", [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))]
    write_features(path, features, METADATA)
    assert load_features(path).ids == ["a"]
    path.unlink()
    growing = AtomicFile(path, overwrite=False)
    path.write_text("of another")  # a rename would replace this file
    with pytest.raises(ExportError, match=r"a.safetensors: already exists"):
        growing.commit()
    assert path.read_text() == "of another"


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(ExportError, match=r"link: a symbolic link\. .*target"):
        write_features(link, [ImageFeatures("a", torch.ones(1, 4), (1, 2, 2))], METADATA)
    assert link.is_symlink()
    assert not (tmp_path / "target").exists()


def test_a_result_replaces_no_file_of_an_export(folder: Folder) -> None:
    """A table once replaced the manifest, and a feature file export.json."""
    stored = load_features(folder.path)
    (folder.path / "manifest.parquet").write_bytes(b"manifest")
    (folder.path / "manifest.jsonl").write_bytes(b"manifest")
    names = sorted(os.listdir(folder.path))
    assert {"export.json", "listing.jsonl", "shard-00000000.safetensors"} < set(names)
    before = [(folder.path / name).read_bytes() for name in names]
    for name in [*names, "listing-0001.jsonl", "segment-00000003-00000001.safetensors"]:
        path = folder.path / name
        with pytest.raises(ExportError, match=f"{name}: the name of a file of the export in this"):
            stored.to_parquet(path, overwrite=True)
        with pytest.raises(ExportError, match=f"{name}: the name of a file of the export in this"):
            write_features(path, stored[0], METADATA, overwrite=True)
    assert sorted(os.listdir(folder.path)) == names
    assert [(folder.path / name).read_bytes() for name in names] == before
    stored.to_parquet(folder.path / "table.parquet")
    (folder.path / "export.json").unlink()  # the shards can restore it
    with pytest.raises(ExportError, match=r"shard-\d+\.safetensors: the name of a file"):
        write_features(folder.path / names[-1], stored[0], METADATA, overwrite=True)


@pytest.mark.parametrize("address", ["s3://bucket/f", "gs://bucket/f", "https://host/f"])
def test_an_address_is_not_a_file_to_write(folder: Folder, address: str) -> None:
    stored = load_features(folder.path)
    words = rf"{address}: path is an address\. Expected the file to write, on this machine\."
    with pytest.raises(ArgumentError, match=words):
        stored.to_parquet(address)
    with pytest.raises(ArgumentError, match=words):
        write_features(address, stored[0], METADATA)
    for call in (
        lambda: load_features("s3://bucket/f", cache_dir=address),
        lambda: stored.to_datasets(cache_dir=address),
        lambda: VisionEncoder.from_pretrained("tiny", cache_dir=address),
        lambda: write_ec_cache([stored[0]], address, METADATA),
        lambda: read_ec_cache(address),
    ):
        with pytest.raises(ArgumentError, match=rf"{address}: \w+ is an address"):
            call()


def test_a_path_that_ends_in_a_slash_is_not_a_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"new/: path names a folder\. Expected the file"):
        write_features(f"{tmp_path}/new/", features_of("a"), METADATA)
    assert not list(tmp_path.iterdir())


def test_an_address_of_the_web_is_not_a_file_to_read() -> None:
    with pytest.raises(ArgumentError, match="https://host/f: not an address in object storage"):
        load_features("https://host/f")


def test_the_suffix_of_another_format_is_refused(folder: Folder, tmp_path: Path) -> None:
    stored = load_features(folder.path)
    for name in ("a.npy", "a.PT", "a.parquet", "a.csv"):
        with pytest.raises(ExportError, match=rf"its suffix is .*Pass {tmp_path}/a\.safetensors"):
            write_features(tmp_path / name, stored[0], METADATA)
    for name in ("t.csv", "t.safetensors"):
        with pytest.raises(ExportError, match=rf"its suffix is .*Pass {tmp_path}/t\.parquet"):
            stored.to_parquet(tmp_path / name)
    assert not list(tmp_path.glob("[at].*"))
    for name in ("run-0.5", "plain", "a.safetensors"):
        assert write_features(tmp_path / name, stored[0], METADATA).exists()
