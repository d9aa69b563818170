"""Provide a config and a failing tower for the tests of CUDA graphs."""

from functools import cache
from typing import Any

import torch

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.layout import Layout
from tests.support.goldens import TINY_FOLDER

GridTuple = tuple[int, int, int]
CUDA = torch.device("cuda", 0)


@cache
def config() -> object:
    return load_checkpoint(TINY_FOLDER).config


class Faulty:
    """Provide a tower that fails during or before the capture."""

    def __init__(self, tower: Any, error: BaseException, fails_at: int) -> None:
        self.tower, self.error, self.fails_at, self.calls = tower, error, fails_at, 0
        self.angles = None

    def __call__(self, pixels: torch.Tensor, layout: Layout) -> torch.Tensor:
        self.calls += 1
        result: torch.Tensor = self.tower(pixels, layout)
        if self.calls == self.fails_at:
            raise self.error
        return result


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
