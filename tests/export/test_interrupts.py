"""Test that an interrupted export saves encoded images, and resumes to the same bytes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import batching
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export import shards as shards_module
from qwen_vit.export.folder import LocalFolder
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import open_export
from qwen_vit.export.progress import Progress
from qwen_vit.export.run import export_features
from qwen_vit.export.segments import count_kept, find_segments
from qwen_vit.export.shard_writer import ShardWriter
from qwen_vit.export.shards import export_shards
from qwen_vit.feature_files.read import load_features
from tests.support import fake_encoder
from tests.support.exports import files
from tests.support.fake_encoder import BatchedEncoder, FakeEncoder
from tests.support.interrupted_exports import Stop, segments

OPTIONS = ExportOptions(shard_size=40)


def export(
    out: str = "out", *, encoder: Any = None, options: ExportOptions = OPTIONS, **more: Any
) -> Any:
    return export_features(encoder or FakeEncoder(), ["p"], out, options, **more)


@pytest.mark.parametrize("after", [0, 1, 2, 33, 40, 41, 42, 75, 100, 102])
@pytest.mark.parametrize("layers", [(), (1, 3)])
def test_a_stopped_export_encodes_no_image_twice(
    hundred_images: Path, after: int, layers: tuple[int, ...]
) -> None:
    options = ExportOptions(shard_size=40, layers=layers)
    whole = export("whole", options=options)
    encoder = FakeEncoder()
    with pytest.raises(KeyboardInterrupt):
        export(encoder=encoder, options=options, stop=Stop(after))
    assert not [name for name in files() if name.endswith((".tmp", "lock"))]
    kept = count_kept(Path("out"))
    # the encoder was collecting a batch of 32
    assert encoder.encoded == kept
    done = export(encoder=encoder, options=options)
    assert encoder.encoded == whole.exported
    assert files() == files("whole")
    assert (done.exported, done.failed) == (whole.exported, whole.failed)
    assert done.resumed >= kept


@pytest.mark.parametrize("after", [43, 55, 78])
def test_an_interrupt_saves_images_encoded_during_a_save(
    hundred_images: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export("whole")
    monkeypatch.setitem(shards_module.AHEAD_BYTES, "cpu", 2**20)
    monkeypatch.setattr(fake_encoder, "BATCH", 1)
    encoder, save, stop = FakeEncoder(), ShardWriter.save, Stop(after)

    def slow_save(self: ShardWriter) -> None:
        end = time.monotonic() + 30
        while stop.left >= 0 and self.number == 0 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        save(self)

    monkeypatch.setattr(ShardWriter, "save", slow_save)
    with pytest.raises(KeyboardInterrupt):
        export(encoder=encoder, stop=stop)
    assert encoder.encoded == count_kept(Path("out")) > 37
    export(encoder=encoder)
    assert encoder.encoded == whole.exported
    assert files() == files("whole")


def test_a_report_counts_the_failures_of_this_run(hundred_images: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(stop=Stop(38))
    assert segments() == ["segment-00000000-00000000.safetensors"]
    done = export()
    assert (sum(done.failed.values()), done.failed_earlier, done.resumed) == (8, 3, 35)


def pictures() -> None:
    """Make images of three sizes, so that batches of 60 patches contain one or two images."""
    for number, name in enumerate(sorted(os.listdir("p"))[:12]):
        size = ((56, 56), (56, 84), (84, 84))[number % 3]
        values = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(values).save(f"p/{name}")
    for name in sorted(os.listdir("p"))[12:]:
        Path("p", name).unlink()
    Path("p/004.png").write_bytes(b"broken")


@pytest.mark.parametrize("at", range(12))
def test_on_a_cpu_an_interrupt_keeps_complete_batches(
    hundred_images: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, bits depend on the batch, so an interrupt must not divide a batch."""
    pictures()
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 60)
    encoder, count = BatchedEncoder(), Progress.count
    export("whole", encoder=encoder)
    expected, encoder.batches = encoder.batches, []
    assert {*expected} == {1, 2}

    def interrupted(self: Any, features: Any) -> None:
        if features.id == f"{at:03}.png":
            raise KeyboardInterrupt
        count(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(encoder=encoder)
    kept = 0
    for name in segments():
        kept = len(load_features(f"out/{name}").metadata["ids"])
    encoder.batches = []
    export(encoder=encoder)
    assert files() == files("whole")
    # the second run repeats the interrupted batch, and encodes the following batches
    done = len(expected) - len(encoder.batches)
    assert encoder.batches == expected[done:]
    assert sum(expected[:done]) == kept


@pytest.mark.parametrize("is_gpu", [False, True])
def test_segments_are_saved_regularly_and_survive_a_kill(
    hundred_images: Path, is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, a segment ends after any group. On a CPU, it ends between batches."""
    if is_gpu:
        real = ShardWriter
        monkeypatch.setattr(shards_module, "GROUP_IMAGES", 7)
        groups = shards_module._in_groups
        monkeypatch.setattr(
            shards_module, "_in_groups", lambda encoded, _: groups(encoded, torch.device("cuda"))
        )
        monkeypatch.setattr(
            shards_module, "ShardWriter",
            lambda *given, bits_depend_on_batch: real(*given, bits_depend_on_batch=False),
        )  # fmt: skip
    monkeypatch.setattr("tests.support.fake_encoder.BATCH", 4)
    often = ExportOptions(shard_size=40, shard_seconds=1e-9)
    whole = export("whole")

    class Killed(BaseException):
        """Simulate SIGKILL, which our handlers cannot catch."""

    def kill(self: Any, features: Any) -> None:
        if features.id == "033.png":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", kill)
        with pytest.raises(Killed):
            export(options=often)
    assert len(segments()) >= 3
    kept = count_kept(Path("out"))
    assert kept >= 20
    encoder = FakeEncoder()
    done = export(encoder=encoder, options=often)
    assert encoder.encoded == whole.exported - kept
    assert files() == files("whole")
    assert done.resumed >= kept


def interrupted_at(after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(stop=Stop(after))


@pytest.mark.parametrize("times", [2, 5])
def test_repeated_interrupts_of_a_shard_keep_all_segments(hundred_images: Path, times: int) -> None:
    encoder = FakeEncoder()
    for _ in range(times):
        with pytest.raises(KeyboardInterrupt):
            export(encoder=encoder, options=ExportOptions(shard_size=200), stop=Stop(16))
    assert len(segments()) <= times
    export(encoder=encoder, options=ExportOptions(shard_size=200))
    assert encoder.encoded == 92
    export("one", options=ExportOptions(shard_size=200))
    assert files() == files("one")


def test_a_torn_segment_is_encoded_again(
    hundred_images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export("whole")
    interrupted_at(38)
    [name] = segments()
    path = Path("out", name)
    path.write_bytes(path.read_bytes()[:-1])
    encoder = FakeEncoder()
    export(encoder=encoder)
    assert f"{name}: truncated" in caplog.text
    assert "Its images are encoded again." in caplog.text
    assert encoder.encoded == 92
    assert files() == files("whole")


def test_segments_after_a_gap_remain(hundred_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.fake_encoder.BATCH", 4)
    export("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", raise_at("033.png", OSError("as a kill")))
        with pytest.raises(OSError, match="as a kill"):
            export(options=ExportOptions(shard_size=40, shard_seconds=1e-9))
    first, second, *_ = segments()
    Path("out", second).unlink()
    encoder = FakeEncoder()
    export(encoder=encoder)
    assert encoder.encoded == 92 - count_of(first)
    assert files() == files("whole")


def count_of(name: str) -> int:
    """Return the images of the first segment, which every export of this folder keeps."""
    return int(name.removesuffix(".safetensors").rpartition("-")[2]) or 4


def raise_at(name: str, error: BaseException) -> Callable[[Any, Any], None]:
    def count(self: Any, features: Any) -> None:
        if features.id == name:
            raise error

    return count


def test_damaged_rows_of_a_segment_are_named(hundred_images: Path) -> None:
    interrupted_at(38)
    [name] = segments()
    path = Path("out", name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ExportError, match=rf"{name}: the rows of '\d+.png' changed after they were .* Delete"
    ):
        export()
    path.unlink()
    export()
    export("whole")
    assert files() == files("whole")


def test_changed_settings_are_an_error_if_a_segment_exists(hundred_images: Path) -> None:
    interrupted_at(38)
    before = files()
    with pytest.raises(ExportError, match="output was merged, is mean now"):
        export(options=ExportOptions("mean", shard_size=40))
    assert files() == before


def test_segments_of_complete_shards_are_removed(hundred_images: Path) -> None:
    interrupted_at(38)
    [name] = segments()
    data = Path("out", name).read_bytes()
    export()
    Path("out", name).write_bytes(data)  # as if a kill came before the removal of the segments
    export()
    assert segments() == []


def test_a_folder_with_segments_is_incomplete(hundred_images: Path) -> None:
    interrupted_at(78)
    read = load_features("out")
    assert not read.is_complete
    assert len(read) == 37
    assert find_segments(LocalFolder(Path("out"))) == {1: [0]}


def test_parts_keep_their_own_segments(
    hundred_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.fake_encoder.BATCH", 2)
    export("whole", options=ExportOptions(shard_size=10))
    for number in (1, 2):
        options = ExportOptions(shard_size=10, part=(number, 2))
        with pytest.raises(KeyboardInterrupt):
            export(options=options, stop=Stop(17))
    assert len(segments()) == 2
    for number in (2, 1):
        export(options=ExportOptions(shard_size=10, part=(number, 2)))
    assert files() == files("whole")


@pytest.mark.parametrize("error", [OSError("lost"), ExportError("no space"), MemoryError()])
def test_other_errors_keep_only_complete_shards(
    hundred_images: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "count", raise_at("050.png", error))
    with pytest.raises(type(error)):
        export()
    assert segments() == []


def test_a_full_disk_does_not_hide_an_interrupt(
    hundred_images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise ExportError("could not be written (No space left on device)", name="segment")

    monkeypatch.setattr(ShardWriter, "close_segment", full)
    interrupted_at(38)
    assert "segment: could not be written (No space left" in caplog.text
    assert segments() == []


@pytest.mark.parametrize("seconds", [0, -1, True, "5", float("nan")])
def test_an_invalid_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ArgumentError, match=r"shard_seconds is .* Expected a number above 0"):
        ExportOptions(shard_seconds=seconds)


def test_a_worker_of_a_cluster_continues_a_segment(hundred_images: Path) -> None:
    export("whole")
    interrupted_at(38)
    encoder = FakeEncoder()
    with open_export(encoder, ["p"], Path("out"), OPTIONS) as plan:
        [done] = export_shards(encoder, plan, [0])
    assert (done.n_kept, len(done.rows)) == (35, 40)
    assert files()["shard-00000000.safetensors"] == files("whole")["shard-00000000.safetensors"]
