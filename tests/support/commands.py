"""Run commands in this process, and define arguments that many tests pass."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen_vit.cli import main as cli

TO_FILE = ("--model", "tiny", "--device", "cpu", "--out", "f.safetensors")


class Done(NamedTuple):
    """Hold the result of a finished command."""

    code: int
    out: str
    err: str


def run_command(
    monkeypatch: pytest.MonkeyPatch,
    capture: pytest.CaptureFixture[str],
    *arguments: str | Path,
) -> Done:
    """Run `qwen-vit ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["qwen-vit", *map(str, arguments)])
    capture.readouterr()
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    captured = capture.readouterr()
    return Done(code or 0, captured.out, captured.err)
