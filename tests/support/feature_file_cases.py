"""Feature files that a test edits."""

from pathlib import Path

import pytest

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
