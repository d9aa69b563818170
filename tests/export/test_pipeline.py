"""Test that loading, encoding and writing overlap without changing a byte."""

import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from qwen_vit import loading
from qwen_vit.errors import ExportError
from qwen_vit.export import shards as shards_module
from qwen_vit.export.background import StageTimer
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.writer import FeatureWriter
from qwen_vit.images.load import load_image
from tests.support import fake_encoder
from tests.support.fake_encoder import FakeEncoder
from tests.support.pipelines import encoder, fake_export, load_threads, mixed


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, image in enumerate(mixed(count)):
        path = folder / f"{number:03}.img.png"
        if isinstance(image, bytes):
            path.write_bytes(image)
        elif isinstance(image, Path):
            path.write_bytes(image.read_bytes())
        else:
            pixels = np.asarray(image)
            Image.fromarray(pixels).save(path)


def test_an_export_has_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 14)
    options = ExportOptions(shard_size=3)
    found = []
    for threads in (1, 2, 5):
        out = tmp_path / str(threads)
        done = export_features(
            encoder(), [str(tmp_path / "images")], out, options, decode_threads=threads
        )
        assert done.images == 14
        assert sum(done.failed.values()) >= 2
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(found[0]) == 5 + 3
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_the_next_shards_images_are_loaded_while_one_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Event()  # an image of the second shard

    def watched_load(data: Any, *, name: str, **more: Any) -> Any:
        if name == "005.png":
            loaded.set()
        return load_image(data, name=name, **more)

    class Waiting(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                assert loaded.wait(30)
                yield features

    monkeypatch.setattr(loading, "load_image", watched_load)
    assert fake_export(tmp_path, Waiting(), 3, decode_threads=2).exported == 12


@pytest.mark.parametrize(
    ("ahead_bytes", "expected"), [(0, [5, 9, 12]), (600, [7, 11, 12]), (2**20, [8, 12, 12])]
)
def test_encoding_continues_up_to_a_limit_during_a_save(
    ahead_bytes: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit, a kill loses little more than the open shard. Encoding during a save keeps
    the GPU busy."""
    monkeypatch.setitem(shards_module.AHEAD_BYTES, "cpu", ahead_bytes)  # an image has 256 bytes
    monkeypatch.setattr(fake_encoder, "BATCH", 1)
    real, fake = FeatureWriter.save, FakeEncoder()
    loaded = threading.Event()
    encoded: list[int] = []

    def watched_load(*arguments: Any, **options: Any) -> Any:
        if options["name"].endswith("5.png"):  # images of the second shard
            loaded.set()
        return load_image(*arguments, **options)

    def save(self: FeatureWriter, facts: Any) -> None:
        assert loaded.wait(30)
        end = time.monotonic() + 30
        while fake.encoded < expected[len(encoded)] and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)  # enough time for an encoder without the limit to continue
        encoded.append(fake.encoded)
        real(self, facts)

    monkeypatch.setattr(FeatureWriter, "save", save)
    monkeypatch.setattr(loading, "load_image", watched_load)
    assert fake_export(tmp_path, fake, 3, decode_threads=2).exported == 12
    assert encoded == expected


def test_a_failing_disk_stops_the_encoder_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: FeatureWriter, facts: Any) -> None:
        raise ExportError("the disk is gone")

    fake = FakeEncoder()
    monkeypatch.setattr(FeatureWriter, "save", save)
    with pytest.raises(ExportError, match="the disk is gone"):
        fake_export(tmp_path, fake, 50)
    assert fake.encoded <= 8
    assert load_threads() == 0


def test_an_export_reports_its_waits(tmp_path: Path) -> None:
    class Slow(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                time.sleep(0.02)
                yield features

    begin = time.perf_counter()
    done = fake_export(tmp_path, Slow(), 4)
    elapsed = time.perf_counter() - begin
    assert list(done.waits) == ["read and decode", "encode", "copy back", "write", "rest"]
    assert max(done.waits, key=lambda stage: done.waits[stage]) == "encode"
    assert done.waits["encode"] >= 16 * 0.02
    assert sum(done.waits.values()) <= elapsed + 5 * 0.0005  # each time is rounded to milliseconds


def test_the_reported_wait_for_the_gpu_is_at_most_the_total_wait() -> None:
    """The writer thread waits for the GPU while no other thread waits for the writer."""
    clock, shard = StageTimer("rest"), Mock(waited_s=0.0)
    with clock.stage("write"):
        time.sleep(0.05)
    with shards_module._time_writer(shard, clock):
        shard.waited_s += 80.0  # the caller waits only for the end of it
    with shards_module._time_writer(shard, clock):
        time.sleep(0.02)
        shard.waited_s += 0.01
    seconds = clock.seconds()
    assert seconds["write"] >= 0.05
    assert seconds["copy back"] >= 0.01
