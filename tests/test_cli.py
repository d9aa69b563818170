"""The commands as they are typed: data on stdout, the rest on stderr, and exit codes that hold."""

import fcntl
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from qwen_vit import __version__
from qwen_vit.checkpoint import hub
from qwen_vit.cli import checks
from qwen_vit.cli import main as cli_module
from qwen_vit.common import atomic_file as atomic_file_module
from qwen_vit.encoder import VisionEncoder
from qwen_vit.feature_files.read import load_features
from tests.support.checkpoints import SMALL, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CHELSEA = ROOT / "tests" / "images" / "chelsea.png"


@pytest.fixture
def run(qwen_vit: Any) -> Any:
    return qwen_vit


TO_FILE = ("--model", "tiny", "--device", "cpu", "--out", "f.safetensors")


def process(
    *arguments: str | bytes, folder: Path, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qwen_vit", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )


# In a process of its own


def test_the_module_encodes_in_a_process_of_its_own(folder: Path) -> None:
    """Names as bytes that are no text, a dash in front, and a terminal that knows ASCII alone."""
    names = [b"caf\xe9\xff.png", b"-dash.png", "猫\n.png".encode()]
    for name in names:
        shutil.copy("a.png", name)
    options = [each.encode() for each in TO_FILE]
    done = process("encode", *options, "--", *names, folder=folder, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    lines = done.stdout.decode().splitlines()  # strictly: no odd bytes
    assert len(lines) == 2 + 3 + 1
    assert load_features("f.safetensors").ids == [os.fsdecode(name) for name in names]


def test_json_goes_to_stdout_and_everything_else_to_stderr(folder: Path) -> None:
    done = process(
        "encode", "a.png", "broken.png", "b.jpg", "--model", "tiny", "--out", "f", "--json",
        folder=folder,
    )  # fmt: skip
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert [image["id"] for image in report["images"]] == ["a.png", "broken.png", "b.jpg"]
    assert b"skipped: broken.png" in done.stderr
    if not torch.cuda.is_available():
        assert done.stderr.count(b"no CUDA GPU") == 1


def piped(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A line of the shell in which `qwen-vit` is a process of this checkout."""
    shell = f'qwen-vit() {{ "{sys.executable}" -m qwen_vit "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", shell],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        timeout=120,
    )


def in_a_terminal(command: str, folder: Path) -> str:
    """What a terminal is sent by a line of the shell."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shell = f'qwen-vit() {{ "{sys.executable}" -m qwen_vit "$@"; }}; {command}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        ["bash", "-c", shell], cwd=folder, env=environment, stdin=theirs, stdout=theirs,
        stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    sent = b""
    try:
        while piece := os.read(ours, 65536):
            sent += piece
    except OSError:  # how a terminal says that nobody is left to write to it
        pass
    os.close(ours)
    child.wait(60)
    return sent.decode()


def test_a_reader_that_has_seen_enough_changes_nothing(folder: Path) -> None:
    """`| head -0` ended in 1: finished, with images skipped."""
    done = piped("qwen-vit info tiny | exec 0<&-; echo ${PIPESTATUS[0]}", folder)
    assert (done.stdout, done.stderr) == (b"0\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_an_error_and_logs_are_no_reason_to_stop(
    folder: Path,
) -> None:
    done = piped("qwen-vit info tiny >/dev/full", folder)
    assert done.returncode == 2
    assert done.stderr == (
        b"error: standard output could not be written (No space left on device). Check its "
        b"target.\n"
    )
    line = "qwen-vit encode a.png broken.png --model tiny --device cpu --out f.safetensors"
    done = piped(f"{line} 2>/dev/full", folder)
    assert (done.returncode, done.stdout.count(b"wrote f.safetensors")) == (1, 1)


def test_a_closed_stderr_is_as_good_as_any(folder: Path) -> None:
    """Nothing was encoded, and nothing could say why."""
    line = "qwen-vit encode a.png broken.png --model tiny --device cpu --out f"
    done = piped(f"{line} 2>&-", folder)
    assert (done.returncode, done.stdout.count(b"wrote f")) == (1, 1)
    assert load_features("f").ids == ["a.png"]


def test_what_is_skipped_stands_on_a_line_of_its_own_above_the_bar(folder: Path) -> None:
    line = "qwen-vit encode a.png broken.png b.jpg --model tiny --device cpu --out f"
    done = in_a_terminal(line, folder)
    assert "3/3" in done
    assert re.search(r"(^|[\r\n])\s*skipped: broken\.png: a truncated PNG[^|]*\n", done)


# Starting


def test_no_argument_at_all_is_a_request_for_help(run: Any) -> None:
    """Newer versions of click raise it as an error, which was printed on one line."""
    bare, asked = run(), run("--help")
    assert bare == asked
    assert bare.code == 0
    assert "\nCommands:\n" in bare.out


STARTED = """
import sys
from qwen_vit.__main__ import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
slow = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers", "triton"}
sys.stderr.write(f"\\n{code or 0} {sorted(slow & set(sys.modules))}")
"""


def cpu_seconds(*arguments: str) -> tuple[float, str]:
    """User and system time of a Python process, the least of three, and its stderr."""
    least, said = float("inf"), ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least, said = min(least, spent), done.stderr
    return least, said


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *((([name, "--help"], 0)) for name in cli_module.COMMANDS),
        (["encod"], 2),
        (["--hepl"], 2),
        (["encode", "a.png", "--modle", "tiny"], 2),
        (["compare", "a.png", "--model", "tiny", "--attention", "fast"], 2),
        (["bench", "--model", "tiny", "--workload", "2 x 448^2"], 2),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_help_and_typos_answer_at_once(arguments: list[str], code: int) -> None:
    """They took 1.8 s, nearly all of it to import torch."""
    seconds, said = cpu_seconds("-c", STARTED, *arguments)
    print(f"{seconds:.3f} s")
    assert said.splitlines()[-1] == f"{code} []"
    assert seconds < 0.4


def test_importing_the_package_takes_no_time() -> None:
    seconds, _ = cpu_seconds("-c", "import qwen_vit")
    print(f"{seconds:.3f} s")
    assert seconds < 0.1


def test_a_typo_is_answered_with_the_commands_that_are_alike(run: Any) -> None:
    """Names of commands that have not been imported are known as well."""
    done = run("encod")
    assert (done.code, done.out) == (2, "")
    assert "No such command 'encod'" in done.err
    assert "'encode'" in done.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import no_such_package",
            "No module named 'no_such_package'. Install the package into this Python: pip install "
            "-e .",
        ),
        ("raise ImportError('torch is half there; install it again')", "torch is half there; "),
    ],
)
def test_a_package_that_does_not_import_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "torch.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "qwen_vit", "info", "tiny"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


