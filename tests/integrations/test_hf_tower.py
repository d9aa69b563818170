"""Test that our tower gives the same answers in transformers' models as transformers' own tower.

The tests cover Qwen2.5-VL and Qwen2.5-Omni's thinker, with images and videos.
"""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.generation import utils

from qwen_vit import VisionEncoder, as_hf_tower
from qwen_vit.compare.tolerance import relative_error
from qwen_vit.downstream import to_hf
from qwen_vit.errors import ArgumentError
from qwen_vit.features import ImageFeatures
from tests.support.hf_models import (
    FAMILIES,
    GRIDS,
    make_model,
    tower_of,
    vision_inputs,
)
from tests.support.hf_setting import Setting, greedy
from tests.support.towers import assert_no_worse_than, random_rows

MODALITIES = ("image", "video")


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_our_tower_gives_the_answer_of_the_models_own_to_a_prompt_of_five_images(
    setting: Setting,
) -> None:
    theirs = setting.model.model.visual
    setting.model.model.visual = as_hf_tower(setting.encoder)
    try:
        logits = setting.logits_from(**setting.pixels)
        tokens = setting.tokens_from(**setting.pixels)
    finally:
        setting.model.model.visual = theirs
    setting.assert_same_answer(logits, tokens)


@pytest.mark.parametrize("modality", MODALITIES)
def test_both_models_answer_the_same_with_our_tower(
    both: tuple[Any, Any], family: str, modality: str
) -> None:
    """Check that all tokens are equal, and that our logits' error against float64 is at most twice
    transformers' error."""
    model, swapped = both
    inputs = vision_inputs(family, modality)
    expected, logits = logits_of(model, inputs), logits_of(swapped, inputs)
    exact = logits_of(copy.deepcopy(model).double(), doubled(inputs))
    assert_no_worse_than(logits, expected, exact, factor=2)
    assert greedy(swapped, **inputs) == greedy(model, **inputs)


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_comparison_detects_rows_in_another_order(
    both: tuple[Any, Any], family: str, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, swapped = both
    inputs = vision_inputs(family, modality)
    exact = logits_of(copy.deepcopy(model).double(), doubled(inputs))
    encode = VisionEncoder.encode_patches
    monkeypatch.setattr(VisionEncoder, "encode_patches", lambda *given: encode(*given).flip(0))
    with pytest.raises(AssertionError, match="ours"):
        assert_no_worse_than(
            logits_of(swapped, inputs), logits_of(model, inputs), exact, factor=1000
        )


@pytest.mark.parametrize("modality", MODALITIES)
def test_features_are_read_from_our_tower_as_from_theirs(
    both: tuple[Any, Any], family: str, modality: str
) -> None:
    """Test get_image_features and get_video_features, with attributes or with a tuple on
    request."""
    inputs = vision_inputs(family, modality)
    rows = inputs["pixel_values" if modality == "image" else "pixel_values_videos"]
    grid = inputs[f"{modality}_grid_thw"]
    sizes = (grid.prod(-1) // 4).tolist()
    for model in both:
        get_features = getattr(model, f"get_{modality}_features")
        with torch.no_grad():
            output = get_features(rows, grid, return_dict=True)
            as_tuple = get_features(rows, grid, return_dict=False)
        assert [len(part) for part in output.pooler_output] == sizes
        assert isinstance(as_tuple, tuple)
        for part, same in zip(output.pooler_output, as_tuple[-1], strict=True):
            assert torch.equal(part, same)


def test_a_call_returns_the_types_of_transformers_tower(both: tuple[Any, Any]) -> None:
    """A call returns an object or a tuple. No model reads `last_hidden_state`, so ours is None."""
    theirs, ours = (tower_of(model) for model in both)
    rows, grids = random_rows(104, seed=1), torch.tensor(GRIDS)
    with torch.no_grad():
        expected = theirs(rows, grid_thw=grids)
        output = ours(rows, grid_thw=grids, output_attentions=True, output_hidden_states=True)
        [merged] = ours(rows, grids, return_dict=False)
    assert type(output) is type(expected)
    assert output.pooler_output.shape == expected.pooler_output.shape
    assert torch.equal(merged, output.pooler_output)
    assert output.last_hidden_state is None
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert ours.spatial_merge_size == theirs.spatial_merge_size


def test_the_model_returns_requested_hidden_states_and_attentions(
    both: tuple[Any, Any], family: str
) -> None:
    """Hidden states and attentions belong to the language model, and both tuples have equally many
    parts."""
    inputs = vision_inputs(family)
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    parts = []
    for model in both:
        with torch.no_grad():
            output = model(**inputs, **options)
            parts.append(len(model(**inputs, **options, return_dict=False)))
        assert len(output.hidden_states) == 3
        if "image_outputs" in type(output).__dataclass_fields__:  # transformers 5.24
            assert [len(part) for part in output.image_outputs.pooler_output] == [6, 20]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 16}], ids=str)
