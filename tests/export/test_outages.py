"""Test that an image that is temporarily missing does not remain an error."""

import os
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder

OPTIONS = ExportOptions(shard_size=4, max_failures=10)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of 20 images. The current folder has the export."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.png").write_bytes(tiny_png(number))
    return folder


def export(disk: Path, options: ExportOptions = OPTIONS, **more: Any) -> Any:
    encoder: Any = FakeEncoder()
    return export_features(encoder, [disk], "out", options, decode_threads=1, **more)


def away(disk: Path) -> Any:
    """Unmount the disk after the listing."""

    def unmount(_: object) -> None:
        disk.rename(disk.with_name("away"))
        disk.mkdir()

    return unmount


def back(disk: Path) -> None:
    disk.rmdir()
    disk.with_name("away").rename(disk)


def shards() -> set[str]:
    return {name for name in os.listdir("out") if name.startswith("shard-")}


def test_shards_with_the_failures_that_stopped_an_export_are_not_kept(disk: Path) -> None:
    with pytest.raises(ExportError, match="10 consecutive failures") as caught:
        export(disk, confirm=away(disk))
    assert "tries these images again" in caught.value.remedy
    assert shards() == set()
    back(disk)
    done = export(disk)
    assert (done.exported, dict(done.failed)) == (20, {})


def test_shards_before_the_consecutive_failures_are_kept(disk: Path) -> None:
    for number in range(6, 20):
        (disk / f"{number:02}.png").write_bytes(b"broken")
    with pytest.raises(ExportError, match="consecutive failures"):
        export(disk)
    assert shards() == {"shard-00000000.safetensors"}


def test_only_shards_with_images_that_are_back_are_written_again(disk: Path) -> None:
    patient = ExportOptions(shard_size=4, max_failures=0)
    for number in (1, 9):
        (disk / f"{number:02}.png").rename(disk.parent / f"{number:02}.png")
        (disk / f"{number:02}.png").symlink_to("nowhere")
    (disk / "17.png").write_bytes(b"broken")
    assert dict(export(disk, patient).failed) == {"missing": 2, "not-an-image": 1}
    times = {name: os.stat(f"out/{name}").st_mtime_ns for name in shards()}
    (disk / "01.png").unlink()
    (disk.parent / "01.png").rename(disk / "01.png")
    done = export(disk, patient)
    assert dict(done.failed) == {"missing": 1, "not-an-image": 1}
    made = {name for name in shards() if os.stat(f"out/{name}").st_mtime_ns != times[name]}
    assert made == {"shard-00000000.safetensors"}
    assert "01.png" in load_features("out").ids
