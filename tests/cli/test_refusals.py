"""Test that `encode` rejects wrong arguments before any work."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_vit import device
from qwen_vit.checkpoint import hub
from qwen_vit.encoder import VisionEncoder
from qwen_vit.feature_files.read import load_features
from tests.support.commands import TO_FILE


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("refused only after the model was loaded")


REFUSED = {
    "exists": (
        ("a.png", "--out", "old.safetensors"),
        ("old.safetensors: already exists. Pass --overwrite", "another --out."),
    ),
    "no folder": (
        ("a.png", "--out", "no/f.safetensors"),
        ("no: does not exist. Create the folder first.",),
    ),
    "folder is a file": (
        ("a.png", "--out", "a.png/f"),
        ("a.png: not a folder. Create the folder first.",),
    ),
    "is a folder": (
        ("a.png", "--out", "sub", "--overwrite"),
        ("sub: a folder. Expected a file to write. Pass another --out.",),
    ),
    "twice": (
        ("a.png", "b.jpg", "a.png", "--out", "f"),
        ("a.png: given twice. Expected each image once. Omit one of the two",),
    ),
    "long name": (("a.png", "--out", "f" * 300), ("could not be written (File name too long)",)),
    "long folder": (("a.png", "--out", "f" * 300 + "/f"), ("(File name too long)",)),
    "not UTF-8": (("a.png", "--out", "caf\udce9.st"), ("not UTF-8", "safetensors can open")),
    "a device": (
        ("a.png", "--out", "device", "--overwrite"),
        ("device: not a regular file. Expected a file. Pass another --out",),
    ),
    "a link": (
        ("a.png", "--out", "link", "--overwrite"),
        ("link: a symbolic link", "Pass the link's target"),
    ),
    "an image": (
        ("b.jpg", "./a.safetensors", "--out", "a.safetensors", "--overwrite"),
        ("a.safetensors: one of the input images. Pass another --out.",),
    ),
    "twice by two names": (("a.png", "./a.png", "--out", "f"), ("a.png: given twice.",)),
    "another format": (
        ("a.png", "--out", "f.pt"),
        ("f.pt: its suffix is .pt. Expected .safetensors.", "Pass --out f.safetensors."),
    ),
    "no image": (("sub", "--out", "f"), ("no image found in sub. Expected",)),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    folder: Path, run: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite once replaced /dev/null, and an input image, by a feature file."""
    Path("old.safetensors").write_text("old")
    Path("sub").mkdir()
    os.mkfifo("device")
    Path("link").symlink_to("old.safetensors")
    shutil.copy("a.png", "a.safetensors")
    monkeypatch.setattr(VisionEncoder, "from_pretrained", no_model)
    arguments, words = REFUSED[fault]
    done = run("encode", *arguments, "--model", "tiny")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err
    assert Path("old.safetensors").read_text() == "old"
    assert Path("link").is_symlink()
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_write_permission_is_refused_before_any_work(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionEncoder, "from_pretrained", no_model)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    done = run("encode", "a.png", "--model", "tiny", "--out", "f.safetensors")
    assert done.code == 2
    assert ".: not writable. Check its permissions." in done.err


def test_a_disk_that_fails_at_the_end_is_an_error_of_one_line(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir())
    done = run("encode", "a.png", *TO_FILE)
    assert (done.code, done.out) == (2, "")
    assert "error: f.safetensors: could not be written (No space left on device)" in done.err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("out", ["", "-"])
@pytest.mark.parametrize(
    "command", [("encode", "--out"), ("show", "--out"), ("export", "--out"),
                ("export", "--resume"), ("compare", "--save-golden"), ("compare", "--report")],
)  # fmt: skip
def test_an_output_has_a_name(folder: Path, run: Any, command: tuple[str, str], out: str) -> None:
    """`--out -` once wrote a file with the name -, and the error for '' named the folder."""
    name, option = command
    done = run(name, "a.png", "--model", "tiny", option, out)
    assert done.code == 2
    assert f"'{option}': {out!r} is not a path. Pass the path of a file or folder." in done.err


def test_overwrite_replaces_the_file(folder: Path, run: Any) -> None:
    Path("f.safetensors").write_text("old")
    assert run("encode", "a.png", *TO_FILE, "--overwrite").code == 0
    assert load_features("f.safetensors").ids == ["a.png"]


