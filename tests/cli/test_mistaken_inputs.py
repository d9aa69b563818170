"""Test that the error for an input of another kind names this kind."""

import io
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from qwen_vit import VisionEncoder
from qwen_vit.checkpoint.published import packaged_weights
from tests.support.inputs import write_tar

ENCODE = ("encode", "--model", "tiny", "--out", "f.safetensors")


@pytest.mark.parametrize("command", [("info",), ("verify",), ("show",), (*ENCODE,)])
def test_an_encoder_cache_is_named(folder: Path, run: Any, command: tuple[str, ...]) -> None:
    Path("cache/index").mkdir(parents=True)
    Path("cache/qwen_vit.json").write_text("{}")
    done = run(*command, "cache")
    assert done.code == 2
    assert "cache: an encoder cache of vLLM." in done.err
    assert "Open it in Python with read_ec_cache." in done.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "a ZIP archive, not an image."),
        ("a.csv", "a CSV table, not an image."),
        ("t.tar", "Unpack the tars that are inside a tar."),
    ],
)
def test_other_files_are_named(folder: Path, run: Any, name: str, words: str) -> None:
    write_tar(name, {"inner.tar": b"no image"})
    assert words in run(*ENCODE, name).err


def test_a_path_that_the_shell_split_is_named_whole(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three errors once named three parts of the path."""
    monkeypatch.setattr(VisionEncoder, "from_pretrained", None)  # loading would fail
    Path("my photos").mkdir()
    shutil.copy("b.jpg", "my photos/the cat.jpg")
    split = ("my", "photos/the", "cat.jpg")
    expected = (
        "error: my photos/the cat.jpg: the shell split this path at its spaces. "
        "Put the path in quotes: 'my photos/the cat.jpg'.\n"
    )
    for command in (
        ("encode", *split, *ENCODE[1:]),
        ("encode", "a.png", *split, *ENCODE[1:]),
        ("export", *split, "a.png", "--model", "tiny", "--out", "e"),
        ("show", *split, "--model", "tiny"),
        ("compare", "b.jpg", *split, "--model", "tiny"),
    ):
        done = run(*command)
        assert (done.code, done.out, done.err) == (2, "", expected), command
    Path("photos 3").mkdir()
    assert "Put the path in quotes: 'photos 3'" in run("encode", "photos", "3", *ENCODE[1:]).err


def test_numbers_after_the_first_block_are_explained(folder: Path, run: Any) -> None:
    """`--layers 1 3` once encoded with layer 1, and skipped the image 3."""
    expected = "does not exist. Check the path, or separate the blocks of --layers with commas"
    for command in (
        ("encode", "a.png", *ENCODE[1:], "--layers", "1", "3"),
        ("export", "a.png", "--model", "tiny", "--out", "e", "--layers", "1", "3"),
    ):
        done = run(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err == f"error: 3: {expected}: --layers 1,3.\n"
    done = run("encode", "a.png", "3", *ENCODE[1:])
    assert "skipped: 3: does not exist. Check the path." in done.err


def test_an_empty_value_of_layers_is_an_error(folder: Path, run: Any) -> None:
    assert "--layers is ''" in run(*ENCODE, "a.png", "--layers", "").err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("encode", "a.png", "--out", "folder/"),
            "folder/ names a folder. Pass the path of a file",
        ),
        (("compare", "a.png", "--save-golden", "new/"), "new/ names a folder."),
        (
            ("export", "a.png", "--out", "f.safetensors"),
            "f.safetensors names a file. Pass the path",
        ),
        (("compare", "a.png", "--report", "page.HTML"), "page.HTML names a file."),
    ],
)
def test_a_path_of_the_other_kind_is_an_error(
    folder: Path, run: Any, words: tuple[str, ...], error: str
) -> None:
    before = set(folder.iterdir())
    done = run(*words, "--model", "tiny")
    assert (done.code, set(folder.iterdir())) == (2, before)
    assert error in done.err


def test_an_existing_folder_may_have_a_suffix(folder: Path, run: Any) -> None:
    Path("old.html").mkdir()
    Image.new("RGB", (56, 56)).save("a.png")
    assert run("export", "a.png", "--model", "tiny", "--out", "old.html").code == 0


@pytest.mark.parametrize(
    "words",
    [
        (*ENCODE, "~/gone.png"),
        ("export", "~/gone.png", "--model", "tiny", "--out", "new"),
        ("info", "~/gone"),
        ("show", "~/gone"),
        ("compare", "--model", "tiny", "--golden", "~/gone"),
        ("encode", "a.png", "--model", "tiny", "--out", "~/gone"),
    ],
)
def test_the_error_for_a_path_with_a_tilde_gives_the_full_path(
    folder: Path, run: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of-test")
    done = run(*words)
    assert done.code == 2
    assert "Write the path without ~: /home/of-test/gone" in done.err


def test_a_compressed_tar_starts_no_export(folder: Path, run: Any) -> None:
    write_tar("a.tar.gz", {"a.png": b""})
    done = run("export", "a.tar.gz", "--model", "tiny", "--out", "new")
    assert done.code == 2
    assert (
        "a.tar.gz: a compressed tar; members cannot be read by offset. Unpack the tar" in done.err
    )
    assert not Path("new").exists()


def test_a_folder_as_the_image_of_info_is_an_error(folder: Path, run: Any) -> None:
    done = run("info", "tiny", "--image", ".")
    assert done.code == 2
    assert ".: --image names a folder. Pass one of its files." in done.err


@pytest.mark.parametrize("is_file", [False, True])
def test_a_nul_byte_in_a_list_is_an_error(
    folder: Path, run: Any, is_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"a.png\0b.png\0"
    Path("list.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    done = run(*ENCODE, "list.txt" if is_file else "-")
    assert done.code == 2
    assert f"{'list.txt' if is_file else 'standard input'}: line 1 contains a NUL byte" in done.err
    assert "find -print" in done.err


@pytest.mark.parametrize("command", ["encode", "show", "compare"])
def test_pixel_limits_without_an_image_give_a_warning(folder: Path, run: Any, command: str) -> None:
    Path("a.mp4").write_bytes(b"no video")
    Image.new("RGB", (56, 56)).save("a.png")
    words = (command, "--model", "tiny", *(("--out", "o.safetensors") * (command == "encode")))
    done = run(*words, "a.mp4", "--max-pixels", "9000")
    assert "ignored --max-pixels: every input has the extension of a video" in done.err
    if command == "encode":
        assert "ignored" not in run(*words, "a.mp4", "a.png", "--max-pixels", "9000").err


def test_show_replaces_no_input(folder: Path, run: Any) -> None:
    Path("p").mkdir()
    Image.new("RGB", (56, 56)).save("p/a.png")
    before = Path("p/a.png").read_bytes()
    words = ("--out", "p/a.png", "--overwrite")
    assert run("encode", "p", "--model", "tiny", "--out", "f.safetensors").code == 0
    for given in (
        ("p/a.png", "--model", "tiny"), ("p", "--model", "tiny"),
        ("f.safetensors", "--images", "p"), ("f.safetensors", "--images", "p/a.png"),
    ):  # fmt: skip
        done = run("show", *given, *words)
        assert (done.code, Path("p/a.png").read_bytes()) == (2, before)
        assert "p/a.png: one of the input images. Pass another --out." in done.err
    # without --overwrite, the error once advised it
    assert "one of the input" in run("show", "p/a.png", "--model", "tiny", "--out", "p/a.png").err
    os.chdir("p")
    done = run("encode", "a.png", "--model", "tiny", "--out", "g.safetensors")
    assert done.code == 0
    done = run("show", "g.safetensors", "--out", "a.png", "--overwrite")  # reads ./a.png
    assert (done.code, Path("a.png").read_bytes()) == (2, before)


def test_a_result_does_not_replace_the_weights(folder: Path, run: Any) -> None:
    shutil.copytree(packaged_weights() / "tiny", "model")
    Image.new("RGB", (56, 56)).save("a.png")
    weights = Path("model/model.safetensors")
    before = weights.read_bytes()
    for words in (("encode", "a.png", "--out"), ("compare", "a.png", "--save-golden")):
        done = run(*words, str(weights), "--model", "model", "--overwrite")
        assert (done.code, weights.read_bytes()) == (2, before)
        assert f"{weights}: a file in the folder of the model. Pass another {words[-1]}" in done.err