def test_batches_beams_and_chunked_prefill_work(
    both: tuple[Any, Any], family: str, options: dict[str, int]
) -> None:
    if "prefill_chunk_size" in options and not hasattr(utils, "_slice_mm_encoder_output"):
        pytest.skip("this transformers cannot prefill images in chunks with its own tower")
    one = vision_inputs(family)
    batch = {
        name: torch.cat([value, value]) if "pixel" in name or "grid" in name else value.repeat(2, 1)
        for name, value in one.items()
    }
    answers = [
        model.generate(**batch, **options, max_new_tokens=6, do_sample=False) for model in both
    ]
    assert torch.equal(*answers)


class Pixels(Dataset):  # type: ignore[type-arg]
    """Run a tower in the data loader's workers."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.tower(random_rows(24, index), torch.tensor([[1, 4, 6]])).pooler_output


def test_a_tower_copies_and_pickles_with_its_state(both: tuple[Any, Any]) -> None:
    """Test the tower alone and inside a model."""
    tower = tower_of(both[1])
    through_pickle = pickle.loads(pickle.dumps(tower))
    for other in (copy.deepcopy(tower), through_pickle, tower_of(copy.deepcopy(both[1]))):
        assert other is not tower
        assert torch.equal(Pixels(other)[0], Pixels(tower)[0])
        assert other.encoder.tower is not tower.encoder.tower
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, tower.state_dict()[name])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_tower_runs_in_workers(setting: Setting, start: str) -> None:
    data = Pixels(as_hf_tower(setting.encoder))
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    for index, made in enumerate(loader):
        assert torch.equal(made, data[index])


def test_the_tower_shows_the_published_modules(both: tuple[Any, Any]) -> None:
    """Other code finds modules by these names. Weights are descriptions, not tensors."""
    theirs, ours = (tower_of(model) for model in both)
    names = {name for name, _ in ours.named_modules()}
    assert names <= {name for name, _ in theirs.named_modules()}
    for name, weight in theirs.named_parameters():
        shown = ours.get_submodule(name.rpartition(".")[0])
        described = getattr(shown, name.rpartition(".")[2])
        assert (described.shape, described.dtype) == (weight.shape, weight.dtype)
        assert (described.device, described.name) == (weight.device, name)
    assert len(ours.blocks) == len(theirs.blocks)
    with pytest.raises(AttributeError, match="weight"):
        _ = ours.blocks[0].mlp.weight
    with pytest.raises(ArgumentError, match=r"merger of .* does not run alone\. Call the tower"):
        ours.merger(torch.ones(4, 32))


def test_features_in_place_of_pixels_work_for_both_models(
    both: tuple[Any, Any], family: str
) -> None:
    """`to_hf` omits the token types for Omni, because Omni's `generate` rejects them."""
    model, swapped = both
    inputs = vision_inputs(family)
    with torch.no_grad():
        embeds = swapped.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        ).pooler_output
    made = [ImageFeatures(str(i), *pair) for i, pair in enumerate(zip(embeds, GRIDS, strict=True))]
    wants = FAMILIES[family].wants_token_types
    given = to_hf(made, inputs["input_ids"], image_token_id=4, mm_token_type_ids=wants)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert greedy(model, **text, **given) == greedy(model, **inputs)
    others = to_hf([replace(made[0], embeds=made[0].embeds.flip(0)), made[1]])
    logits = logits_of(model, inputs)
    assert relative_error(logits_of(model, text | given), logits) < 1e-5
    assert relative_error(logits_of(model, text | given | others), logits) > 1e-2


@pytest.mark.parametrize("given", ["tiny", nn.Linear(2, 2), None])
def test_an_argument_that_is_not_an_encoder_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"encoder is .*\. .*Load an encoder"):
        as_hf_tower(given)


def test_a_model_saved_with_its_own_tower_loads_into_ours(family: str, tmp_path: Path) -> None:
    """A separately saved thinker has the prefix "visual." and a config without `thinker_config`."""
    model, encoder = make_model(family, tmp_path)
    assert encoder.config.out_hidden_size == 48
    for name, tensor in tower_of(model).state_dict().items():
        assert torch.equal(as_hf_tower(encoder).state_dict()[name], tensor)
