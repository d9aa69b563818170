"""Test that the next run finds an image that killed the process, and loses only this image."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ImageError
from qwen_vit.export import shards as shards_module
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.export.under_way import UNDER_WAY_NAME, UnderWay
from qwen_vit.feature_files.read import load_features
from qwen_vit.images.image import ImageLimits
from qwen_vit.loading import ImageLoader
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder

OPTIONS = ExportOptions(shard_size=4)


@pytest.fixture
def export_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(10):
        Path(f"p/{number}.png").write_bytes(tiny_png(number))
    return tmp_path


def export(**options: Any) -> Any:
    return export_features(FakeEncoder(), ("p",), "out", OPTIONS, decode_threads=2, **options)


def killed_by(name: str) -> None:
    """Run an export whose process is killed while it decodes an image."""
    real = ImageLoader.load

    def load(self: ImageLoader, image: Any, called: str) -> Any:
        if called == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, image, called)

    ImageLoader.load = load  # type: ignore[method-assign, assignment]
    export()
    sys.exit(0)


def run_until_killed(name: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_by, args=(name,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def notes() -> list[str]:
    return [name for name in os.listdir("out") if UNDER_WAY_NAME.fullmatch(name)]


@pytest.mark.usefixtures("export_dir")
def test_an_export_skips_the_image_that_killed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run_until_killed("6.png")
    assert len(notes()) == 1
    asked = []

    def dies(data: bytes, name: str, limits: ImageLimits, page: int | None = None) -> Any:
        asked.append(name)
        if name == "6.png":
            raise ImageError("its process died", name=name, code="memory")

    monkeypatch.setattr(shards_module, "decode_in_child", dies)
    done = export()
    assert (done.exported, dict(done.failed)) == (9, {"memory": 1})
    assert "6.png" in asked
    assert len(asked) <= 2  # at most one image for each thread
    assert [error.id for error in load_features("out").errors] == ["6.png"]
    assert notes() == []


@pytest.mark.usefixtures("export_dir")
def test_an_image_that_did_not_cause_the_kill_is_exported() -> None:
    run_until_killed("6.png")
    done = export()
    assert (done.exported, dict(done.failed)) == (10, {})


def test_the_records_of_a_running_process_remain(tmp_path: Path) -> None:
    with UnderWay(tmp_path) as first, first.mark(7):
        assert UnderWay(tmp_path).suspects == frozenset()
        assert first.path.exists()


def test_a_torn_record_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "under-way-0123456789abcdef").write_bytes(b"\x08" + bytes(7) + b"\1\2\3")
    with UnderWay(tmp_path) as under_way:
        assert under_way.suspects == {7}
    assert list(tmp_path.iterdir()) == []


def test_an_export_on_a_full_disk_has_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with UnderWay(tmp_path) as under_way, under_way.mark(3):
        pass
    assert list(tmp_path.iterdir()) == []
