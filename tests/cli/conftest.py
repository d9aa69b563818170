"""The command line in this process, and folders to run it in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import runner


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`qwen-vit ARGUMENTS`."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two small images and a broken one."""
    for name, width in (("a.png", 56), ("b.jpg", 84)):
        values = np.random.default_rng(width).integers(0, 256, (56, width, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    return tmp_path
