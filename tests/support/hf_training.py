"""Compute the loss and gradients of small models, and compare two models."""

from typing import Any

import torch
from torch import Tensor

from qwen_vit.compare.tolerance import relative_error
from tests.support.hf_models import (
    GRIDS,
    tower_of,
    vision_inputs,
)
from tests.support.towers import random_rows

ROUNDING = 1e-5  # both towers are in float32; a float32 loss has about 1e-7


def loss_of(model: Any, family: str) -> Tensor:
    inputs = vision_inputs(family)
    return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


def gradients(model: Any, family: str) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, family).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ones: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ones
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        assert relative_error(one, others[name]) < 10 * ROUNDING, name


def logits_of(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**vision_inputs(family), use_cache=False).logits


def merged_by(tower: Any) -> Tensor:
    """Return a tower's result for the same two random images."""
    with torch.no_grad():
        return tower(random_rows(104, 3), grid_thw=torch.tensor(GRIDS)).pooler_output


def merged_of(model: Any) -> Tensor:
    return merged_by(tower_of(model))