BAD_USAGE = {
    "no images": (("encode", "--model", "tiny", "--out", "f"), "Missing argument 'IMAGES...'"),
    "no model": (("encode", "a.png", "--out", "f"), "Missing option '--model'"),
    "no out": (("encode", "a.png", "--model", "tiny"), "Missing option '--out'"),
    "unknown option": (("info", "tiny", "--colour"), "No such option"),
    "no number": (("encode", "a.png", *TO_FILE, "--max-pixels", "many"), "--max-pixels"),
    "other choice": (("encode", "a.png", *TO_FILE, "--on-error", "stop"), "--on-error"),
    "other dtype": (("encode", "a.png", *TO_FILE, "--dtype", "int8"), "not one of 'auto', 'bf"),
    "no command": (("tiny",), "No such command 'tiny'"),
    "unknown model": (
        ("encode", "a.png", "--model", "tinny", "--out", "f"),
        "tinny: does not exist",
    ),
    "float16": (
        ("encode", "a.png", *TO_FILE, "--dtype", "float16"),
        "Use bfloat16 or float32. See",
    ),
    "device": (("encode", "a.png", *TO_FILE, "--device", "tpu"), "device is 'tpu'"),
    "limits": (("encode", "a.png", *TO_FILE, "--max-pixels", "9"), "Pass other --min-pixels"),
    "no value": (("export", "--resume"), "an argument. See `qwen-vit export --help`."),
    "no close option": (("encode", "--nope"), "option '--nope'. See `qwen-vit encode --help`."),
    "a file with a dash": (("encode", "-d.jpg"), "For the file, pass ./-d.jpg. See `qwen-vit enc"),
    "bench on a CPU without a model": (("bench", "--device", "cpu"), "Use a GPU."),
    "bench on a CPU": (  # the check precedes the search for weights
        ("bench", "--model", "no-such/model", "--local-files-only", "--device", "cpu"),
        "Use a GPU.",
    ),
    "info without": (("info",), "Missing argument 'MODEL|FEATURES'"),
    "odd name": (("info", "tiny", "--image", "\x1b[31mred\n"), r"'\x1b[31mred\n': does not exist"),
    "no name": (("info", "tiny", "--image", ""), "'': does not exist"),
    "a video as --image": (
        ("info", "tiny", "--image", "clip.mp4"),
        "clip.mp4: a video, and --image counts the tokens of an image. Run",
    ),
}
for number, (scheme, command) in enumerate(  # an empty variable gives s3://$BUCKET no bucket
    [
        ("s3://", ("export", "a.png", "--model", "tiny", "--out", "s3://")),
        ("gs://", ("export", "--resume", "gs://")),
        ("s3://", ("info", "s3://")),
        ("az://", ("verify", "az://")),
        ("s3://", ("show", "s3://")),
    ]
):
    BAD_USAGE[f"no bucket {number}"] = (command, f"error: {scheme}: names no bucket. Expected")
BAD_USAGE["an input without a bucket"] = (
    ("export", "s3:///k", "--model", "tiny", "--out", "out"),
    "error: s3:///k: is not a valid address (names no bucket). Check the address.",
)


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_wrong_usage_exits_with_2_and_names_the_cause(folder: Path, run: Any, fault: str) -> None:
    arguments, words = BAD_USAGE[fault]
    Path("-d.jpg").touch()
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_an_unexpected_error_of_the_system_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "odd\n\x1b[31mname")

    monkeypatch.setattr(hub, "find_checkpoint", refused)
    done = run("info", "tiny")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: 'odd\\n\\x1b[31mname': cannot be used (Permission denied). "
        "Check its permissions and its disk.\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_full_memory_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The command once asked for a report, because "this should not happen"."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "find_checkpoint", full)
    done = run("info", "tiny")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: out of memory. Free some memory, or raise the memory limit, and run the same "
        "command again.\n"
    )


