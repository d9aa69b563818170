"""Make a tower of two blocks with the published width, on a GPU."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qwen_vit.config import Grid, VisionConfig
from qwen_vit.model import VisionTower, plan_layout
from tests.support.checkpoints import random_tensors
from tests.support.towers import build_tower

CUDA = torch.device("cuda")


# One window and one full block of the published widths.
CONFIG = VisionConfig.from_json(
    {"model_type": "qwen2_5_vl", "out_hidden_size": 3584, "depth": 2, "fullatt_block_indexes": [1]}
)


@cache
def published_width(dtype: torch.dtype) -> VisionTower:
    return build_tower(random_tensors(CONFIG), CONFIG, dtype=dtype, device=CUDA)


def embeddings(tower: VisionTower, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
    block: Any = tower.blocks[0]
    weight = block.attn.qkv.weight
    layout = plan_layout(grids, tower.config, weight.device, weight.dtype)
    with torch.no_grad():
        return tower(pixels, layout.to(weight.device))