# encode


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
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # aligned
    size = os.stat("f.safetensors").st_size
    assert last == f"wrote f.safetensors ({size:,} bytes)"


def test_the_file_holds_what_encode_returns(folder: Path, run: Any) -> None:
    assert run("encode", "a.png", "b.jpg", *TO_FILE).code == 0
    written = load_features("f.safetensors")
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    for there, name in zip(written, ["a.png", "b.jpg"], strict=True):
        [expected] = encoder.encode([name])
        assert there.id == name
        assert there.grid_thw == expected.grid_thw
        assert there.embeds is not None
        assert expected.embeds is not None
        assert torch.equal(there.embeds, expected.embeds)
    assert written.metadata["model"] == "tiny"


def test_a_broken_image_is_skipped_and_ends_with_1(folder: Path, run: Any) -> None:
    done = run("encode", "a.png", "broken.png", "gone.png", "b.jpg", *TO_FILE)
    assert done.code == 1
    assert "skipped: broken.png" in done.err
    assert "skipped: gone.png: does not exist" in done.err
    assert "skipped: truncated" in done.out
    assert "skipped: missing" in done.out
    assert load_features("f.safetensors").ids == ["a.png", "b.jpg"]


def test_an_image_that_may_not_be_read_is_skipped_like_any_other(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was refused as bad usage, and the good images with it."""
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
    assert "b.jpg: its embeddings hold NaN or infinity" in done.err
    if on_error == "skip":
        assert "skipped: not-finite" in done.out
        assert load_features("f.safetensors").ids == ["a.png"]
    else:
        assert not Path("f.safetensors").exists()


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("refused only after the model was loaded")


REFUSED = {
    "exists": (
        ("a.png", "--out", "old.safetensors"),
        ("old.safetensors: already exists. Pass --overwrite", "another --out."),
    ),
    "no folder": (("a.png", "--out", "no/f.safetensors"), ("no: not a folder. Create it first.",)),
    "folder is a file": (("a.png", "--out", "a.png/f"), ("a.png: not a folder. Create it first.",)),
    "is a folder": (
        ("a.png", "--out", "sub", "--overwrite"),
        ("sub: a folder. Expected a file to write. Pass another --out.",),
    ),
    "twice": (
        ("a.png", "b.jpg", "a.png", "--out", "f"),
        ("a.png: given twice. Expected each image once. Leave one",),
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
        ("a.safetensors: one of the images. Pass another --out.",),
    ),
    "twice by two names": (("a.png", "./a.png", "--out", "f"), ("a.png: given twice.",)),
    "another format": (
        ("a.png", "--out", "f.pt"),
        ("f.pt: its suffix is .pt. Expected .safetensors,", "Pass --out f.safetensors."),
    ),
    "no image": (("sub", "--out", "f"), ("no image found in sub. Expected",)),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_could_not_be_written_is_refused_before_any_work(
    folder: Path, run: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite put a file in the place of /dev/null, and of an image that was to be encoded."""
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
    monkeypatch.setattr(checks.os, "access", lambda path, mode: mode != os.W_OK)
    done = run("encode", "a.png", "--model", "tiny", "--out", "f.safetensors")
    assert done.code == 2
    assert ".: not writable. Check its permissions." in done.err


def test_a_disk_that_fails_at_the_end_is_an_error_of_one_line(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file_module.os, "fsync", full)
    before = sorted(os.listdir())
    done = run("encode", "a.png", *TO_FILE)
    assert (done.code, done.out) == (2, "")
    assert "error: f.safetensors: could not be written (No space left on device)" in done.err
    assert sorted(os.listdir()) == before


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
    "unknown model": (("encode", "a.png", "--model", "tinny", "--out", "f"), "'tinny' is neither"),
    "float16": (("encode", "a.png", *TO_FILE, "--dtype", "float16"), "float16 is refused"),
    "device": (("encode", "a.png", *TO_FILE, "--device", "tpu"), "device is 'tpu'"),
    "limits": (("encode", "a.png", *TO_FILE, "--max-pixels", "9"), "Pass other min_pixels"),
    "bench on a CPU": (  # before any weights are looked for
        ("bench", "--model", "no-such/model", "--local-files-only", "--device", "cpu"),
        "Use a GPU.",
    ),
    "info without": (("info",), "Missing argument 'MODEL|FEATURES'"),
    "odd name": (("info", "tiny", "--image", "\x1b[31mred\n"), r"'\x1b[31mred\n': does not exist"),
    "no name": (("info", "tiny", "--image", ""), "'': does not exist"),
}


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_bad_usage_ends_with_2_and_says_why(folder: Path, run: Any, fault: str) -> None:
    arguments, words = BAD_USAGE[fault]
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "Traceback" not in done.err


