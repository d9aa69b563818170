"""Test that qwen_vit rejects unsupported repositories before it downloads weights."""

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_vit.checkpoint.hub import find_checkpoint
from qwen_vit.checkpoint.repository import NotCachedError
from qwen_vit.errors import HubError
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_cases import INDEX, edit_tensors, own_folder
from tests.support.hub_server import Hub
from tests.support.hub_worker import Worker


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_index(folder: Path, **changes: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")} | changes
    (folder / INDEX).write_text(json.dumps(index))


def make_lora(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    base = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(base))


def rename_weights(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return rename


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    assert old in header
    header = header.replace(old, new, 1).ljust(length)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def cut_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


EIGHT_BITS = torch.zeros(96, 32).to(torch.float8_e4m3fn)
REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "lora": (make_lora, ("LoRA adapter for 'Qwen/Qwen2.5-VL-7B-Instruct'", "Merge the adapter")),
    "pickles": (rename_weights("model.bin"), ("only model.bin; qwen_vit never opens pickles",)),
    "gguf": (rename_weights("a.gguf"), ("only GGUF (a.gguf)", "Use the original safetensors")),
    "no-weights": (
        rename_weights("notes.txt"),
        ("org/tiny: no weights", "Expected model.safetensors"),
    ),
    "no-config": (
        lambda folder: (folder / "config.json").unlink(),
        ("org/tiny: no config.json", "Choose a repository"),
    ),
    "qwen2-vl": (
        lambda folder: edit_config(folder, model_type="qwen2_vl"),
        ("this is Qwen2-VL", "Use transformers' Qwen2VLForConditionalGeneration."),
    ),
    "qwen3-vl": (
        lambda folder: edit_config(folder, model_type="qwen3_vl"),
        ("this is Qwen3-VL", "Use transformers' Qwen3VLForConditionalGeneration."),
    ),
    "unknown": (
        lambda folder: edit_config(folder, model_type="llava"),
        ("model_type is 'llava'. Expected one of qwen2_5_vl",),
    ),
    "remote-code": (
        lambda folder: edit_config(folder, auto_map={"AutoModel": "modeling.Model"}),
        ("auto_map requests remote code, and qwen_vit never imports remote code",),
    ),
    "qwen2-vl-tower": (
        lambda folder: edit_tensors(folder, blocks__0__mlp__fc1__weight=torch.zeros(4)),
        ("contains the vision tower of Qwen2-VL",),
    ),
    "qwen3-vl-tower": (
        lambda folder: edit_tensors(folder, pos_embed__weight=torch.zeros(4)),
        ("contains the vision tower of Qwen3-VL",),
    ),
    "fp8": (
        lambda folder: edit_tensors(folder, blocks__0__attn__qkv__weight=EIGHT_BITS),
        ("is F8_E4M3", "Use a checkpoint that leaves the vision tower unquantised"),
    ),
    "awq": (
        lambda folder: edit_tensors(folder, blocks__0__attn__qkv__qweight=torch.zeros(4)),
        ("quantised or other type (blocks.0.attn.qkv.qweight",),
    ),
    "missing": (
        lambda folder: edit_config(folder, vision_config=replace(SMALL, depth=4).to_json()),
        ("12 of 54 vision tensors are missing", "Use the config.json that belongs"),
    ),
    "shape": (
        lambda folder: edit_tensors(folder, merger__ln_q__weight=torch.zeros(31)),
        ("has the shape [31]. Expected [32]",),
    ),
    "text-only": (
        lambda folder: edit_index(folder, weight_map={"model.norm.weight": "a.safetensors"}),
        ("names no patch_embed.proj.weight", "Choose a repository"),
    ),
    "escaping": (
        lambda folder: edit_index(folder, weight_map={"visual.a": "../a.safetensors"}),
        ("'../a.safetensors'", "Expected the plain name", "Do not use this checkpoint"),
    ),
    "no-map": (lambda folder: edit_index(folder, weight_map=[]), ("weight_map is []",)),
    "page": (lambda folder: (folder / INDEX).write_text("<html>"), ("not JSON", INDEX)),
    "lfs-pointer": (
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        ("org/tiny: model.safetensors (63 bytes): a git-lfs pointer",),
    ),
    "nothing-inside": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}"),
        (": no vision tower: none of its 0 tensors",),
    ),
    "empty": (lambda folder: cut_file(folder, 0), ("(0 bytes): empty.",)),
    "cut-in-the-header": (lambda folder: cut_file(folder, 1_000), ("larger than the file",)),
    "truncated": (
        lambda folder: cut_file(folder, 60_000),
        ("(60000 bytes): truncated", "are missing"),
    ),
    "duplicate-keys": (
        lambda folder: edit_header(folder, b"visual.blocks.0.norm1", b"visual.blocks.0.norm2"),
        ("the key 'visual.blocks.0.norm2.weight' appears twice",),
    ),
    "overlap": (
        lambda folder: edit_header(folder, b'"data_offsets":[0,', b'"data_offsets":[2,'),
        ("but its shape",),
    ),
    "huge-header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4_000),
        ("declares a header of", "corrupt, or not a safetensors file"),
    ),
}


@pytest.mark.parametrize(("edit", "words"), REFUSALS.values(), ids=REFUSALS)
def test_an_unsupported_repository_is_refused_before_any_weight_is_downloaded(
    hub: Hub,
    worker: Worker,
    repo: Path,
    call: dict[str, Any],
    edit: Callable[[Path], object],
    words: tuple[str, ...],
) -> None:
    write_checkpoint(repo, SMALL)
    edit(repo)
    refused = worker("load", **call)
    assert "message" in refused, refused
    for word in words:
        assert word in refused["message"]
    weights = [r for r in hub.requests if r.method == "GET" and r.file.endswith(".safetensors")]
    assert sum(request.sent for request in weights) < 8_000  # at most a header
    assert not own_folder(call).exists()


@pytest.mark.parametrize(
    "changes", [{"model_type": "qwen2_vl"}, {"model_type": "llava"}, {"auto_map": {"a": "b.c"}}]
)
def test_another_model_is_refused_before_any_request_for_a_weight_file(
    hub: Hub, worker: Worker, repo: Path, call: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_checkpoint(repo, SMALL)
    edit_config(repo, **changes)
    assert worker("load", **call)["kind"] == "CheckpointError"
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize("kind", [OSError, NotCachedError])
def test_the_traceback_names_the_cause_without_the_clients_frames(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames of huggingface_hub once filled several screens."""

    def fail(*_: Any) -> None:
        try:
            raise ConnectionError("[Errno -2] Name or service not known\nmore")
        except ConnectionError as error:
            raise kind("the client could not send the request") from error

    monkeypatch.setattr("qwen_vit.checkpoint.hub._download", fail)
    with pytest.raises(HubError) as caught:
        find_checkpoint("org/model")
    text = "".join(traceback.format_exception(caught.value))
    assert text.endswith("\nCause: ConnectionError: [Errno -2] Name or service not known\n")
    assert text.count("Traceback") == 1
