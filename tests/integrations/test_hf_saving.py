"""Test that a model with our tower saves and loads like a model with transformers' own tower.

The tests use transformers, its Trainer, torch and safetensors. The tower computes with other loaded
weights, or rejects these weights with an error.
"""

import copy
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from qwen_vit import VisionEncoder, as_hf_tower
from qwen_vit.errors import CheckpointError
from tests.support.checkpoints import random_tensors, split_qkv, write_checkpoint
from tests.support.hf_models import (
    FAMILIES,
    VISION,
    make_both,
    tower_name,
    tower_of,
    vision_inputs,
    with_our_tower,
)
from tests.support.hf_training import merged_by


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """Return the folder of the loaded encoder."""
    return tmp_path / "origin"


@pytest.fixture
def both(family: str, origin: Path) -> tuple[Any, Any]:
    """Return a model with its own tower, and the same model with our tower."""
    return make_both(family, origin)


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, types and bits."""
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def files_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# Saving


def test_the_state_has_the_names_and_values_of_transformers_own(both: tuple[Any, Any]) -> None:
    model, swapped = both
    assert_same_state(swapped.state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "thinker.visual.", ""])
def test_the_state_has_the_published_tensors_for_any_compute_dtype(
    tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    """The tensors have no padding and no permutation, and the dtype of the files. Omni stores q, k
    and v separately."""
    tensors = write_checkpoint(tmp_path, VISION, prefix=prefix, dtype=dtype)
    tower = as_hf_tower(VisionEncoder.from_pretrained(tmp_path, device="cpu"))
    assert tower.dtype == torch.float32
    split = prefix == "thinker.visual."
    assert_same_state(tower.state_dict(), split_qkv(tensors) if split else tensors)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
def test_a_saved_model_loads_into_transformers_own_classes(
    both: tuple[Any, Any], family: str, tmp_path: Path, options: dict[str, str]
) -> None:
    model, swapped = both
    swapped.save_pretrained(tmp_path / "ours", **options)
    model.save_pretrained(tmp_path / "theirs", **options)
    assert_same_state(files_of(tmp_path / "ours"), files_of(tmp_path / "theirs"))
    if options:
        maps = [
            json.loads((tmp_path / who / "model.safetensors.index.json").read_text())
            for who in ("ours", "theirs")
        ]
        assert maps[0]["weight_map"].keys() == maps[1]["weight_map"].keys()
        assert maps[0]["metadata"]["total_size"] == maps[1]["metadata"]["total_size"]
    loaded, report = FAMILIES[family].model_class.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(tower_of(loaded)) is type(tower_of(model))
    assert_same_state(dict(loaded.state_dict()), dict(model.state_dict()))
    again = as_hf_tower(VisionEncoder.from_pretrained(tmp_path / "ours", device="cpu"))
    assert torch.equal(merged_by(again), merged_by(tower_of(swapped)))


def test_a_model_is_saved_over_the_folder_that_it_came_from_and_again(
    both: tuple[Any, Any], origin: Path, tmp_path: Path
) -> None:
    """The first save replaces the files that the tower and its copies read."""
    model, swapped = both
    for folder in (origin, origin, tmp_path / "other"):
        swapped.save_pretrained(folder, max_shard_size="20KB")
    assert_same_state(swapped.state_dict(), dict(model.state_dict()))


def test_a_file_that_another_one_replaces_changes_nothing(
    both: tuple[Any, Any], origin: Path
) -> None:
    """A copy that is made after the replacement has the loaded weights too."""
    model, swapped = both
    file = origin / "model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})  # replaces the file by a rename
    for each in (swapped, copy.deepcopy(swapped)):
        assert_same_state(each.state_dict(), dict(model.state_dict()))
    shutil.rmtree(origin)
    assert_same_state(copy.deepcopy(swapped).state_dict(), dict(model.state_dict()))


def test_a_file_that_was_written_over_in_place_is_refused(
    both: tuple[Any, Any], origin: Path
) -> None:
    """safetensors renames files. `cp` overwrites a file, so a map of the file shows other
    weights."""
    _, swapped = both
    file = origin / "model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(other, origin / "other.safetensors", metadata={"format": "pt"})
    with file.open("r+b") as stream:
        stream.write((origin / "other.safetensors").read_bytes())
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))  # a coarse clock may show equal times
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was overwritten after .* Load"):
        swapped.state_dict()


def test_torch_saves_the_tensors_and_not_their_files(both: tuple[Any, Any], origin: Path) -> None:
    model, swapped = both
    sizes = []
    for state in (model.state_dict(), swapped.state_dict()):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sizes.append(buffer.tell())
        one = io.BytesIO()
        torch.save(state[f"{tower_name(model)}.merger.ln_q.weight"], one)
        assert one.tell() < (origin / "model.safetensors").stat().st_size / 10
    assert sizes[1] < 1.01 * sizes[0]  # some bytes for modules without tensors
    assert_same_state(torch.load(buffer_of(swapped.state_dict())), dict(model.state_dict()))
    assert_same_state(
        torch.load(buffer_of(swapped), weights_only=False).state_dict(), dict(model.state_dict())
    )


def buffer_of(state: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_changes_to_a_state_dict_do_not_change_the_tower(both: tuple[Any, Any]) -> None:
    model, swapped = both
    for tensor in tower_of(swapped).state_dict().values():
        tensor.zero_()
    assert_same_state(swapped.state_dict(), dict(model.state_dict()))


def test_safetensors_and_torchs_checkpoints_keep_the_tower(
    both: tuple[Any, Any], tmp_path: Path
) -> None:
    """`save_model` searches for shared memory, and torch searches every name among the modules."""
    model, swapped = both
    save_model(swapped, str(tmp_path / "m.safetensors"))
    assert_same_state(load_file(tmp_path / "m.safetensors"), dict(model.state_dict()))
    other = FAMILIES["qwen2_5_vl"].make(1) if hasattr(model.model, "language_model") else None
    if other is not None and set(other.state_dict()) == set(model.state_dict()):
        missing, unexpected = load_model(other, str(tmp_path / "m.safetensors"))
        assert not missing
        assert not unexpected
        assert_same_state(dict(other.state_dict()), dict(model.state_dict()))
    state: dict[str, Any] = get_model_state_dict(swapped)
    assert_same_state(state, dict(model.state_dict()))
    changed = {name: tensor * 2 for name, tensor in state.items()}
    set_model_state_dict(swapped, changed)
    assert_same_state(swapped.state_dict(), changed)


class Prompts(Dataset):  # type: ignore[type-arg]
    """Return a prompt with two images, repeated several times."""

    def __init__(self, family: str, n: int) -> None:
        self.inputs = vision_inputs(family)
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.inputs | {"labels": self.inputs["input_ids"]}


def trainer(model: Any, family: str, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=1, save_steps=1, use_cpu=True,
        learning_rate=1e-2, weight_decay=0.1, report_to=[], disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=Prompts(family, 8), data_collator=lambda items: items[0]
    )


def test_trainer_saves_the_tower_and_resumes_as_with_transformers_own(
    both: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    """Trainer's weight decay does not change the tower, and the tower computes with the resumed
    weights. With either tower, transformers 5.18 to 5.24 do not resume a Qwen2.5-VL and warn,
    because the names in files and in memory differ.
    """
    model, swapped = both
    before = dict(tower_of(model).state_dict())
    folder = tmp_path / "run" / "checkpoint-1"
    trainer(swapped.requires_grad_(True), family, folder.parent, steps=1).train()
    loaded = FAMILIES[family].model_class.from_pretrained(folder)
    assert_same_state(dict(tower_of(loaded).state_dict()), before)
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(loaded.state_dict()[name], tensor)
    ]
    assert changed
    assert not [name for name in changed if "visual" in name]
    # Change the checkpoint's tower, so that resuming must load it.
    stored = load_file(folder / "model.safetensors")
    other = {name: value * 2 if "visual" in name else value for name, value in stored.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    tower_of(model.requires_grad_(True)).requires_grad_(False)
    for each in both:
        trainer(each, family, folder.parent, steps=1)._load_from_checkpoint(str(folder))
    assert_same_state(tower_of(swapped).state_dict(), dict(tower_of(model).state_dict()))


# Loading


def prefixed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{tower_name(model)}.{name}": tensor for name, tensor in tensors.items()}


def other_tensors(family: str) -> dict[str, Tensor]:
    tensors = random_tensors(VISION, seed=7, dtype=torch.float32)
    return split_qkv(tensors) if family == "qwen2_5_omni" else tensors


def encoder_of(tensors: dict[str, Tensor]) -> VisionEncoder:
    return VisionEncoder.from_tensors(tensors, VISION, device="cpu")


def test_the_tower_computes_with_newly_loaded_weights(both: tuple[Any, Any], family: str) -> None:
    """The tower's first encoder does not change."""
    model, swapped = both
    tower, new = tower_of(swapped), other_tensors(family)
    first, before = tower.encoder, merged_by(tower)
    state = model.state_dict() | prefixed(model, new)
    assert str(swapped.load_state_dict(state)) == "<All keys matched successfully>"
    expected = merged_by(as_hf_tower(encoder_of(new)))
    assert torch.equal(merged_by(tower), expected)
    assert not torch.equal(expected, before)
    assert_same_state(tower.state_dict(), new)
    assert torch.equal(merged_by(as_hf_tower(first)), before)
    for tensor in new.values():
        tensor.zero_()  # as if another model trained its tower further
    assert torch.equal(merged_by(tower), expected)
    assert tower.state_dict()["merger.ln_q.weight"].any()


