"""Provide helpers for the tests of checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.config import ImageConfig
from qwen_vit.errors import CheckpointError
from tests.support.checkpoints import (
    SMALL,
    random_tensors,
    split_qkv,
)

IMAGE_CONFIG = ImageConfig.from_json({})
QKV = "blocks.0.attn.qkv.weight"
NORM_OF_A_BLOCK = re.compile(r"blocks\.\d+\.norm[12]\.weight")


def refusal(folder: Path) -> str:
    """Return the message of the error from loading the folder."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def given(prefix: str = "visual.", **changes: Any) -> dict[str, Any]:
    """Return the tensors of a tower under a prefix, and a tensor of a language model."""
    tensors = random_tensors(SMALL)
    stored = split_qkv(tensors) if prefix == "thinker.visual." else tensors
    stored = {prefix + name: tensor for name, tensor in stored.items()}
    others = {"lm_head.weight": torch.zeros(2)} if prefix else {}
    return stored | others | {name.replace("__", "."): value for name, value in changes.items()}
