"""Fixtures that more than one wing uses."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen_vit.cli import main as cli_module


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def qwen_vit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run `qwen-vit ARGUMENTS` in this process."""

    def command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["qwen-vit", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli_module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Done(code or 0, captured.out, captured.err)

    return command