def test_loading_equal_weights_changes_nothing(both: tuple[Any, Any]) -> None:
    model, swapped = both
    encoder = tower_of(swapped).encoder
    swapped.load_state_dict(model.state_dict())
    swapped.load_state_dict({}, strict=False)
    assert tower_of(swapped).encoder is encoder


@pytest.mark.parametrize("pieces", [2, 5])
def test_weights_in_pieces_are_joined(both: tuple[Any, Any], family: str, pieces: int) -> None:
    """Load a sharded checkpoint into an existing model."""
    model, swapped = both
    new = other_tensors(family)
    names = sorted(new)
    for start in range(pieces):
        part = prefixed(model, {name: new[name] for name in names[start::pieces]})
        report = swapped.load_state_dict(part, strict=False)
        assert not report.unexpected_keys
        assert set(report.missing_keys) == model.state_dict().keys() - part.keys()
    assert_same_state(tower_of(swapped).state_dict(), new)
    expected = merged_by(as_hf_tower(encoder_of(new)))
    assert torch.equal(merged_by(tower_of(swapped)), expected)


def test_missing_and_unknown_names_are_reported_like_in_torch(both: tuple[Any, Any]) -> None:
    model, _ = both
    visual = tower_name(model)
    state = dict(model.state_dict())
    del state[f"{visual}.blocks.1.norm1.weight"]
    state[f"{visual}.blocks.9.norm1.weight"] = torch.ones(32)
    for each in both:
        report = each.load_state_dict(state, strict=False)
        assert report.missing_keys == [f"{visual}.blocks.1.norm1.weight"]
        assert report.unexpected_keys == [f"{visual}.blocks.9.norm1.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.norm1(.|\n)*Unexpected"):
            each.load_state_dict(state)