def test_what_the_system_refuses_unforeseen_is_one_line(
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


WARNED = """
import logging, sys
import huggingface_hub.utils.logging
from qwen_vit.cli import main as cli
sys.argv = ["qwen-vit", "--version"]
cli.main()
for name in ("huggingface_hub.utils", "qwen_vit", "another"):
    logging.getLogger(name).warning(name)
"""


def test_every_library_warns_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARNED], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "huggingface_hub.utils\nqwen_vit\nanother\n")


def test_a_folder_without_weights_is_no_download(folder: Path, run: Any) -> None:
    done = run("download", ".")
    assert (done.code, done.out) == (2, "")
    assert "no weights" in done.err


INTERRUPTED_TORCH = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:  # as numpy takes it for a part that is missing, and goes on
    pass
"""


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Processes started by a shell's `&` ignore them, and so would their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_an_interrupt_while_torch_is_imported_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)  # as Ctrl-C does, in the middle of it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["qwen-vit"].partition(":")
    installed = f"import sys; from {module} import {function}; sys.exit({function}())"  # pip's
    for command in (["-m", "qwen_vit", "info", "tiny"], ["-c", installed, "info", "tiny"]):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], *([name, "--help"] for name in cli_module.COMMANDS)]
)
def test_help_shows_examples_that_parse(run: Any, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if line.startswith("  qwen-vit ")]
    assert len(lines) >= 2
    for _, name, *rest in map(shlex.split, lines):
        command = cli_module.cli.get_command(click.Context(cli_module.cli), name)
        assert command is not None
        # raises for an option that is not there; click keeps the first help option that it makes
        context = command.make_context(name, rest, help_option_names=["-h", "--help"])
        given = context.params
        assert given["model"] or given["inputs"] or given["resume"]


def test_version_is_the_packages(run: Any) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"qwen-vit, version {__version__}\n")


# info


def test_info_describes_tiny(run: Any) -> None:
    done = run("info", "tiny", "--json")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert (facts["model"], facts["licence"], facts["tensors"]) == ("tiny", "Apache-2.0", 66)
    assert "model.safetensors" in facts["files"]
    assert facts["vision_config"]["out_hidden_size"] == 192
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    assert facts["weights_sha256"] == encoder.metadata()["weights_sha256"]
    assert facts["config_sha256"] == encoder.metadata()["config_sha256"]
    assert facts["parameters"] == sum(t.numel() for t in encoder.checkpoint.tensors.values())

    listed = run("info", "tiny")
    lines = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in listed.out.splitlines()
                 if re.search(r"\S\s{2,}\S", line))  # fmt: skip
    assert lines["licence"] == "Apache-2.0"
    assert lines["out_hidden_size"] == "192"
    assert "commit" not in lines  # a folder has none
    assert "None" not in listed.out


def test_info_counts_the_tokens_that_encode_gives(folder: Path, run: Any) -> None:
    done = run("info", "tiny", "--image", CHELSEA, "--json")
    image = json.loads(done.out)["image"]
    assert image["size_px"] == [300, 451]
    assert (image["grid_thw"], image["patches"], image["tokens"]) == ([1, 22, 32], 704, 176)
    assert image["format"] == "PNG"
    encoded = run("encode", CHELSEA, *TO_FILE, "--json")
    assert json.loads(encoded.out)["images"][0]["tokens"] == 176


def test_info_on_a_broken_image_or_checkpoint_ends_with_2(folder: Path, run: Any) -> None:
    done = run("info", "tiny", "--image", "broken.png")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: broken.png")
    write_checkpoint(folder / "model", SMALL)
    weights = folder / "model" / "model.safetensors"
    assert run("info", "model").code == 0
    weights.write_bytes(weights.read_bytes()[:-100])
    torn = run("info", "model")
    assert (torn.code, torn.out) == (2, "")
    assert "error: " in torn.err
    assert "model/model.safetensors" in torn.err
    assert "Traceback" not in torn.err
