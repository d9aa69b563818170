"""Test the output, progress, questions and usage errors of `qwen-vit export`."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.cli import export as export_command
from qwen_vit.cli.text import estimate_text
from qwen_vit.export import estimate as estimate_module
from qwen_vit.export import progress as progress_module
from qwen_vit.export import run as export_module
from qwen_vit.export.estimate import Estimate
from qwen_vit.export.progress import Progress
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.read import read_item
from tests.support.export_stress import tiny_png
from tests.support.exports import export, shards
from tests.support.fake_encoder import FakeEncoder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, qwen_vit: Any) -> Any:
    """Run `qwen-vit export ARGUMENTS` in this process, with the fake encoder."""
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(export_module, "VisionEncoder", loader)

    def command(*arguments: str) -> tuple[int, str, str]:
        done: tuple[int, str, str] = qwen_vit("export", *arguments, "--model", "m")
        return done

    return command


def test_the_command_reports_skipped_files(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out")
    assert code == 1
    assert out.startswith("10 done, 0 to do, 1 failed: 40 rows, 0.0 MB, ")
    assert "failed: 1 truncated; --retry-failed tries them again\n" in out
    assert "manifest: out/manifest.parquet" in out
    assert err.startswith("skipped: x.png: a truncated PNG")
    assert len(err.splitlines()) == 1  # without a terminal, no progress bar
    Path("p/x.png").write_bytes(tiny_png(3))
    assert run("p", "--out", "fresh")[0] == 0


def test_a_resumed_export_counts_earlier_images(export_dir: Path, run: Any) -> None:
    """The report once read "nothing was left to do: exported 10 of 11 images (11 tried before)"."""
    run("p", "--out", "out", "--shard-size", "4")
    _, out, _ = run("p", "--out", "out", "--shard-size", "4")
    assert out.startswith("10 done, 0 to do, 1 failed earlier: 40 rows, 0.0 MB, ")
    assert "failed: 1 truncated; --retry-failed tries them again" in out
    assert "in this run" not in out
    Path("out/shard-00000002.safetensors").unlink()
    _, out, _ = run("p", "--out", "out", "--shard-size", "4", "--dry-run")
    assert out.startswith("images       8 done, 3 to do\n")
    code, out, _ = run("p", "--out", "out", "--shard-size", "4")
    assert (code, out.splitlines()[0].partition(":")[0]) == (1, "10 done, 0 to do, 1 failed")
    assert "3 images in this run, 8 in earlier ones" in out


def test_quiet_prints_only_results_and_errors(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out", "-q")
    assert code == 1
    assert [line.partition(": a ")[0] for line in err.splitlines()] == ["skipped: x.png"]
    assert out.startswith("10 done, 0 to do, 1 failed")
    assert "waited for" not in out
    assert run("p", "--out", "nowhere/out", "-q")[2].startswith("error: nowhere: does not exist")
    assert "waited for: read and decode" in run("p", "--out", "more", "-v")[1]


@pytest.mark.parametrize("name", ["extend", "retry-failed", "accept-versions"])
def test_an_option_without_effect_on_a_new_export_is_named(
    export_dir: Path, run: Any, name: str
) -> None:
    """With a misspelt --out, --extend once began another export without a word."""
    words = f"fresh: this run starts a new export: --{name} has no effect\n"
    for flags in (("--dry-run",), ()):
        assert words in run("p", "--out", "fresh", f"--{name}", *flags)[2]
    assert "no effect" not in run("p", "--out", "fresh", f"--{name}")[2]


def test_a_list_on_standard_input_is_exported_and_resumed(
    export_dir: Path, run: Any, qwen_vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(*names: str) -> None:
        data = io.BytesIO("".join(f"{name}\n" for name in names).encode())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data, isatty=lambda: False))

    given("p/0.png", "", "p/1.png")
    assert run("-", "--out", "out")[1].startswith("2 done, 0 to do: ")
    assert load_features("out").ids == ["p/0.png", "p/1.png"]
    given("p/0.png", "p/1.png")
    assert run("-", "--out", "out")[1].startswith("2 done, 0 to do: ")
    given("p/0.png")
    assert "its images: 1 missing, first p/1.png" in run("-", "--out", "out")[2]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    error = qwen_vit("export", "--resume", "../out", "--extend")[2]
    assert "standard input" in error
    assert "in that folder" not in error


def test_a_part_reports_its_finished_shards(export_dir: Path, run: Any) -> None:
    """The report once suggested that all shards were complete."""
    words = ("p", "--out", "out", "--shard-size", "4")
    out = run(*words, "--part", "2/2")[1]
    assert "a part: 1 of the folder's 3 shards exist" in out
    assert "a part: " not in run(*words, "--part", "1/2")[1]
    _, out, err = run("p", "--out", "one", "--part", "2/8")
    assert "1 shard for 8 parts: lower --shard-size so that no process is idle" in err
    assert out.startswith("0 done, 0 to do: 0 rows")


@pytest.mark.parametrize("is_any_whole", [False, True])
def test_an_interrupt_reports_the_saved_images(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch, is_any_whole: bool
) -> None:
    def count(self: Any, features: ImageFeatures | FailedImage) -> None:
        if features.id == ("5.png" if is_any_whole else "1.png"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "count", count)
    code, _, err = run("p", "--out", "out", "--shard-size", "4")
    assert code == 130
    kept = "the export saved 4 images; run the same command again to resume"
    assert (kept in err, "the export saved no image" in err) == (is_any_whole, not is_any_whole)


def test_json_output_is_one_document(export_dir: Path, run: Any) -> None:
    code, out, _ = run("p", "--out", "out", "--json", "--output", "mean", "--dtype", "bfloat16")
    report = json.loads(out)
    assert code == 1
    assert (report["images"], report["exported"], report["failed"]) == (11, 10, {"truncated": 1})
    assert report["manifest"] == "out/manifest.parquet"


def test_a_dry_run_writes_nothing(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["images"] == 11
    _, out, _ = run("p", "--out", "out", "--dry-run")
    assert out.startswith("images       11 to do\n")
    assert sorted(os.listdir()) == ["p"]


def test_a_dry_run_refuses_the_same_inputs_as_an_export(export_dir: Path, run: Any) -> None:
    """A dry run once accepted images with one id, an empty list, and a folder that was not an
    export."""
    Path("file").touch()
    Path("list.txt").touch()
    assert run("p", "--out", "out")[0] == 1
    begun = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for arguments, words in (
        (("p", "--out", "file"), "file: not a folder"),
        (("p", "--out", "no/out"), "no: does not exist"),
        (("p", "--out", "p"), "no export.json"),
        (("p", "--out", "o" * 300), "File name too long"),
        (("p/0.png", "--out", "out"), "contains a different export: its images: "),
        (("p", "--out", "out", "--output", "mean"), "output was merged, is mean now"),
        (("p/0.png", "p/0.png", "--out", "fresh"), "p/0.png: two images have this id"),
        (("list.txt", "--out", "fresh"), "no image found in list.txt"),
    ):
        code, out, err = run(*arguments, "--dry-run")
        assert (code, out) == (2, "")
        assert words in err
    assert run("p", "--out", "out", "--dry-run")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == begun
    assert sorted(os.listdir()) == ["file", "list.txt", "out", "p"]


@pytest.mark.parametrize(
    ("suffix", "is_whole"),
    [("png", False), ("jpg", False), ("bmp", False), ("tif", False), ("webp", True)],
)
def test_a_dry_run_reads_only_the_start_of_a_large_image_in_a_tar(
    export_dir: Path, suffix: str, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run once read every tar completely. It reads more than the start of an image only if
    the start does not contain the size."""
    values = np.random.default_rng(0).integers(0, 256, (400, 420, 3), np.uint8)
    Image.fromarray(values).save(f"p/large.{suffix}", lossless=is_whole)
    length = Path(f"p/large.{suffix}").stat().st_size
    assert length > estimate_module.HEAD_BYTES
    with tarfile.open("t.tar", "w") as tar:
        tar.add(f"p/large.{suffix}")
    sizes: list[Any] = []
    real = read_item

    def read(item: Any, limits: Any) -> bytes:
        sizes.append(item.size)
        return real(item, limits)

    monkeypatch.setattr(estimate_module, "read_item", read)
    [item] = find_items(["t.tar"])
    assert estimate_module._size_in_header(item, ImageLimits()) == (400, 420)
    assert sizes == [estimate_module.HEAD_BYTES, *([length] if is_whole else [])]


