"""Test that the language model trains with our frozen tower as with transformers' frozen tower."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from qwen_vit.errors import ArgumentError
from tests.support.hf_models import (
    GRIDS,
    tower_of,
)
from tests.support.hf_training import assert_near, gradients, logits_of, loss_of, merged_of
from tests.support.towers import random_rows


def test_the_language_model_gets_the_same_gradients_with_either_tower(
    trainable: tuple[Any, Any], family: str
) -> None:
    model, swapped = trainable
    assert_near(gradients(swapped, family), gradients(model, family))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(
    trainable: tuple[Any, Any], family: str, use_reentrant: bool
) -> None:
    _, swapped = trainable
    expected = gradients(swapped, family)
    swapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    swapped.enable_input_require_grads()
    assert swapped.is_gradient_checkpointing
    assert_near(gradients(swapped, family), expected)


@pytest.mark.parametrize("optimiser", ["AdamW", "SGD"])
def test_no_optimiser_gets_or_changes_the_tower(
    trainable: tuple[Any, Any], family: str, optimiser: str
) -> None:
    """Weight decay also changes no value, although it would change a parameter with zero
    gradients."""
    model, swapped = trainable
    before, merged = tower_of(swapped).state_dict(), merged_of(swapped)
    first = float(loss_of(model, family))
    losses = []
    for each in trainable:
        steps = getattr(torch.optim, optimiser)(each.parameters(), lr=1e-2, weight_decay=0.5)
        for _ in range(3):
            loss = loss_of(each, family)
            loss.backward()
            steps.step()
            steps.zero_grad(set_to_none=False)
        losses.append(float(loss_of(each, family)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != pytest.approx(first, rel=1e-2)
    after = tower_of(swapped).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(merged_of(swapped), merged)


def test_the_tower_has_no_parameters_and_buffers(trainable: tuple[Any, Any]) -> None:
    """Parameter counts therefore cover only the other parts."""
    model, swapped = trainable
    tower = tower_of(swapped)
    assert [*tower.parameters(), *tower.buffers()] == []
    own = sum(p.numel() for p in tower_of(model).parameters())
    assert swapped.num_parameters() == model.num_parameters() - own
    assert sum(t.numel() for t in tower.state_dict().values()) == own


def test_training_logs_once_that_the_tower_is_frozen(
    trainable: tuple[Any, Any], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, swapped = trainable
    caplog.set_level(logging.WARNING, "qwen_vit")
    logits_of(swapped.train(), family)
    loss_of(swapped.eval(), family)
    assert caplog.messages == []
    for _ in range(2):
        loss_of(swapped.train(), family)
    assert caplog.messages == ["the vision tower is frozen in this training: it has no gradients"]


def test_gradients_of_the_tower_are_refused(trainable: tuple[Any, Any]) -> None:
    tower = tower_of(trainable[1])
    assert tower.requires_grad_(False) is tower
    for module in (tower, tower.merger, tower.blocks[0].attn.qkv if hasattr(
        tower.blocks[0].attn, "qkv") else tower.blocks[0].attn.q):  # fmt: skip
        with pytest.raises(
            ArgumentError, match=r"computes no gradients\. Expected .*False.* Train"
        ):
            module.requires_grad_()
    rows, grids = random_rows(104, 3).requires_grad_(), torch.tensor(GRIDS)
    with pytest.raises(
        ArgumentError, match=r"pixel rows require gradients, .*\. Pass pixel_values"
    ):
        tower(rows, grid_thw=grids)
    with torch.no_grad():
        assert not tower(rows, grid_thw=grids).pooler_output.requires_grad


@pytest.mark.parametrize("put", [nn.Linear(2, 2), nn.Parameter(torch.ones(2))], ids=type)
def test_parts_of_the_tower_cannot_be_replaced(trainable: tuple[Any, Any], put: Any) -> None:
    """The modules are only names, so the model would neither run nor save a replacement."""
    tower = tower_of(trainable[1])
    with pytest.raises(
        ArgumentError, match=r"merger of .* cannot be replaced by a .*\. Train tran"
    ):
        tower.merger = put
    with pytest.raises(ArgumentError, match=r"norm1 of .* cannot be replaced"):
        tower.blocks[0].norm1 = put
