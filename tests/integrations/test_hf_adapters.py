"""Test that PEFT adapters of the language model work, and that the tower rejects adapters."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qwen_vit.compare.tolerance import relative_error
from qwen_vit.errors import ArgumentError
from tests.support.hf_models import (
    FAMILIES,
    tower_of,
)
from tests.support.hf_training import ROUNDING, assert_near, gradients, logits_of, loss_of


def with_adapters(model: Any, **options: Any) -> Any:
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    torch.manual_seed(0)  # PEFT draws the adapters' weights
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def test_adapters_of_the_language_model_train_save_load_and_merge(
    trainable: tuple[Any, Any], family: str, both: tuple[Any, Any], tmp_path: Path
) -> None:
    model, swapped = (with_adapters(each) for each in trainable)
    assert_near(gradients(swapped, family), gradients(model, family))
    swapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    expected = logits_of(swapped.eval(), family)
    for original in both:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
        assert relative_error(logits_of(loaded, family), expected) < ROUNDING
        merged = loaded.merge_and_unload()
        assert relative_error(logits_of(merged, family), expected) < ROUNDING
        merged.save_pretrained(tmp_path / type(tower_of(original)).__name__)
    merged = FAMILIES[family].model_class.from_pretrained(tmp_path / "HFTower")
    assert relative_error(logits_of(merged, family), expected) < ROUNDING


AIMED: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "gate_proj"]},  # layers of towers and of language models
    "tower alone": {"target_modules": r".*visual.*mlp.*"},
    "the whole tower": {"target_modules": r".*visual"},
}


@pytest.mark.parametrize("aim", AIMED)
def test_adapters_for_the_tower_are_refused_with_a_remedy(
    trainable: tuple[Any, Any], family: str, aim: str
) -> None:
    with pytest.raises(ValueError, match=r"qwen_vit's vision tower .*exclude_modules=.*merge"):
        with_adapters(copy.deepcopy(trainable[1]), **AIMED[aim])
    if aim == "list":
        model, swapped = (
            with_adapters(each, **AIMED[aim], exclude_modules=r".*visual.*") for each in trainable
        )
        assert_near(gradients(swapped, family), gradients(model, family))


def test_all_linear_layers_are_those_of_the_language_model(trainable: tuple[Any, Any]) -> None:
    names = [
        name
        for name, _ in with_adapters(trainable[1], target_modules="all-linear").named_parameters()
    ]
    assert any("gate_proj.lora_A" in name for name in names)
    assert not any("visual" in name for name in names)


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
def test_an_adapter_that_was_trained_with_the_tower_is_refused(
    trainable: tuple[Any, Any], loader: str, tmp_path: Path
) -> None:
    """Without the tower's part of the adapter, the answers would be wrong."""
    model, swapped = trainable
    with_adapters(model, target_modules=["gate_proj"]).save_pretrained(tmp_path)
    loaders: dict[str, Callable[[], object]] = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(swapped, tmp_path),
        "load_adapter": lambda: swapped.load_adapter(str(tmp_path)),
    }
    with pytest.raises(ValueError, match=r"vision tower .*merge the adapter into the checkpoint"):
        loaders[loader]()


def test_fully_trained_parts_of_the_tower_are_refused_and_the_full_tower_warns(
    trainable: tuple[Any, Any], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArgumentError, match=r"merger of .* replaced by a ModulesToSaveWrapper"):
        with_adapters(copy.deepcopy(trainable[1]), modules_to_save=["merger"])
    model = with_adapters(trainable[1], modules_to_save=["visual"])
    loss_of(model, family)
    assert "the vision tower is frozen in this training: it has no gradients" in caplog.messages