@pytest.mark.parametrize(
    ("n_bytes", "seconds", "words"),
    [
        (88_944, 0.488, ("0.1 MB", "about 0.5 s, estimated from a few images")),
        (1_000_000, 1_500.0, ("1.0 MB", "about 25 min, estimated from a few images")),
        (
            16_500_000_000_000,
            25_200.0,
            ("16,500.0 GB", "about 7.0 hours, estimated from a few images"),
        ),
        (0, None, ("0.0 MB", "unknown")),
    ],
)
def test_an_estimate_is_printed_in_suitable_units(
    n_bytes: int, seconds: float | None, words: tuple[str, str]
) -> None:
    text = estimate_text(Estimate(1, 0, 1, n_bytes, seconds), Path("no", "folder", "yet"))
    disk, time = (line.split("  ")[-1].strip() for line in text.splitlines()[2:])
    assert re.fullmatch(rf"{words[0]}, where [\d,.]+ [MGT]B are free", disk)
    assert time == words[1]


def test_a_large_export_needs_a_confirmation(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "ASK_ABOVE_BYTES", 1_000)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - no terminal
    code, out, err = run("p", "--out", "out")
    assert (code, out) == (2, "")
    assert "out: the export will take about" in err
    assert "Pass fewer images, or pass --yes to export without a confirmation." in err
    assert shards() == {}
    assert run("p", "--out", "out")[0] == 2  # the second run asks again
    assert run("p", "--out", "out", "--yes")[0] == 1
    assert run("p", "--out", "out")[0] == 0  # an unfinished export needs no confirmation


