"""`qwen-vit` in this process: exit code, standard output, standard error."""

import logging
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from qwen_vit.cli import main as cli_module

__all__ = ["Done", "runner"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs `qwen-vit ARGUMENTS`."""

    def command(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["qwen-vit", *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # so that the command sets its own
        capsys.readouterr()
        code: Any = 0
        try:
            cli_module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Done(code or 0, captured.out, captured.err)

    return command
