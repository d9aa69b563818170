"""What the README shows is what happens: its commands run, its types hold, its files exist.

Python blocks run one after the other in one namespace, at the checkout's top. Of the shell blocks,
each `qwen-vit` line runs in a copy of what it reads; with a model of the Hub, or marked with a
trailing comment `# GPU`, its arguments are only parsed. Other commands must exist.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from qwen_vit.checkpoint.hub import REPOSITORY
from qwen_vit.cli import main as cli_module
from tests.support.fake_engines import install_stand_ins

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text("utf-8") if README.is_file() else ""
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in ("python", "py")]


PYTHON = python_blocks(TEXT)
PAGES = [
    str(path.relative_to(ROOT))
    for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
    if path.is_file() and python_blocks(path.read_text("utf-8"))
]
SHELL = [body for language, body in FENCE.findall(TEXT) if language in ("bash", "sh", "console")]
KNOWN = ("cd", "git", "pip", "python", "python3", "source", "export", "CUDA_VISIBLE_DEVICES=0")


def commands(blocks: list[str]) -> list[str]:
    """The lines of shell blocks, continued ones joined, without prompts and comments."""
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    plain = (line.strip().removeprefix("$ ") for line in lines)
    return [line for line in plain if line and not line.startswith("#")]


COMMANDS = commands(SHELL)
OURS = re.compile(r"(\.venv/bin/)?(qwen-vit|python -m qwen_vit)\b")
QWEN_VIT = [OURS.sub("qwen-vit", line, count=1) for line in COMMANDS if OURS.match(line)]


def only_parsed(line: str) -> bool:
    words = shlex.split(line, comments=True)
    from_hub = any(REPOSITORY.fullmatch(word) and not (ROOT / word).exists() for word in words)
    return from_hub or line.endswith("# GPU")


def words_of(line: str) -> list[str]:
    """The arguments, with file patterns expanded as a shell does, from the checkout's top."""
    expanded = []
    for word in shlex.split(line, comments=True)[1:]:
        found = (
            sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(word)) if "*" in word else []
        )
        expanded += found or [word]
    return expanded


def test_there_is_a_readme_with_commands_and_python() -> None:
    assert TEXT, "README.md is missing"
    assert PYTHON
    programs = {shlex.split(line, comments=True)[0] for line in COMMANDS}
    assert {"./tools/demo", "./tools/test"} <= programs


@pytest.mark.slow
def test_the_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a copy of the checkout's data, so that files which it writes do not stay.

    Language models are stand-ins: a small random one of transformers, and engines of vLLM and
    SGLang that check what they are given.
    """
    copy_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    install_stand_ins(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(PYTHON):
        exec(compile(code_of(block), f"README.md, Python block {number}", "exec"), namespace)


def code_of(block: str) -> str:
    """A Python block without prompts."""
    return re.sub(r"^(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE) if ">>>" in block else block


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_passes_mypy_strict(page: str, tmp_path: Path) -> None:
    """All blocks of a page as one module, as a reader would paste them into a typed program."""
    blocks = python_blocks((ROOT / page).read_text("utf-8"))
    module = tmp_path / f"{Path(page).stem.lower()}_page.py"
    module.write_text("\n".join(map(code_of, blocks)), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", module],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def copy_data(folder: Path) -> None:
    shutil.copytree(ROOT / "tests" / "images", folder / "tests" / "images")
    shutil.copytree(ROOT / "weights", folder / "weights")


def with_marks(line: str) -> Any:
    """Ray takes seconds to start."""
    return pytest.param(line, marks=pytest.mark.slow) if "--ray" in line else line


@pytest.mark.parametrize("line", [*map(with_marks, QWEN_VIT)])
def test_a_command_of_the_readme_works(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words_of(line)
    if only_parsed(line):
        command = cli_module.cli.get_command(click.Context(cli_module.cli), arguments[0])
        assert command is not None
        command.make_context(arguments[0], arguments[1:])
        return
    copy_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qwen-vit", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that it starts
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not the cluster that another test lets die
    code: Any = 0
    try:
        cli_module.main()
    except SystemExit as stop:
        code = stop.code
    assert not code, capsys.readouterr().err


@pytest.mark.parametrize("line", COMMANDS)
def test_a_program_of_the_readme_exists(line: str) -> None:
    program = shlex.split(line, comments=True)[0]
    if program.startswith(("./", "tools/")):
        path = ROOT / program
        assert path.is_file(), f"{program} is not there"
        assert os.access(path, os.X_OK), f"{program} cannot be run"
    else:
        assert program.removeprefix(".venv/bin/") in (*KNOWN, "qwen-vit"), f"unknown: {line}"


def test_links_of_the_readme_that_stay_here_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", TEXT)
    assert [target for target in targets if not (ROOT / target).exists()] == []
