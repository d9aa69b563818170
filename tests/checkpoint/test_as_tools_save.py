"""Test that checkpoints of training and conversion tools load, or that errors name their kind."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_vit.checkpoint.hub import download, find_checkpoint
from qwen_vit.checkpoint.load import Checkpoint, load_checkpoint
from qwen_vit.errors import ArgumentError, CheckpointError, QwenVitError
from tests.support.checkpoints import SMALL, random_tensors, write_checkpoint
from tests.support.hub_server import COMMIT, serving
from tests.support.hub_worker import running_worker

Weights = dict[str, torch.Tensor]
PUBLISHED = {f"visual.{name}": tensor for name, tensor in random_tensors(SMALL).items()}


def save(folder: Path, weights: Weights) -> Path:
    write_checkpoint(folder, SMALL)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rename_all(change: Callable[[str], str]) -> Weights:
    return {change(name): tensor for name, tensor in PUBLISHED.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}".replace("visual.", "visual._orig_mod."),
        lambda name: (
            "_fsdp_wrapped_module." + name.replace(".attn.", "._fsdp_wrapped_module.attn.")
        ),
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
    ids=["DDP", "compile", "a compiled tower", "FSDP", "activation checkpointing"],
)
def test_name_prefixes_of_module_wrappers_are_ignored(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    weights = rename_all(change)
    expected = load_checkpoint(save(tmp_path / "a", PUBLISHED)).weights_sha256()
    assert load_checkpoint(save(tmp_path / "b", weights)).weights_sha256() == expected
    assert Checkpoint.from_tensors(weights, SMALL).weights_sha256() == expected


def unmerged_lora(part: str) -> Weights:
    weights = rename_all(lambda name: name.replace(f".{part}.", f".{part}.base_layer."))
    for name in PUBLISHED:
        if name.endswith(f".{part}.weight"):
            weights[name.removesuffix("weight") + "lora_A.default.weight"] = torch.zeros(4, 8)
    return weights


def modules_to_save() -> Weights:
    return rename_all(
        lambda name: name.replace("merger.mlp.0.", "merger.mlp.0.modules_to_save.default.")
    )


def zero3_weights() -> Weights:
    return {name: torch.empty(0) if "merger" in name else t for name, t in PUBLISHED.items()}


def channels_last() -> Weights:
    name = "visual.patch_embed.proj.weight"
    weights = rename_all(lambda each: each)
    weights[name] = weights[name].permute(0, 2, 3, 4, 1).contiguous()
    return {name.replace("visual.", "vision_tower."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("make", "fact", "remedy"),
    [
        (lambda: unmerged_lora("qkv"), "a LoRA without its base", "merge_and_unload"),
        (lambda: unmerged_lora("patch_embed.proj"), "a LoRA", "merge_and_unload"),
        (modules_to_save, "modules_to_save", "merge_and_unload"),
        (zero3_weights, "ZeRO-3", "zero_to_fp32"),
        (channels_last, "MLX's layout", "before the conversion"),
        (lambda: {"visual._flat_param": torch.zeros(9)}, "flat parameters", "FULL_STATE_DICT"),
    ],
    ids=["LoRA", "LoRA at the patches", "modules_to_save", "ZeRO-3", "MLX", "FSDP flat"],
)
def test_the_error_names_why_a_tower_is_incomplete(
    tmp_path: Path, make: Callable[[], Weights], fact: str, remedy: str
) -> None:
    """The error must blame neither config.json nor the download."""
    loaders: list[Callable[[], Checkpoint]] = [
        lambda: load_checkpoint(save(tmp_path, make())),
        lambda: Checkpoint.from_tensors(make(), SMALL),
    ]
    for load in loaders:
        with pytest.raises(CheckpointError, match=fact) as caught:
            load()
        assert remedy in caught.value.remedy


@pytest.mark.parametrize("below", ["text_encoder", "checkpoint-500"])
def test_a_tower_in_a_subfolder_is_found_or_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    write_checkpoint(tmp_path / below, SMALL)
    source = find_checkpoint(tmp_path, subfolder=below)
    assert (source.folder, source.name) == (tmp_path / below, str(tmp_path / below))
    with pytest.raises(CheckpointError, match=below) as caught:
        load_checkpoint(tmp_path)
    assert f'subfolder="{below}"' in caught.value.remedy


@pytest.mark.parametrize("subfolder", ["", "/", "..", "a/../..", "/etc", "a//b", "a\n", 3])
def test_an_invalid_subfolder_is_refused(tmp_path: Path, subfolder: Any) -> None:
    with pytest.raises(ArgumentError, match="subfolder is"):
        find_checkpoint(tmp_path, subfolder=subfolder)
    with pytest.raises(ArgumentError, match="no subfolder"):
        find_checkpoint("tiny", subfolder="a")


def test_the_command_line_reads_a_subfolder(qwen_vit: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a" / "b", SMALL)
    done = qwen_vit("info", tmp_path, "--subfolder", "a/b", "--json")
    assert json.loads(done.out)["folder"] == str(tmp_path / "a" / "b"), done.err


def test_a_subfolder_of_a_repository_is_fetched_alone(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_checkpoint(repo / "text_encoder", SMALL)
    (repo / "model_index.json").write_text("{}")
    hashed = load_checkpoint(repo / "text_encoder").weights_sha256()
    with serving({}) as hub:
        hub.commits[f"org/pipe@{COMMIT}"] = repo
        hub.branches["org/pipe@main"] = COMMIT
        with running_worker(tmp_path / "home", hub.endpoint) as worker:
            call = {"model": "org/pipe", "cache_dir": tmp_path / "cache"}
            done = worker("load", **call, subfolder="text_encoder")
            assert done.get("weights") == hashed, done
            again = worker("load", **call, subfolder="text_encoder", local_files_only=True)
            assert again.get("weights") == hashed, again
            files = {request.file for request in hub.requests if request.sent}
            assert "org/pipe/model_index.json" not in files


def test_missing_image_settings_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, SMALL)
    (tmp_path / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING, "qwen_vit"):
        load_checkpoint(tmp_path)
    assert "no preprocessor_config.json" in caplog.text
    assert "max_pixels" in caplog.text


@pytest.mark.parametrize(
    "size",
    [
        {"height": 224, "width": 224},
        {"shortest_edge": 224},
        {"longest_edge": 336},
        {"max_height": 980, "max_width": 980},
    ],
)
def test_a_size_in_the_format_of_another_processor_is_refused(
    tmp_path: Path, size: dict[str, int]
) -> None:
    """CLIP's shortest_edge is a length. In our config it would be an area of 224 pixels."""
    write_checkpoint(tmp_path, SMALL)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": size}))
    with pytest.raises(QwenVitError, match="another model's processor"):
        load_checkpoint(tmp_path)


def test_download_takes_a_subfolder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", SMALL)
    assert download(tmp_path, subfolder="a").source.folder == tmp_path / "a"
