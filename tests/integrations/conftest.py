"""Provide small models of each family, with their own tower and with our tower."""

import copy
from typing import Any

import pytest

from tests.support.hf_models import (
    FAMILIES,
    make_both,
    tower_of,
)
from tests.support.hf_setting import Setting, make_setting


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a model with its own tower, and the same model with our tower."""
    return make_both(family, tmp_path_factory.mktemp("model"))


@pytest.fixture
def trainable(both: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return the two models with frozen towers, for a test that trains the models."""
    model, swapped = copy.deepcopy(both)
    for each in (model, swapped):
        each.requires_grad_(True).train()
        tower_of(each).requires_grad_(False)
    return model, swapped


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Return images, a prompt and the answer of a small model with its own tower."""
    return make_setting(tmp_path_factory.mktemp("setting"))
