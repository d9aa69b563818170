"""Provide a file and a folder of features."""

from pathlib import Path

import pytest

from tests.support.reading_stress import Folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "export").write()
