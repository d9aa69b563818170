"""Provide the fixtures that several folders of tests use."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qwen_vit.compare import plots
from qwen_vit.show import draw
from tests.support.commands import Done, run_command
from tests.support.encoders import tiny
from tests.support.export_stress import tiny_png

if TYPE_CHECKING:
    from qwen_vit.encoder import VisionEncoder
    from tests.support.s3_server import S3Server


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """Restore the log level, because commands in this process set it."""
    logger = logging.getLogger("qwen_vit")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def qwen_vit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run `qwen-vit ARGUMENTS` in this process."""

    def command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # the command adds its own
        return run_command(monkeypatch, capsys, *arguments)

    return command


@pytest.fixture(scope="session")
def encoder() -> VisionEncoder:
    return tiny()


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    """Run an S3 server on loopback."""
    from tests.support.s3_server import s3_server  # imports moto, which few tests need

    with s3_server() as server:
        yield server


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw every picture as one pixel, for a test of a page's text."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    for module in (draw, plots):
        monkeypatch.setattr(module, "figure_png", lambda *_, **__: file.getvalue())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with two small images and a broken image."""
    for name, width in (("a.png", 56), ("b.jpg", 84)):
        values = np.random.default_rng(width).integers(0, 256, (56, width, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def export_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with ten good images and an eleventh, broken image."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(10):
        Path(f"p/{number}.png").write_bytes(tiny_png(number))
    Path("p/x.png").write_bytes(tiny_png(1)[:50])
    return tmp_path
