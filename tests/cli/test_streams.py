"""Test the command in separate processes, with streams, pipes and terminals."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from qwen_vit.feature_files.read import load_features
from tests.support import ROOT
from tests.support.commands import TO_FILE


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


# Separate processes


def test_the_module_encodes_in_a_separate_process(folder: Path) -> None:
    """Test names that are not Unicode, names with a dash in front, and a terminal with only
    ASCII."""
    names = [b"caf\xe9\xff.png", b"-dash.png", "猫\n.png".encode()]
    for name in names:
        shutil.copy(b"a.png", name)
    options = [each.encode() for each in TO_FILE]
    done = process("encode", *options, "--", *names, folder=folder, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    lines = done.stdout.decode().splitlines()  # raises for invalid UTF-8
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
    """Run a shell line in which `qwen-vit` is a process of this checkout."""
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
    """Return the output of a shell line to a terminal."""
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
    except OSError:  # the terminal's end: the process has closed it
        pass
    os.close(ours)
    child.wait(60)
    return sent.decode()


@pytest.mark.parametrize("arguments", ["info tiny", "--help", "encode -h", "--version"])
def test_a_reader_that_closes_the_pipe_does_not_change_the_exit_code(
    folder: Path, arguments: str
) -> None:
    """`| head -0` once ended with exit code 1, which means skipped images."""
    done = piped(f"qwen-vit {arguments} | exec 0<&-; echo ${{PIPESTATUS[0]}}", folder)
    assert (done.stdout, done.stderr) == (b"0\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_unwritable_output_is_an_error_and_unwritable_logs_are_not(
    folder: Path,
) -> None:
    for arguments in ("info tiny", "--help", "encode -h", "--version", ""):
        done = piped(f"qwen-vit {arguments} >/dev/full", folder)
        assert done.returncode == 2
        assert done.stderr == (
            b"error: standard output could not be written (No space left on device). Check its "
            b"target.\n"
        )
    line = "qwen-vit encode a.png broken.png --model tiny --device cpu --out f.safetensors"
    done = piped(f"{line} 2>/dev/full", folder)
    assert (done.returncode, done.stdout.count(b"wrote f.safetensors")) == (1, 1)


def test_the_command_works_with_a_closed_stderr(folder: Path) -> None:
    """The command once encoded no image and could not report the reason."""
    line = "qwen-vit encode a.png broken.png --model tiny --device cpu --out f"
    done = piped(f"{line} 2>&-", folder)
    assert (done.returncode, done.stdout.count(b"wrote f")) == (1, 1)
    assert load_features("f").ids == ["a.png"]


def test_a_skipped_image_has_a_separate_line_above_the_progress_bar(folder: Path) -> None:
    line = "qwen-vit encode a.png broken.png b.jpg --model tiny --device cpu --out f"
    done = in_a_terminal(line, folder)
    assert "3/3" in done
    assert re.search(r"(^|[\r\n])\s*skipped: broken\.png: a truncated PNG[^|]*\n", done)


@pytest.mark.parametrize("command", ["encode - --out f.safetensors", "export - --out f"])
def test_a_list_on_a_closed_stdin_is_an_error_of_one_line(folder: Path, command: str) -> None:
    """Some supervisors start jobs without a standard input; this once printed a traceback."""
    done = piped(f"qwen-vit {command} --model tiny --device cpu <&-", folder)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: standard input: closed. Pipe a list of paths into it.\n"
