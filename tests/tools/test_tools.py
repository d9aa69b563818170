"""Test that every tool has help, and that measurements become ledger rows."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from tests.support import ROOT
from tools import common

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "tools").rglob("*.py")
    if "__main__" in path.read_text()
)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += [ROOT / "weights" / "README.md"]


def test_there_are_commands() -> None:
    assert {"tools.benchmarks.tower", "tools.checks.trust", "tools.make_tiny"} <= {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name: str) -> None:
    main = importlib.import_module(name).main
    assert isinstance(main, click.Command)
    done = CliRunner().invoke(main, ["--help"], catch_exceptions=False)
    assert done.exit_code == 0
    assert main.help
    assert "--help" in done.output


@pytest.mark.slow
def test_a_command_runs_from_the_top_of_the_checkout() -> None:
    command = [sys.executable, "-m", "tools.benchmarks.tower", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage: python -m tools.benchmarks.tower [OPTIONS]" in done.stdout
    assert "python -m tools.benchmarks.tower --ledger" in done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_a_document_names_exists(path: Path) -> None:
    named = set(re.findall(r"python -m (tools[\w.]*\w)", path.read_text("utf-8")))
    assert named <= {name.removesuffix(".__main__") for name in COMMANDS}


def test_the_fast_tests_exist_and_run_every_subpackage() -> None:
    """A subpackage without a listed test file must have doctests."""
    script = (ROOT / "tools" / "test").read_text("utf-8")
    [assignment] = re.findall(r"^fast=\(.*?\)", script, re.MULTILINE | re.DOTALL)
    shell = f'{assignment}\nprintf "%s\\n" "${{fast[@]}}"'  # bash expands {a,b}
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, check=True)
    listed = done.stdout.decode().split()
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert "qwen_vit" in listed
    subpackages = {path.parent for path in (ROOT / "qwen_vit").rglob("__init__.py")}
    undocumented = [
        subpackage.name
        for subpackage in subpackages
        if not any(">>>" in path.read_text("utf-8") for path in subpackage.glob("*.py"))
    ]
    assert undocumented == []


def test_the_test_command_explains_itself() -> None:
    done = subprocess.run(
        [ROOT / "tools" / "test", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: ./tools/test [--fast | --all] [ARGUMENTS OF PYTEST]\n")
    assert {"--fast", "--all"} <= {
        *re.findall(r"^  ./tools/test (--\w+)", done.stdout, re.MULTILINE)
    }


def test_tools_neither_change_sys_path_nor_import_tests() -> None:
    for path in (each for folder in ("tools", "tests") for each in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert not re.search(r"^ *(from|import) [\w.]*\btest_\w+", text, re.MULTILINE), path
        if path.name != "test_tools.py":
            assert not re.search(r"sys\.path\b(?!\w)|runpy|E402", text), path


def test_a_row_has_benchmark_date_machine_and_versions(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    row = common.ledger_row("load", "abc1234", "cpu", ("click",), ms=common.four_digits(1.23456))
    common.publish(row, ledger)
    common.publish(row, ledger)
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == [row, row]
    assert list(row) == ["what", "date", "commit", "device", "cpu_cores", "versions", "ms"]
    assert (row["device"], row["ms"]) == ("cpu", 1.235)
    assert row["versions"].keys() == {"python", "torch", "click"}
    assert row["versions"]["torch"] == torch.__version__


def test_the_commit_is_the_checkout_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{7,}|unknown", common.head_commit())
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.head_commit() == "unknown"


def test_a_tool_that_needs_a_gpu_reports_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.default_device() == torch.device("cpu")
    with pytest.raises(click.ClickException, match="NVIDIA GPU: torch finds none; try --list"):
        common.require_gpu("; try --list")
