"""Provide transformers' own tower for tests, also from a folder."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_vit.compare import huggingface as reference
from qwen_vit.compare.huggingface import hf_trace
from tests.support.goldens import TINY_FOLDER
from tests.support.oracle import read_checkpoint

__all__ = ["hf_tower", "hf_trace", "tiny_hf_tower"]


def hf_tower(
    folder_or_tensors: Path | str | Mapping[str, Tensor],
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn: str = "sdpa",
) -> Any:
    """Build the tower from a folder, or from bare-named tensors and a config."""
    if isinstance(folder_or_tensors, Mapping):
        return reference.hf_tower(folder_or_tensors, config, dtype, device, attn)
    tensors, own_config = read_checkpoint(folder_or_tensors)
    return reference.hf_tower(tensors, config or own_config, dtype, device, attn)


@cache
def tiny_hf_tower() -> Any:
    """Return transformers' tower with the weights of tiny, in float32."""
    return hf_tower(TINY_FOLDER)
