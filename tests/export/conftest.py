"""Folders of images that a test exports."""

from pathlib import Path

import pytest

from tests.support.export_stress import tiny_png
from tests.support.growing_exports import write
from tests.support.interrupted_exports import COUNT


@pytest.fixture
def growing_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images in p; 3.png and 7.png are broken."""
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