def test_an_interrupt_ends_with_130_and_leaves_no_file(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    encode = VisionEncoder.encode

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(self, *arguments, **options)

    monkeypatch.setattr(VisionEncoder, "encode", interrupted)
    before = sorted(os.listdir())
    done = run("encode", "a.png", "b.jpg", *TO_FILE)
    assert (done.code, done.out) == (130, "")
    assert "interrupted" in done.err
    assert sorted(os.listdir()) == before


def test_a_folder_without_weights_is_no_download(folder: Path, run: Any) -> None:
    done = run("download", ".")
    assert (done.code, done.out) == (2, "")
    assert "no weights" in done.err


def test_a_mistyped_path_is_refused_before_a_model_is_loaded(qwen_vit: Any) -> None:
    """The error named the model, which is not in the cache, and not the path."""
    model = "Qwen/Qwen2.5-VL-7B-Instruct"
    done = qwen_vit("encode", "no-such-folder", "--model", model, "--out", "f.safetensors")
    assert done.code == 2
    assert "no-such-folder" in done.err
    assert "Qwen" not in done.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("encode", "gone", *TO_FILE), ""),
        (("export", "gone", "--model", "tiny", "--out", "e"), ""),
        (("show", "gone", "--model", "tiny"), ""),
        (("compare", "gone", "--model", "tiny"), ""),
        (("show", "gone.safetensors"), ""),
        (("info", "gone.safetensors"), "a feature file of `qwen-vit encode` or a folder"),
        (("verify", "gone.safetensors"), "a feature file of `qwen-vit encode` or a folder"),
        (("info", "gone"), "a local folder, 'organisation/repository' on the Hub, or 'tiny'"),
        (("verify", "gone"), "a local folder, 'organisation/repository' on the Hub, or 'tiny'"),
        (("info", "./gone"), "a checkpoint's folder"),
    ],
)
def test_a_missing_path_has_one_wording(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(VisionEncoder, "from_pretrained", no_model)
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    expectation = f" Expected {expected}" if expected else " Check the path."
    given = arguments[1]
    assert done.err.startswith(f"error: {given}: does not exist.{expectation}")
    assert done.err.endswith(("Check the path.\n", "Check the name.\n"))


def test_a_misspelt_model_is_refused_without_a_warning(folder: Path, run: Any) -> None:
    """The warning about the missing GPU once came first, and no name was suggested."""
    device._warn_once.cache_clear()  # the warning appears once per process
    done = run("encode", "a.png", "--model", "tyni", "--out", "f")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: tyni: does not exist.")
    assert done.err.endswith("Did you mean tiny?\n")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_without_a_model_or_features_names_both(
    folder: Path, run: Any, command: str
) -> None:
    Path("photos").mkdir()
    shutil.copy("b.jpg", "photos")
    done = run(command, "photos")
    assert (done.code, done.out) == (2, "")
    assert "photos: a folder with neither a checkpoint nor an export" in done.err
    assert "model.safetensors, or export.json" in done.err


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("encode", "a.png", "--mdel", "tiny"), "--model"),
        (("encod",), "encode"),
        (("encode", "a.png", "--output-dir", "x"), "--out"),
        (("export", "a.png", "--out-dir", "x"), "--out"),
        (("encode", "a.png", "--outpt", "mean"), "--output"),
    ],
)
def test_the_closest_option_or_command_is_suggested(
    run: Any, arguments: tuple[str, ...], suggestion: str
) -> None:
    """The suggestions once were in alphabetical order: --dtype, --help and --model."""
    done = run(*arguments)
    assert done.code == 2
    assert f". Did you mean {suggestion}? See `qwen-vit" in done.err


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl"])
def test_a_command_without_lists_names_those_that_read_them(
    folder: Path, run: Any, name: str
) -> None:
    """The remedy once asked for a list in a .txt file, although this file is one."""
    Path(name).write_text('{"path": "a.png"}\n' if name.endswith("l") else "a.png\n")
    for arguments in (("info", "tiny", "--image", name), ("compare", name, "--model", "tiny")):
        done = run(*arguments)
        assert done.code == 2
        remedy = ". Pass the files that the list names; only encode, export and show read lists."
        assert remedy in done.out + done.err


@pytest.mark.parametrize("command", ["info", "verify"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.png", "To count an image's tokens, run `qwen-vit info MODEL --image a.png`."),
        ("list.txt", "Pass another path."),
    ],
)
def test_the_error_for_another_kind_of_file_lists_what_info_describes(
    folder: Path, run: Any, command: str, name: str, remedy: str
) -> None:
    """The remedy once was to pass the image's folder."""
    Path("list.txt").write_text("a.png\n")
    expected = "Expected a checkpoint, a feature file (.safetensors) or an export's folder."
    done = run(command, name)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {name}: a file, but not a feature file. {expected} {remedy}\n"


def test_one_failed_image_has_one_cause(folder: Path, run: Any) -> None:
    """The remedy once was to pass a list, for any name and for a video as well."""
    Path("t.jpg").write_text("404 Not Found")
    done = run("encode", "t.jpg", *TO_FILE)
    assert done.code == 2
    assert "t.jpg: a text file, not an image: it starts with '404 Not Found'." in done.err
    assert ". Pass an image, or fetch the file again." in done.err
    assert "1 image failed. Fix the cause named above." in done.err
