"""Test the inputs of `qwen-vit encode`, and its report on each image."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.feature_files.read import load_features
from tests.support.commands import TO_FILE
from tests.support.inputs import write_tar

AGAIN = (*TO_FILE, "--overwrite")


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_every_form_of_input_is_read(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command once skipped folders, quoted patterns, lists and tars as unreadable images."""
    (folder / "p" / "q").mkdir(parents=True)
    shutil.copy("a.png", "p/q/c.png")
    shutil.copy("b.jpg", "p/d.jpg")
    Path("p/notes.csv").write_text("x")
    Path("list.txt").write_text("a.png\n\nb.jpg\n")
    Path("list.jsonl").write_text(json.dumps({"id": "one", "path": "a.png"}) + "\n")
    with tarfile.open("t.tar", "w") as tar:
        tar.add("a.png")
    stdin(monkeypatch, b"p/d.jpg\n")
    for given, ids in (
        ("p", ["d.jpg", "q/c.png"]),
        ("p/**/*.png", ["p/q/c.png"]),
        ("list.txt", ["a.png", "b.jpg"]),
        ("list.jsonl", ["one"]),
        ("t.tar", ["t.tar/a.png"]),
        ("-", ["p/d.jpg"]),
    ):
        done = run("encode", given, *AGAIN)
        assert done.code == 0, done.err
        assert load_features("f.safetensors").ids == ids
        assert ("skipped files without an image or video extension: 1 .csv" in done.err) == (
            given == "p"
        )
    alone = run("encode", "a.png", *AGAIN)
    assert alone.code == 0
    [expected] = load_features("f.safetensors")
    run("encode", "t.tar", *AGAIN)
    [member] = load_features("f.safetensors")
    assert torch.equal(member.embeds, expected.embeds)


def test_nothing_on_standard_input_is_no_image(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"\n")
    done = run("encode", "-", *AGAIN)
    assert (done.code, done.out) == (2, "")
    assert "error: no image found in standard input." in done.err


