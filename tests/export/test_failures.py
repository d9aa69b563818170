"""Test exports with failing images and disks: rows for errors, no NaN, and the circuit breaker."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qwen_vit import loading
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.export import shards as shards_module
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.progress import Progress
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.writer import FeatureWriter
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.load import load_image
from tests.support import export_stress
from tests.support.export_stress import tiny_png, write_hostile
from tests.support.exports import SMALL, export, files, make_shard, plan_of, shards
from tests.support.fake_encoder import FakeEncoder

# Failures


def test_every_kind_of_damage_has_an_error_row(tmp_path: Path) -> None:
    figures = export_stress.hostile(tmp_path, bad=30, good=60)
    assert sum(figures["by_code"].values()) == 30


def corrupt_image(name: str, kind: str) -> None:
    path = Path("p", name)
    path.unlink(missing_ok=True)
    write_hostile(path, kind)


@pytest.mark.parametrize("kind", export_stress.HOSTILE)
def test_a_hostile_image_is_reported_under_its_id(export_dir: Path, kind: str) -> None:
    corrupt_image("5.png", kind)
    done = export()
    assert done.failed == {export_stress.HOSTILE[kind]: 1} | (
        {"truncated": 1} if kind != "cut" else {"truncated": 2}
    )
    error = load_features("out").errors[0]
    assert error.id == "5.png"
    assert "5.png" in error.message
    assert "image " not in error.message.partition("5.png")[0]
    assert not any(torch.isnan(each.embeds).any() for each in load_features("out"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_nan_is_never_written(export_dir: Path, output: Any, dtype: Any) -> None:
    corrupt_image("5.png", "nan")
    done = export(options=ExportOptions(output, dtype, shard_size=4))
    assert done.failed["not-finite"] == 1
    assert all(each.embeds.isfinite().all() for each in load_features("out"))


@pytest.mark.parametrize("broken", [[], [0], [1, 2], [3], range(4), range(10)])
def test_a_group_from_a_gpu_has_the_bytes_of_single_images(
    export_dir: Path, broken: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer writes the rows of a group at once, without the rows of failed images."""
    for number in broken:
        corrupt_image(f"{number}.png", "nan")
    seen: list[tuple[str, float, str]] = []

    def count(_: Any, features: ImageFeatures | FailedImage) -> None:
        total = float(features.embeds.sum()) if isinstance(features, ImageFeatures) else 0.0
        seen.append((features.id, total, str(features.error)))

    monkeypatch.setattr(Progress, "count", count)
    one_by_one = export(out="alone")
    alone = list(seen)
    seen.clear()
    assert one_by_one.failed.get("not-finite", 0) == len(broken)
    real = shards_module._in_groups
    monkeypatch.setattr(
        shards_module, "_in_groups", lambda encoded, device: real(encoded, torch.device("cuda"))
    )
    together = export(out="together")
    assert together.failed == one_by_one.failed
    assert files("together") == files("alone")
    assert seen == alone
    assert len(seen) == 11


