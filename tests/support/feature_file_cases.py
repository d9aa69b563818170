"""Edit feature files for tests."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.feature_files.read import load_features
from qwen_vit.features import FailedImage


def failed(name: str) -> FailedImage:
    return FailedImage(name, ImageError("ends early", name=name, code="truncated"))


def refused(path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        load_features(path)
    message = str(caught.value)
    assert caught.value.name.startswith(str(path))
    assert message.startswith(caught.value.name)
    return message


def set_fact(name: str, value: Any) -> Any:
    """Convert a change of a file's facts to a function that edits facts and tensors."""
    return lambda facts, tensors: facts.__setitem__(name, value)


def poison(file: Path, row: int = 0) -> None:
    """Put a NaN into a row of a feature file."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["image_embeds"][row, 3] = float("nan")
    save_file(tensors, file, metadata)