def test_a_full_disk_needs_another_disk(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error once read "0.00109 GB; the disk has 0.0 GB free", and recommended --yes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - no terminal
    code, _, err = run("p", "--out", "out")
    assert code == 2
    assert re.search(
        r"out: the export will take about 0\.\d MB, and the disk has 0\.0 MB free\. Pass an --out "
        r"on another disk, or fewer images\. --yes skips this check\.$", err
    )  # fmt: skip
    assert shards() == {}


def test_an_answer_of_no_cancels_the_export(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command once reported an interrupt, with exit code 130."""
    monkeypatch.setattr(export_command, "ASK_ABOVE_BYTES", 1_000)
    for answer, code, words in (
        ("n\n", 2, "error: export cancelled. To make the export smaller, pass fewer images"),
        ("", 130, "interrupted"),  # Ctrl-D at the prompt
    ):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        done = run("p", "--out", "out")
        assert (done[0], done[1]) == (code, "")
        assert "Continue? [y/N]" in done[2]
        assert words in done[2].splitlines()[-1]
        assert shards() == {}


def test_a_terminal_shows_the_speed_and_the_failures(
    export_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    export(show_progress=True)
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "100%" in last
    assert "11/11" in last
    assert "image/s" in last
    for word in ("tokens/s", " MB", "1 skipped"):
        assert word in last
    export(show_progress=True)
    assert "11/11" in capsys.readouterr().err


def test_a_log_gets_progress_in_complete_lines(
    export_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="short", show_progress=True)
    assert capsys.readouterr().err.startswith("skipped: ")  # no progress line within a minute
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 1e-9)
    export(show_progress=True)
    lines = capsys.readouterr().err.split("\n")
    assert any("11/11" in line and "tokens/s" in line for line in lines)
    assert not any("\r" in line for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_log_does_not_stop_an_export(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 1e-9)
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        done = export(show_progress=True)
    assert done.exported == 10


def test_files_without_an_image_suffix_are_counted(export_dir: Path, run: Any) -> None:
    for name in ("a.txt", "b.txt", "NOTES", "README.md", "LICENSE", *(f"c.{i}" for i in range(9))):
        Path("p", name).write_text("")
    _, _, err = run("p", "--out", "out")
    assert err.splitlines()[0] == (
        "skipped files without an image or video extension: 2 .txt, 1 without any, "
        "1 .0, 1 .1, 1 .2, ..."
    )


def test_an_export_below_its_inputs_is_not_an_input(export_dir: Path, run: Any) -> None:
    for _ in range(2):
        _, _, err = run("p", "--out", "p/out")
        assert "skipped files without" not in err
    _, _, err = run("p", "--out", "p/out", "--dry-run")
    assert "skipped files without" not in err
    _, _, err = run("p/*", "--out", "p/out")
    assert "skipped files without" not in err
    assert FeatureFolder(Path("p/out")).listing == sorted(set(os.listdir("p")) - {"out"})


def test_twenty_failures_are_printed_and_the_others_counted(export_dir: Path, run: Any) -> None:
    for number in range(30):
        Path(f"p/z{number}.png").write_bytes(b"")
    _, out, err = run("p", "--out", "out", "-q")
    assert "failed: 30 empty-file, 1 truncated" in out
    assert len(err.splitlines()) == 21
    assert err.splitlines()[-1] == "skipped: more than 20 images; the manifest lists all of them"


def test_the_command_reports_its_waits_and_how_to_retry(export_dir: Path, run: Any) -> None:
    """The command once named --retry-failed only when it met the failure again."""
    _, out, _ = run("p", "--out", "out", "--profile")
    assert re.search(r"waited for: read and decode \d+%, encode \d+%, copy back \d+%, write", out)
    _, again, _ = run("p", "--out", "out")
    for each in (out, again):
        assert "failed: 1 truncated; --retry-failed tries them again" in each
    assert "waited for" not in again


BAD_USAGE = {
    "no inputs": ([], "missing: INPUTS. Pass INPUTS, --model and --out"),
    "part": (["p", "--part", "3"], "expected I/N"),
    "part range": (["p", "--part", "3/2"], "expected I/N such as 2/8, I from 1 to N"),
    "shard size": (["p", "--shard-size", "0"], "Invalid value for '--shard-size'"),
    "failures": (["p", "--max-failures", "-1"], "Invalid value for '--max-failures'"),
    "threads": (["p", "--decode-threads", "0"], "Invalid value for '--decode-threads'"),
    "missing": (["gone"], "gone: does not exist"),
    "address": (["https://x/y.jpg"], "https://x/y.jpg: an address"),
    "foreign folder": (["p", "--out", "p"], "contains 0.png"),
}


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_bad_usage_exits_with_2_before_the_model_is_loaded(
    export_dir: Path, run: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("refused only after the model was loaded")

    monkeypatch.setattr(export_module, "VisionEncoder", SimpleNamespace(from_pretrained=no_model))
    arguments, words = BAD_USAGE[fault]
    code, out, err = run(*arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
