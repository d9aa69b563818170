"""Provide the command line in this process."""

from typing import Any

import pytest


@pytest.fixture
def run(qwen_vit: Any) -> Any:
    """Run `qwen-vit ARGUMENTS`."""
    return qwen_vit
