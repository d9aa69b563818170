"""Test the output of tools/demo and tools/install for a new user."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support import ROOT

# A virtual environment whose fake pip prints as much as the real pip, without a delay.
PYTHON = """#!/usr/bin/env bash
case "$*" in
"-m pip --version") exit 0 ;;
"-m pip install"*)
    for package in torch triton numpy; do
        for line in 1 2 3 4 5 6 7 8 9; do echo "Collecting $package>=2.$line"; done
        echo "  Downloading $package-2.13.0-cp311-manylinux_2_27_x86_64.whl (532.1 MB)"
        sleep 0.3
    done
    echo "$*" >>pip-was-called
    [[ ! -e broken ]] || { echo "ERROR: No matching distribution found for torch"; exit 1; }
    ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout with tools/install and a fake environment."""
    for file in ("tools/install", "tools/demo", "tools/constraints.txt", "pyproject.toml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def install(checkout: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["./tools/install", *extra], cwd=checkout, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def test_installing_is_one_line_in_a_log(checkout: Path) -> None:
    """The output once had 60 lines from pip."""
    done = install(checkout, "show")
    assert (done.returncode, done.stdout) == (0, "")
    assert (
        done.stderr
        == "Installing into .venv; the first time takes 1 to 10 minutes, and longer with dev\n"
    )
    assert "-e .[show]" in (checkout / "pip-was-called").read_text()
    assert "Collecting torch" in (checkout / ".venv" / "install.log").read_text()


def test_a_log_shows_the_progress_of_pip(checkout: Path) -> None:
    """The log once showed nothing for minutes."""
    script = checkout / "tools" / "install"
    script.write_text(script.read_text().replace("every=10", "every=1"))
    pip = checkout / ".venv" / "bin" / "python"
    pip.write_text(PYTHON.replace("sleep 0.3", "sleep 0.6"))
    first, *lines = install(checkout).stderr.splitlines()
    assert first.startswith("Installing into .venv")
    assert lines
    assert all(re.fullmatch(r" +\d s: \d packages?, downloading \w+", line) for line in lines)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("Obtaining file:///home/you/qwen_vit", "starting pip"),
        ("  Installing build dependencies: started", "installing build tools"),
        ("  Preparing editable metadata (pyproject.toml): started", "reading pyproject.toml"),
        ("Requirement already satisfied: click>=8.2 in ./.venv/lib (8.5.1)", "resolving click"),
        ("Collecting rpds-py>=0.25.0 (from ray)", "1 package, resolving rpds-py"),
        ("Processing /wheels/av-18.1.0-cp311-abi3-any.whl", "1 package, resolving av"),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken: /whl/cpu/av/",
            "waiting for the package index: av",
        ),
        ("Installing collected packages: mpmath, torch, triton", "installing"),
    ],
)
def test_each_step_of_pip_is_shown(checkout: Path, line: str, seen: str) -> None:
    """The output once was "0 packages, resolving" for 70 seconds."""
    log = checkout / "log"
    log.write_text(f"Looking in indexes: https://pypi.org/simple\n{line}\n")
    script = (ROOT / "tools" / "install").read_text()
    [function] = re.findall(r"^progress\(\) \{\n.*?^\}$", script, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", f'{function}\nprogress "$1"', "bash", log], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (seen, "")


def test_a_terminal_shows_downloads_on_one_line(checkout: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(["./tools/install"], cwd=checkout, stderr=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # the child process has closed the terminal
        pass
    os.close(ours)
    assert child.wait(60) == 0
    assert seen.count(b"\n") == 1
    assert re.search(rb"\r\x1b\[K +\d s: \d packages?, downloading \w+\r", seen)
    assert seen.endswith(b"\r\x1b[K")  # the next output starts on an empty line


def test_a_second_run_does_nothing(checkout: Path) -> None:
    install(checkout, "dev")
    for extra in (("dev",), (), ("show",)):  # dev includes every other extra
        assert install(checkout, *extra).stderr == ""
    assert len((checkout / "pip-was-called").read_text().splitlines()) == 1
    (checkout / "tools" / "constraints.txt").write_text("torch==2.14\n")
    assert "Installing" in install(checkout, "show").stderr


def test_an_error_of_pip_is_shown_and_the_next_run_retries(checkout: Path) -> None:
    (checkout / "broken").touch()
    done = install(checkout)
    assert done.returncode == 2
    assert "ERROR: No matching distribution found for torch" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pip could not install the package. All of its")
    (checkout / "broken").unlink()
    assert install(checkout).returncode == 0


def pixels(path: Path) -> NDArray[np.int16]:
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture, np.int16)


@pytest.mark.slow
def test_the_demo_writes_a_page_and_pictures_and_prints_their_place(checkout: Path) -> None:
    shutil.copytree(ROOT / "tests" / "photographs", checkout / "tests" / "photographs")
    command = checkout / ".venv" / "bin" / "qwen-vit"
    command.write_text(
        f'#!/usr/bin/env bash\nPYTHONPATH={ROOT} exec {sys.executable} -m qwen_vit "$@"\n'
    )
    command.chmod(0o755)
    done = subprocess.run(
        ["./tools/demo", "--device", "cpu"], cwd=checkout, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(checkout / "demo")) == [
        "01-astronaut.png", "02-chelsea.png", "03-rocket.png", "index.html",
    ]  # fmt: skip
    for words in ("wrote demo/index.html", "Open demo/index.html", "random", "qwen-vit show YOUR"):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 25
    assert "were never trained" in (checkout / "demo" / "index.html").read_text("utf-8")
    # The README once showed a picture that the demo no longer drew.
    drawn = pixels(checkout / "demo" / "01-astronaut.png")
    shown = pixels(ROOT / "docs" / "features.png")
    assert drawn.shape == shown.shape, (
        "run ./tools/demo; cp demo/01-astronaut.png docs/features.png"
    )
    assert np.abs(drawn - shown).mean() < 1  # of 255: CPUs round differently
    assert "/demo/" in (ROOT / ".gitignore").read_text().splitlines()
