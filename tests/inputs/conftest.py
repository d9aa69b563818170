"""Provide the current folder of a test of inputs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vit.inputs import parquet_rows as parquet_module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parquet_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    readers = parquet_module._Readers()
    monkeypatch.setattr(parquet_module, "_READERS", readers)
    yield tmp_path
    for reader in readers._readers:
        reader.close()
