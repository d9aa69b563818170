"""What `qwen-vit encode` takes, and what it says of each image."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.feature_files.read import load_features

TO_FILE = ("--model", "tiny", "--device", "cpu", "--out", "f.safetensors", "--overwrite")


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_every_form_of_input_is_read(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders, quoted patterns, lists and tars were skipped as images that cannot be read."""
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
        done = run("encode", given, *TO_FILE)
        assert done.code == 0, done.err
        assert load_features("f.safetensors").ids == ids
        assert ("skipped files without an image or video extension: 1 .csv" in done.err) == (
            given == "p"
        )
    alone = run("encode", "a.png", *TO_FILE)
    assert alone.code == 0
    [expected] = load_features("f.safetensors")
    run("encode", "t.tar", *TO_FILE)
    [member] = load_features("f.safetensors")
    assert torch.equal(member.embeds, expected.embeds)


def test_nothing_on_standard_input_is_no_image(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"\n")
    done = run("encode", "-", *TO_FILE)
    assert (done.code, done.out) == (2, "")
    assert "error: no image found in -." in done.err


def test_a_column_says_what_was_done_to_each_image(folder: Path, run: Any) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue")]
    frames[0].save("three.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (84, 56), "red").save("turned.jpg", exif=exif)
    Image.fromarray(np.full((56, 56), 40_000, np.uint16)).save("deep.png")
    done = run("encode", "a.png", "three.gif", "turned.jpg", "deep.png", "broken.png", *TO_FILE)
    head, _, *rows, _ = done.out.splitlines()
    notes = {row.split()[0]: row[head.index("notes") :] for row in rows}
    assert notes["a.png"] == ""
    assert "first of several frames" in notes["three.gif"]
    assert "EXIF orientation 6 applied" in notes["turned.jpg"]
    assert "16" in notes["deep.png"]
    assert notes["broken.png"] == "skipped: truncated"
    plain = run("encode", "a.png", *TO_FILE)
    assert "notes" not in plain.out  # a column of nothing is none


@pytest.mark.parametrize(("given", "meant"), [("fp32", "float32"), ("float32", "float32")])
def test_a_dtype_has_a_short_name(folder: Path, run: Any, given: str, meant: str) -> None:
    done = run("encode", "a.png", *TO_FILE, "--dtype", given, "--json")
    assert json.loads(done.out)["dtype"] == meant


def test_bf16_is_bfloat16(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", *TO_FILE, "--dtype", "bf16")
    assert "dtype is torch.bfloat16 on a CPU" in done.err


def test_quiet_logs_errors_alone_and_verbose_more(folder: Path, run: Any) -> None:
    words = ("encode", "a.png", "broken.png", *TO_FILE)
    plain, quiet, verbose = (run(*words, *flags) for flags in ((), ("-q",), ("-v",)))
    assert [each.code for each in (plain, quiet, verbose)] == [1, 1, 1]
    assert "skipped: broken.png" in plain.err
    assert quiet.err == ""
    assert "skipped: truncated" in quiet.out  # results stay
    assert "loaded VisionEncoder('tiny', float32, on cpu) in" in verbose.err
    assert "loaded" not in plain.err + run(*words).err  # -v of one command is not kept
    assert run("encode", "a.png", "-q", *TO_FILE[:-1]).err.startswith("error: f.safetensors: alre")