def nan_in_it(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan"))


UNFIT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "shape": (lambda tensor: tensor[:-1], "ln_q.weight: has the shape [31]. Expected [32] from"),
    "NaN": (nan_in_it, "ln_q.weight: contains 32 NaN and 0 infinite"),
    "integers": (lambda tensor: tensor.int(), "of a quantised or other type"),
    "meta": (lambda tensor: tensor.to("meta"), "a tensor on the meta device"),
}


@pytest.mark.parametrize("fault", UNFIT)
@pytest.mark.parametrize("strict", [True, False])
def test_unfit_weights_are_refused_and_the_old_weights_remain(
    both: tuple[Any, Any], fault: str, strict: bool
) -> None:
    """Raise the error of torch, with and without strict."""
    model, swapped = both
    spoil, words = UNFIT[fault]
    visual = tower_name(model)
    name = f"{visual}.merger.ln_q.weight"
    state = model.state_dict() | {name: spoil(model.state_dict()[name])}
    before = merged_by(tower_of(swapped))
    with pytest.raises(RuntimeError, match=re.escape(visual) + ".*" + re.escape(words)):
        swapped.load_state_dict(state, strict=strict)
    assert torch.equal(merged_by(tower_of(swapped)), before)
    assert_same_state(swapped.state_dict(), dict(model.state_dict()))


def test_an_encoder_of_given_tensors_saves_and_loads_them(family: str, tmp_path: Path) -> None:
    """The names include the names of the replaced tower."""
    model = FAMILIES[family].make(0)
    expected = dict(model.state_dict())
    encoder = VisionEncoder.from_tensors(tower_of(model).state_dict(), VISION, device="cpu")
    with_our_tower(model, encoder).save_pretrained(tmp_path)
    loaded = FAMILIES[family].model_class.from_pretrained(tmp_path)
    assert_same_state(dict(loaded.state_dict()), expected)
