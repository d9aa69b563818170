"""Test torch.compile with a model that has our tower."""

from typing import Any

import pytest
import torch

from qwen_vit.compare.tolerance import relative_error
from tests.support.hf_models import (
    GRIDS,
    tower_of,
)
from tests.support.hf_training import (
    ROUNDING,
    assert_near,
    gradients,
    logits_of,
    loss_of,
    merged_of,
)
from tests.support.towers import random_rows


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_answer(trainable: tuple[Any, Any], family: str) -> None:
    """The graph breaks at the tower, because its kernels are already compiled."""
    _, swapped = trainable
    expected = logits_of(swapped, family)
    torch._dynamo.reset()
    compiled: Any = torch.compile(swapped, backend="eager")
    assert relative_error(logits_of(compiled, family), expected) < ROUNDING
    names = {key.removeprefix("_orig_mod.") for key in compiled.state_dict()}
    assert names == set(swapped.state_dict())


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(trainable: tuple[Any, Any], family: str) -> None:
    _, swapped = trainable
    expected = gradients(swapped, family)
    torch._dynamo.reset()
    compiled: Any = torch.compile(swapped, backend="aot_eager")
    compiled.zero_grad()
    loss_of(compiled, family).backward()
    made = {n: p.grad for n, p in swapped.named_parameters() if p.grad is not None}
    assert_near(made, expected)


@pytest.mark.slow
def test_inductor_compiles_the_model_around_the_tower(
    trainable: tuple[Any, Any], family: str
) -> None:
    _, swapped = trainable
    expected = logits_of(swapped, family)
    torch._dynamo.reset()
    swapped.compile()
    assert relative_error(logits_of(swapped, family), expected) < ROUNDING


def test_a_compiled_tower_alone_is_the_tower(trainable: tuple[Any, Any]) -> None:
    tower = tower_of(trainable[1])
    torch._dynamo.reset()
    compiled: Any = torch.compile(tower, backend="eager")
    with torch.no_grad():
        made = compiled(random_rows(104, 3), grid_thw=torch.tensor(GRIDS)).pooler_output
    assert torch.equal(made, merged_of(trainable[1]))


def test_a_whole_graph_is_refused_by_torch(trainable: tuple[Any, Any], family: str) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(tower_of(trainable[1]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(random_rows(104, 3), grid_thw=torch.tensor(GRIDS))