def test_a_column_has_the_notes_of_each_image(folder: Path, run: Any) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue")]
    frames[0].save("three.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (84, 56), "red").save("turned.jpg", exif=exif)
    Image.fromarray(np.full((56, 56), 40_000, np.uint16)).save("deep.png")
    done = run("encode", "a.png", "three.gif", "turned.jpg", "deep.png", "broken.png", *AGAIN)
    head, _, *rows, _ = done.out.splitlines()
    notes = {row.split()[0]: row[head.index("notes") :] for row in rows}
    assert notes["a.png"] == ""
    assert "first of several frames" in notes["three.gif"]
    assert "EXIF orientation 6 applied" in notes["turned.jpg"]
    assert "16" in notes["deep.png"]
    assert notes["broken.png"] == "skipped: truncated"
    plain = run("encode", "a.png", *AGAIN)
    assert "notes" not in plain.out  # an empty column is omitted


@pytest.mark.parametrize(("given", "full_name"), [("fp32", "float32"), ("float32", "float32")])
def test_a_dtype_has_a_short_name(folder: Path, run: Any, given: str, full_name: str) -> None:
    done = run("encode", "a.png", *AGAIN, "--dtype", given, "--json")
    assert json.loads(done.out)["dtype"] == full_name


def test_bf16_is_bfloat16(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", *AGAIN, "--dtype", "bf16")
    assert "dtype is torch.bfloat16 on a CPU" in done.err


def test_quiet_logs_errors_alone_and_verbose_more(folder: Path, run: Any) -> None:
    words = ("encode", "a.png", "broken.png", *AGAIN)
    plain, quiet, verbose = (run(*words, *flags) for flags in ((), ("-q",), ("-v",)))
    assert [each.code for each in (plain, quiet, verbose)] == [1, 1, 1]
    assert "skipped: broken.png" in plain.err
    [line] = quiet.err.splitlines()  # a cron job's mail then names the image
    assert line.startswith("skipped: broken.png: ")
    assert "skipped: truncated" in quiet.out  # --quiet keeps results
    assert "loaded VisionEncoder('tiny', float32, on cpu) in" in verbose.err
    assert "loaded" not in plain.err + run(*words).err  # -v does not affect later commands
    assert run("encode", "a.png", "-q", *TO_FILE).err.startswith("error: f.safetensors: alre")


def test_encode_prints_a_row_for_each_image_and_writes_the_file(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", "b.jpg", *TO_FILE)
    assert done.code == 0
    head, rule, *rows, last = done.out.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        "file", "size", "grid (t, h, w)", "tokens", "width", "ms",
    ]  # fmt: skip
    assert set(rule) == {"-", " "}
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    assert [row[:5] for row in cells] == [
        ["a.png", "56 x 56", "(1, 4, 4)", "4", "192"],
        ["b.jpg", "84 x 56", "(1, 4, 6)", "6", "192"],
    ]
    assert all(row[5].isdigit() for row in cells)
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # the columns are aligned
    size = os.stat("f.safetensors").st_size
    assert last == f"wrote f.safetensors ({size:,} bytes)"


def test_the_file_has_the_features_that_encode_returns(folder: Path, run: Any) -> None:
    assert run("encode", "a.png", "b.jpg", *TO_FILE).code == 0
    written = load_features("f.safetensors")
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    for stored, name in zip(written, ["a.png", "b.jpg"], strict=True):
        [expected] = encoder.encode([name])
        assert stored.id == name
        assert stored.grid_thw == expected.grid_thw
        assert stored.embeds is not None
        assert expected.embeds is not None
        assert torch.equal(stored.embeds, expected.embeds)
    assert written.metadata["model"] == "tiny"


def test_the_file_has_the_hash_of_each_image(folder: Path, run: Any) -> None:
    content = Path("a.png").read_bytes()
    write_tar("t.tar", {"b.png": content})
    pages = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    pages[0].save("c.tif", save_all=True, append_images=pages[1:])
    assert run("encode", "a.png", "t.tar", "c.tif", "--pages", "all", *TO_FILE).code == 0
    found = [each.sha256 for each in load_features("f.safetensors")]
    expected = [sha256(data).hexdigest() for data in (content, Path("c.tif").read_bytes())]
    assert found == [expected[0]] * 2 + [expected[1]] * 2


def test_a_broken_image_is_skipped_and_ends_with_1(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", "broken.png", "gone.png", "b.jpg", *TO_FILE)
    assert done.code == 1
    assert "skipped: broken.png" in done.err
    assert "skipped: gone.png: does not exist" in done.err
    assert "skipped: truncated" in done.out
    assert "skipped: missing" in done.out
    assert load_features("f.safetensors").ids == ["a.png", "b.jpg"]


def test_an_input_that_cannot_be_reached_is_skipped(folder: Path, run: Any) -> None:
    """A link to itself once ended the command, and a NUL in a list printed a traceback."""
    Path("loop.png").symlink_to("loop.png")
    Path("dangling.png").symlink_to("gone.png")
    Path("nul.jsonl").write_text(r'{"path": "nul\u0000.png"}')
    bad = ["loop.png", "dangling.png", "a.png/b.png", "n" * 300 + ".png"]
    done = run("encode", *bad, "nul.jsonl", "b.jpg", *TO_FILE)
    assert (done.code, done.err.count("skipped: ")) == (1, 5)
    assert load_features("f.safetensors").ids == ["b.jpg"]
    done = run("encode", *bad, *TO_FILE, "--overwrite")
    assert (done.code, done.out) == (2, "")
    assert "error: loop.png: cannot be read (Too many levels of symbolic links)" in done.err


def test_an_image_without_read_permission_is_skipped(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad name once counted as bad usage, so the command also rejected the good images."""
    real, access = open, os.access

    def refused(path: Any, *arguments: Any, **options: Any) -> Any:
        if path == str(folder / "b.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and (path, mode) != ("b.jpg", os.R_OK)
    )
    done = run("encode", "a.png", "b.jpg", *TO_FILE)
    assert done.code == 1
    assert "skipped: b.jpg: cannot be read (Permission denied)" in done.err
    assert load_features("f.safetensors").ids == ["a.png"]


def test_the_json_report_has_each_image_or_its_error(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", "broken.png", *TO_FILE, "--json", "--max-pixels", "50000")
    assert done.code == 1
    report = json.loads(done.out)
    assert (report["model"], report["device"], report["dtype"]) == ("tiny", "cpu", "float32")
    assert report["out"] == "f.safetensors"
    good, bad = report["images"]
    assert (good["size_px"], good["grid_thw"], good["tokens"]) == ([56, 56], [1, 4, 4], 4)
    assert good["width"] == 192
    assert good["error"] is None
    assert good["ms"] > 0
    assert bad["tokens"] is None
    assert bad["error"]["code"] == "truncated"
    assert bad["error"]["message"].startswith("broken.png")


def test_on_error_raise_stops_at_the_first_broken_image_and_writes_nothing(
    folder: Path, run: Any
) -> None:
    done = run("encode", "a.png", "broken.png", *TO_FILE, "--on-error", "raise")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith("error: broken.png")
    assert not Path("f.safetensors").exists()


def test_when_every_image_fails_nothing_is_written(folder: Path, run: Any) -> None:
    done = run("encode", "broken.png", *TO_FILE)
    assert (done.code, done.out) == (2, "")
    assert "skipped: broken.png" in done.err
    assert "no image to write" in done.err
    assert not Path("f.safetensors").exists()


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_embeddings_that_are_not_finite_are_never_written(
    folder: Path, run: Any, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = VisionEncoder.forward

    def poisoned(self: Any, patches: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result = forward(self, patches, *arguments)
        return result * float("nan") if len(patches) == 24 else result  # b.jpg

    monkeypatch.setattr(VisionEncoder, "forward", poisoned)
    done = run("encode", "a.png", "b.jpg", *TO_FILE, "--on-error", on_error)
    assert done.code == {"skip": 1, "raise": 2}[on_error]
    assert "b.jpg: its features contain NaN or infinity" in done.err
    if on_error == "skip":
        assert "skipped: not-finite" in done.out
        assert load_features("f.safetensors").ids == ["a.png"]
    else:
        assert not Path("f.safetensors").exists()
