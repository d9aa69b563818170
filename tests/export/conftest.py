"""Provide folders of images to export, and a store for exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.export_stress import tiny_png
from tests.support.growing_exports import write
from tests.support.interrupted_exports import COUNT

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


@pytest.fixture
def growing_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ten images in p, of which 3.png and 7.png are broken."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(10):
        write(f"p/{number}.png", tiny_png(number)[: 50 if number in (3, 7) else None])
    return tmp_path


@pytest.fixture
def hundred_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(COUNT):
        data = tiny_png(number)
        Path(f"p/{number:03}.png").write_bytes(data[:50] if number % 13 == 5 else data)
    return tmp_path


@pytest.fixture
def server(
    running: S3Server, export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[S3Server]:
    """Return the empty server without faults, and set a scratch folder for this test."""
    from tests.support.remote_exports import on_host  # this import loads moto, which few tests need

    running.fault, running.hidden, running.ignores_conditions = lambda _: None, None, False
    running.delete("out")
    running.requests.clear()
    on_host(monkeypatch, export_dir / "host")
    yield running
    running.fault, running.hidden = lambda _: None, None
