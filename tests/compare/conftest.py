"""Provide an encoder, a golden file and the command."""

from functools import partial
from typing import Any

import pytest

from qwen_vit.compare.golden import Golden, load_golden
from qwen_vit.compare.run import compare
from tests.support.comparisons import CHELSEA, ROCKET, encoder


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Make a golden file of two photographs with Hugging Face's tower."""
    path = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    assert compare(encoder(), [CHELSEA, ROCKET], save_golden=path).passed
    return load_golden(path)


@pytest.fixture
def run(qwen_vit: Any) -> Any:
    """Run `qwen-vit compare ARGUMENTS` in this process. Return exit code, stdout, stderr."""
    return partial(qwen_vit, "compare")
