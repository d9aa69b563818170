"""Test the devices, dtypes and models of `from_pretrained`, and that global state has no effect."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit import device as device_module
from qwen_vit.checkpoint import published_tensors
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError, HubError, QwenVitError
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from tests.support import ROOT
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.encoders import picture, small, tiny
from tests.support.goldens import TINY_FOLDER
from tests.support.towers import gpu


@pytest.mark.parametrize(
    ("device", "change", "message"),
    [
        ("cuda", {"hidden_size": 144, "num_heads": 1}, "head_dim is 144. Expected 16 to 128 on"),
        ("cuda", {"hidden_size": 32, "num_heads": 4}, "head_dim is 8. Expected 16 to 128 on cuda"),
        ("cpu", {"hidden_size": 1032, "num_heads": 1}, "head_dim is 1032. Expected 2 to 1024 on"),
        ("cuda", {"patch_px": 13, "window_px": 104}, "patch_size is 13. Expected an even number"),
        (
            "cuda",
            {"hidden_size": 2048, "num_heads": 1},
            "head_dim is 2048. Expected 16 to 128 on cuda",
        ),
    ],
)
def test_an_architecture_that_a_device_cannot_compute_is_refused(
    device: str, change: dict[str, Any], message: str
) -> None:
    device_module.check_fits(SMALL, torch.device(device))
    with pytest.raises(CheckpointError, match=rf'{message}.*\. (Use device="cpu"|Choose another)'):
        device_module.check_fits(replace(SMALL, **change), torch.device(device))


# from_pretrained


def test_given_tensors_have_the_bits_of_a_checkpoint() -> None:
    checkpoint = tiny().checkpoint
    tensors = {f"model.visual.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    ours = VisionEncoder.from_tensors(
        tensors, checkpoint.config.to_json(), checkpoint.image_config, name="mine", device="cpu"
    )
    image = picture(56, 84)
    assert torch.equal(ours.encode([image])[0].embeds, tiny().encode([image])[0].embeds)
    same = ours.metadata() | {"model": "tiny"}
    assert (ours.metadata()["model"], same) == ("mine", tiny().metadata())
    del tensors["model.visual.blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"1 of 66 .*missing"):
        VisionEncoder.from_tensors(tensors, checkpoint.config, device="cpu")


@gpu
def test_tensors_on_a_gpu_give_the_same_bits() -> None:
    theirs = VisionEncoder.from_pretrained("tiny", device="cuda")
    tensors = {name: tensor.cuda() for name, tensor in theirs.checkpoint.tensors.items()}
    ours = VisionEncoder.from_tensors(tensors, theirs.config, device="cuda")
    image = picture(56, 84)
    assert torch.equal(ours.encode([image])[0].embeds, theirs.encode([image])[0].embeds)
    assert ours.metadata()["weights_sha256"] == theirs.metadata()["weights_sha256"]


def test_errors_of_wrong_calls_name_the_correct_call() -> None:
    with pytest.raises(ArgumentError, match=r'VisionEncoder\.from_pretrained\("tiny"\)'):
        VisionEncoder("tiny")  # type: ignore[call-arg,arg-type]
    with pytest.raises(ArgumentError, match=r"VisionEncoder\.from_pretrained"):
        VisionEncoder(model="tiny")  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match="Pass device= and dtype= to"):
        tiny().to("cuda")
    with pytest.raises(ArgumentError, match="Pass dtype="):
        VisionEncoder.from_pretrained("tiny", torch_dtype=torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Pass device="):
        VisionEncoder.from_pretrained("tiny", device_map="auto")  # type: ignore[arg-type]


REFUSED_ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "float16": ({"dtype": "float16"}, ("activations", "overflow", "bfloat16 or float32")),
    "fp16": ({"dtype": "fp16"}, ("dtype is float16, and activations", "overflow float16")),
    "torch.float16": ({"dtype": torch.float16}, ("activations", "overflow float16")),
    "bfloat16 on cpu": ({"dtype": "bfloat16"}, ("bfloat16", "CPU", "float32", "a GPU")),
    "float64": ({"dtype": torch.float64}, ("torch.float64", "Expected")),
    "unknown dtype": ({"dtype": "bf-16"}, ("'bf-16'", "'auto', 'bfloat16' or 'float32'")),
    "module as dtype": ({"dtype": "nn"}, ("'nn'", "'auto', 'bfloat16' or 'float32'")),
    "mps": ({"device": "mps"}, ("'mps'", "NVIDIA GPU ('cuda') or 'cpu'")),
    "meta": ({"device": "meta"}, ("'meta'", "'cpu'")),
    "unknown device": (
        {"device": "gpu"},
        ("'gpu'", "'auto', 'cpu', 'cuda' or a GPU such as 'cuda:1'"),
    ),
    "device None": ({"device": None}, ("None", "'auto', 'cpu', 'cuda' or a GPU such as 'cuda:1'")),
    "max below min": ({"max_pixels": 100}, ("max_pixels 100", "min_pixels 3136", "Pass other")),
    "min above max": ({"min_pixels": 10**8}, ("min_pixels 100000000", "Pass other")),
    "max below a token": ({"min_pixels": 1, "max_pixels": 783}, ("783", "Pass other")),
    "zero": ({"min_pixels": 0}, ("min_pixels is 0", "Pass other")),
    "no number": ({"max_pixels": "many"}, ("'many'", "an integer", "Pass other")),
}


@pytest.mark.parametrize("fault", REFUSED_ARGUMENTS)
def test_invalid_arguments_are_refused_with_the_reason(fault: str) -> None:
    arguments, words = REFUSED_ARGUMENTS[fault]
    with pytest.raises(ArgumentError) as caught:
        VisionEncoder.from_pretrained("tiny", **{"device": "cpu", **arguments})
    for word in words:
        assert word in str(caught.value)


def pretend_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


def test_cuda_without_a_gpu_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(ArgumentError, match=r"finds no CUDA GPU\. Install an NVIDIA driver"):
        VisionEncoder.from_pretrained("tiny", device="cuda")


def test_the_error_of_a_missing_gpu_counts_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(ArgumentError, match=r"'cuda:2', but torch finds 2 GPUs\. Count the GPUs"):
        VisionEncoder.from_pretrained("tiny", device="cuda:2")


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:0"])
def test_a_gpu_older_than_ampere_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pretend_gpus(monkeypatch, 1, capability=(7, 5))
    with pytest.raises(ArgumentError, match=r"Tesla T4 .* 7\.5\. Expected 8\.0 .*=.cpu."):
        VisionEncoder.from_pretrained("tiny", device=device)


def test_auto_selects_the_gpu_and_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpus(monkeypatch, 2, capability=(8, 0))
    device = device_module.choose_device("auto")
    assert device == torch.device("cuda", 0)
    assert device_module.choose_dtype("auto", device) == torch.bfloat16
    assert device_module.choose_dtype("float32", device) == torch.float32


def test_the_cpu_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, 0)
    device_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qwen_vit"):
        for _ in range(3):
            encoder = VisionEncoder.from_pretrained("tiny")
    assert (encoder.device, encoder.dtype) == (torch.device("cpu"), torch.float32)
    [warning] = caplog.messages
    assert "no CUDA GPU" in warning
    assert "interpreted" in warning
    caplog.clear()
    VisionEncoder.from_pretrained("tiny", device="cpu")  # no warning for an explicit device
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("tinny", HubError, ("tinny: does not exist", "or 'tiny'. Did you mean tiny?")),
        ("no/such/folder", CheckpointError, ("no/such/folder: does not exist", "Check the path")),
        ("{tmp}", CheckpointError, ("{tmp}", "Expected model.safetensors")),
        ("{tmp}/config", CheckpointError, ("{tmp}/config", "Expected model.safetensors")),
        ("{tmp}/weights", CheckpointError, ("{tmp}/weights", "config.json")),
    ],
)
def test_a_missing_model_is_named(
    tmp_path: Path, model: str, kind: type[QwenVitError], words: tuple[str, ...]
) -> None:
    for part in ("config", "weights"):
        write_checkpoint(tmp_path / part, SMALL)
    (tmp_path / "config" / "model.safetensors").unlink()
    (tmp_path / "weights" / "config.json").unlink()
    (tmp_path / "config.txt").touch()
    with pytest.raises(kind) as caught:
        VisionEncoder.from_pretrained(model.format(tmp=tmp_path), device="cpu")
    for word in words:
        assert word.format(tmp=tmp_path) in str(caught.value)


def test_pixel_limits_replace_the_checkpoints_own() -> None:
    image = picture(560, 560)
    [features] = small().encode([image])
    assert features.grid_thw == (1, 6, 6)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", min_pixels=28 * 28 * 30)
    [grown] = encoder.encode([picture(28, 28)])
    assert grown.grid_thw == (1, 12, 12)
    assert encoder.metadata()["image_policy"] != tiny().metadata()["image_policy"]


def test_metadata_names_model_hashes_versions_and_policy() -> None:
    facts = tiny().metadata()
    assert (facts["model"], facts["commit"], facts["dtype"]) == ("tiny", None, "float32")
    assert len(facts["weights_sha256"]) == len(facts["config_sha256"]) == 64
    assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert facts == VisionEncoder.from_pretrained(TINY_FOLDER).metadata() | {"model": "tiny"}


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["-c", "from qwen_vit import VisionEncoder"], 1), (["-m", "qwen_vit", "info", "tiny"], 2)],
    ids=["python", "command"],
)
def test_without_triton_the_error_names_the_package(
    tmp_path: Path, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no wheel for this')")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == exit_code
    assert ("Traceback" in done.stderr) == (exit_code == 1)
    assert "rror: qwen_vit needs Triton" in done.stderr
    assert "pip install 'triton>=3.6'" in done.stderr


def test_autocast_around_a_call_changes_nothing() -> None:
    """Autocast once changed the GEMMs, with a silent error of 6e-3."""
    rows, grid_thw = torch.randn(24, 1176), torch.tensor([[1, 4, 6]])
    plain = tiny().encode_patches(rows, grid_thw)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny().encode_patches(rows, grid_thw), plain)


def test_a_default_device_of_the_caller_changes_nothing(tmp_path: Path) -> None:
    qkv, angles = torch.randn(10, 3, 2, 80), torch.rand(10, 40)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    torch.set_default_device("meta")
    try:
        encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
        [features] = encoder.encode([np.zeros((56, 84, 3), np.uint8)])
        path = write_features(tmp_path / "f.safetensors", [features], encoder.metadata())
        stored = load_features(path)
        assert isinstance(stored, FeatureFile)
        taken = stored.to_vllm()["image"]
        found = [features.embeds, stored[0].embeds, stored.image_grid_thw, *taken.values()]
        found.append(fused_rope_varlen_attention(qkv, angles.cos(), angles.sin(), cu_seqlens))
    finally:
        torch.set_default_device(None)
    for tensor in found:
        assert tensor is not None
        assert tensor.device.type == "cpu"


def test_the_recorded_hash_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    first = encoder.metadata()["weights_sha256"]
    monkeypatch.setattr(published_tensors, "weights_hash", None)
    assert encoder.metadata()["weights_sha256"] == first
