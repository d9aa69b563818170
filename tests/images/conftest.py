"""Provide the resize kernels in Triton's interpreter, for tests without a GPU."""

from typing import Any

import pytest

from qwen_vit.kernels import resize
from tests.support.triton_interpreter import interpreted_by_triton


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(kernel: Any, n_programs: int, *args: Any, **constants: int) -> None:
        if n_programs:
            interpreted_by_triton(kernel)((n_programs,), *args, **constants)

    monkeypatch.setattr(resize, "_run", run)
    monkeypatch.setattr(resize, "ROWS", 64)  # the interpreter is faster with few large programs
    monkeypatch.setattr(resize, "PATCHES", 16)