def test_an_image_that_exceeds_the_memory_has_an_error_row(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt_image("3.png", "memory")
    real = load_image

    def load(data: bytes, **options: Any) -> Any:
        if options["name"] == "6.png":
            raise MemoryError
        return real(data, **options)

    monkeypatch.setattr(loading, "load_image", load)
    assert export().failed == {"out-of-memory": 1, "memory": 1, "truncated": 1}
    errors = {error.id: error for error in load_features("out").errors}
    assert errors["3.png"].message == "3.png: its 4 patches do not fit into the memory of cpu"
    assert errors["3.png"].stage == "encode"
    assert errors["6.png"].message == (
        "6.png: does not fit into memory. Free some memory, or omit the image."
    )


def test_on_error_raise_stops_at_the_first_failure_and_keeps_complete_shards(
    export_dir: Path,
) -> None:
    corrupt_image("6.png", "nan")
    with pytest.raises(ImageError, match=r"6.png: its features contain NaN") as caught:
        export(options=replace(SMALL, on_error="raise"))
    assert caught.value.code == "not-finite"
    assert list(shards()) == ["shard-00000000.safetensors"]
    Path("p/x.png").unlink()
    corrupt_image("6.png", "cut")
    Path("p/6.png").write_bytes(tiny_png(6))
    Path("p/x.png").write_bytes(tiny_png(1))
    assert export(options=replace(SMALL, on_error="raise")).exported == 11


@pytest.mark.parametrize("kind", ["gone", "nan", "memory"])
def test_many_consecutive_failures_stop_an_export(export_dir: Path, kind: str) -> None:
    """A lost disk or a broken model must not fill a million rows with errors."""
    for number in range(3, 9):
        corrupt_image(f"{number}.png", kind)
    limited = replace(SMALL, max_failures=6)
    with pytest.raises(
        ExportError, match=r"stopped after 6 consecutive failures; last error: .*8.png"
    ):
        export(options=limited)
    assert list(shards()) == []  # each shard has failures that stopped the run
    Path("p/9.png").write_bytes(tiny_png(9))
    assert export(options=replace(SMALL, max_failures=0)).exported == 4
    assert load_features("out").is_complete


def test_an_export_stops_reading_after_the_allowed_failures(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(item: Any, limits: Any) -> bytes:
        asked.append(item.id)
        raise ImageError(f"{item.id} does not exist", code="missing")

    for number in range(100):
        Path(f"p/{number:03}.png").touch()
    monkeypatch.setattr(shards_module, "read_item", fail)
    with pytest.raises(ExportError, match=r"after 3 consecutive failures; last error: 001.png"):
        export(options=ExportOptions(max_failures=3), decode_threads=2)
    assert len(asked) < 20  # loader threads had begun some images
    asked.clear()
    with pytest.raises(ExportError, match="stopped after 3 consecutive failures"):
        export(options=ExportOptions(max_failures=3), decode_threads=1)
    assert asked == ["0.png", "000.png", "001.png"]


def test_failures_that_are_not_consecutive_do_not_stop_an_export(export_dir: Path) -> None:
    for number in (0, 2, 4, 6, 8):
        corrupt_image(f"{number}.png", "empty" if number % 4 else "nan")
    assert export(options=replace(SMALL, max_failures=2)).exported == 5


def test_the_circuit_breaker_counts_reads_and_results() -> None:
    breaker = CircuitBreaker(3)
    error = ImageError("does not exist", name="x", remedy="check the path")
    for each in (error, error, None, error, error):
        breaker.count_read(each)
        breaker.count_done(each)
    with pytest.raises(ExportError) as stopped:
        breaker.count_read(error)
    assert str(stopped.value) == (
        "stopped after 3 consecutive failures; last error: x: does not exist. Check the path. Fix "
        "the cause and run the same command again, which tries these images again and keeps "
        "the shards before them, or allow more failures with max_failures."
    )
    CircuitBreaker(0).count_done(error)


# Resuming


def test_a_listing_that_disappears_is_an_error(export_dir: Path) -> None:
    with plan_of() as plan:
        (plan.folder / "listing.jsonl").unlink()
        with pytest.raises(ExportError, match=r"listing.jsonl: can no longer be read \(No such"):
            make_shard(FakeEncoder(), plan, 0)


# The command


def test_a_folder_with_a_shards_name_is_an_error(export_dir: Path) -> None:
    with plan_of() as plan:
        plan.path(1).mkdir()
        with pytest.raises(ExportError, match=r"00001.safetensors: a folder\. Expected a feature"):
            make_shard(FakeEncoder(), plan, 1)


def test_a_shard_that_disappears_after_its_write_is_an_error(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureWriter, "save", lambda *_: None)
    with (
        plan_of() as plan,
        pytest.raises(ExportError, match=r"disappeared or changed right after the export"),
    ):
        make_shard(FakeEncoder(), plan, 0)


def test_a_full_disk_is_an_error_and_complete_shards_remain(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test simulates a full disk at the third write of a shard."""
    export(out="whole")
    written = 0
    real = FeatureWriter.add

    def add(self: Any, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 7:
            atomic = self._growing[0].atomic
            atomic.file = Mock(wraps=atomic.file, write=full)
        real(self, *arguments)

    def full(data: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "add", add)
        with pytest.raises(ExportError, match=r"shard-00000001.* \(No space .* keeps finished"):
            export()
    assert set(files()) == {"export.json", "listing.jsonl", "shard-00000000.safetensors"}
    export()
    assert files() == files("whole")
