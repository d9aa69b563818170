"""Test that resuming skips complete shards and repeats other shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from qwen_vit.errors import ExportError
from tests.support.exports import SMALL, NeverAsked, export, files, plan_of
from tests.support.fake_encoder import FakeEncoder

# Resuming


def test_resume_skips_finished_shards(export_dir: Path) -> None:
    export()
    before = files()
    done = export(encoder=NeverAsked())
    assert (done.resumed, done.exported, done.failed) == (11, 10, {"truncated": 1})
    assert files() == before


def torn(data: bytes) -> bytes | None:
    return data[:-7]


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "torn": torn,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "no safetensors": lambda data: b"<html>" * 100,
}


@pytest.mark.parametrize("harm", HARMS)
def test_only_incomplete_shards_are_written_again(
    export_dir: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    before = files()
    path = Path("out/shard-00000001.safetensors")
    data = HARMS[harm](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    encoder = FakeEncoder()
    done = export(encoder=encoder)
    assert (encoder.encoded, done.resumed, done.exported) == (4, 7, 10)
    assert files() == before
    assert ("The export writes it again." in caplog.text) == (data is not None)


def test_an_exports_own_listing_resumes_it(export_dir: Path) -> None:
    """The input folder has changed, but the listing has the original images and the original
    failures."""
    Path("p/torn.tar").write_bytes(b"x" * 600)
    export()
    before = files()
    Path("out/shard-00000001.safetensors").unlink()
    Path("p/more.png").write_bytes(Path("p/0.png").read_bytes())
    with pytest.raises(
        ExportError, match=r"1 new, first more.png.* or inputs of None; .* pass extend=True"
    ):
        export()
    done = export("out/listing.jsonl")
    assert done.resumed == done.images - 4
    assert files() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_export_leaves_complete_shards_and_no_lock(
    export_dir: Path, error: type[BaseException]
) -> None:
    class Stopping(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                if self.encoded > 4:
                    raise error
                yield features

    export(out="whole")
    with pytest.raises(error):
        export(encoder=Stopping())
    assert set(files()) == {"export.json", "listing.jsonl", "shard-00000000.safetensors"}
    assert export().resumed == 4
    assert files() == files("whole")


def test_files_of_killed_runs_are_removed(export_dir: Path) -> None:
    export()
    before = files()
    for name in (
        ".shard-00000002.safetensors.0123456789abcdef.tmp",
        ".listing-1-of-1.tmp",
        "..listing-1-of-1.tmp.0123456789abcdef.tmp",
        ".export.json.0123456789abcdef.tmp",
        ".manifest.parquet.0123456789abcdef.tmp",
    ):
        Path("out", name).write_bytes(b"half")
    export()
    assert files() == before


def test_a_part_keeps_files_that_another_part_is_writing(export_dir: Path) -> None:
    Path("out").mkdir()
    own, other = (f".shard-0000000{i}.safetensors.0123456789abcdef.tmp" for i in (1, 0))
    export(options=replace(SMALL, part=(2, 2)))
    for name in (own, other):
        Path("out", name).write_bytes(b"half")
    export(options=replace(SMALL, part=(2, 2)))
    assert other in files()
    assert own not in files()


# The command


def test_each_part_removes_the_files_of_its_killed_runs(export_dir: Path) -> None:
    left = {
        "own shard": ".shard-00000000.safetensors.1f.tmp",
        "other shard": ".shard-00000001.safetensors.1f.tmp",
        "own listing": ".listing-1-of-2.tmp",
        "other listing": ".listing-2-of-2.tmp",
        "manifest": ".manifest.parquet.1f.tmp",
    }

    def litter() -> None:
        for name in left.values():
            Path("out", name).write_text("")

    def still_there() -> set[str]:
        return {what for what, name in left.items() if Path("out", name).exists()}

    with plan_of(options=replace(SMALL, part=(1, 2))):
        litter()
    with plan_of(options=replace(SMALL, part=(1, 2))):
        assert still_there() == {"other shard", "other listing"}
    litter()
    with plan_of():
        assert still_there() == set()


def test_images_of_earlier_runs_do_not_count_for_the_speed(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    Path("out/shard-00000001.safetensors").unlink()
    initial = []
    close = tqdm.close

    def watched(bar: Any) -> None:
        initial.append(bar.initial)
        close(bar)

    monkeypatch.setattr(tqdm, "close", watched)
    export(show_progress=True)
    assert initial[0] == 11 - 4
