"""Test that .to, .cuda, .half and similar calls rebuild the tower on the requested device.

Otherwise they raise an error with the reason. The published tensors do not change.
"""

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from packaging.version import Version
from torch import Tensor

from qwen_vit import VisionEncoder, as_hf_tower
from qwen_vit.compare.tolerance import relative_error
from qwen_vit.errors import ArgumentError
from tests.support.checkpoints import WIDE, random_tensors
from tests.support.hf_models import (
    GRIDS,
    make_model,
    tower_name,
    tower_of,
    vision_inputs,
    with_our_tower,
)
from tests.support.hf_training import merged_by
from tests.support.towers import gpu, random_rows

FAMILY = "qwen2_5_vl"
FLOAT32 = 1e-4  # two float32 implementations differ by about 2e-5, and bfloat16 by 1e-2
INSTEAD = "the vision tower computes in float32 on a CPU, not in bfloat16"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, encoder = make_model(FAMILY, tmp_path_factory.mktemp("model"))
    return with_our_tower(model, encoder)


@pytest.fixture
def model(original: Any) -> Any:
    return copy.deepcopy(original)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "qwen_vit"]


def logits_of(model: Any) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in vision_inputs(FAMILY).items()}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("cpu"),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.to(torch.float32),
        lambda model: model.eval(),
        lambda model: model.train(),
        lambda model: model.to(torch.device("cpu"), torch.float32, non_blocking=True),
        lambda model: model.share_memory(),
    ],
)
def test_a_move_to_the_same_device_and_dtype_builds_no_encoder(model: Any, move: Any) -> None:
    encoder = tower_of(model).encoder
    assert move(model) is model
    assert tower_of(model).encoder is encoder
    assert tower_of(model).training == model.training


@pytest.mark.parametrize(
    "move", [lambda part: part.half(), lambda part: part.to(torch.float16)], ids=["half", "to"]
)
@pytest.mark.parametrize("moves_model", [True, False])
def test_float16_is_refused_with_the_reason_before_anything_moves(
    model: Any, move: Any, moves_model: bool
) -> None:
    expected = logits_of(model)
    words = r"activations .* overflow float16 in the last block\. Expected bfloat16 or"
    with pytest.raises(ArgumentError, match=words):
        move(model if moves_model else tower_of(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model), expected)


def test_the_language_model_alone_can_be_converted_to_float16(model: Any) -> None:
    """The error names this way."""
    expected, tower = logits_of(model), tower_of(model)
    model.model.language_model.half()
    model.lm_head.half()
    assert tower_of(model) is tower
    assert logits_of(model).dtype == torch.float16
    assert relative_error(logits_of(model).float(), expected) < 0.02


def test_other_types_are_refused(model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"dtype is torch\.float64\. Expected torch\.bfloat16"):
        model.double()


def test_a_device_that_computes_nothing_is_refused(model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"device is .*meta.*\. Expected an NVIDIA GPU"):
        model.to("meta")


def test_float32_replaces_bfloat16_on_a_cpu_with_a_warning(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The language model is in bfloat16. The tower is not rounded, and saves the published
    tensors."""
    tower = tower_of(model)
    encoder, state, merged = tower.encoder, tower.state_dict(), merged_by(tower)
    model.bfloat16()
    model.to(torch.bfloat16)
    assert warnings_of(caplog) == [INSTEAD]
    assert tower.encoder is encoder
    assert tower.dtype == torch.float32
    assert logits_of(model).dtype == torch.bfloat16
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, state[name])
    model.float()
    assert warnings_of(caplog) == [INSTEAD]
    assert torch.equal(merged_by(tower), merged)


def test_a_move_rebuilds_the_encoder_from_the_weights_loaded_last(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new encoder keeps quantization, pixel limits and graphs. This test only names a GPU."""
    tower = tower_of(model)
    tower.load_state_dict({name: tensor * 2 for name, tensor in tower.state_dict().items()})
    expected, image = merged_by(tower), tower.encoder.image_config
    build = VisionEncoder.from_checkpoint
    builds = []

    def build_on_cpu(
        checkpoint: Any, source: Any, device: Any, dtype: Any, **options: Any
    ) -> VisionEncoder:
        builds.append((device, dtype, *options.values()))
        return build(checkpoint, source, torch.device("cpu"), torch.float32, **options)

    monkeypatch.setattr(VisionEncoder, "from_checkpoint", build_on_cpu)
    gpu_named = torch.device("cuda", 0)
    tower._move(gpu_named, torch.bfloat16)
    assert builds == [(gpu_named, torch.bfloat16, None, image.min_pixels, image.max_pixels, True)]
    assert torch.equal(merged_by(tower), expected)


# On a GPU


def gpu_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@gpu
@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7.1") and Version(np.__version__) >= Version("2.4"),
    reason="this pair of Triton and NumPy does not run on a CPU",
)
def test_a_tower_moves_to_a_gpu_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tower has the bits of an encoder loaded on this device, and returns to bfloat16 after a
    CPU."""
    model, on_cpu = make_model(FAMILY, tmp_path)
    with_our_tower(model, on_cpu)
    tower, expected = tower_of(model), merged_by(tower_of(model))
    state = tower.state_dict()
    model.to(torch.bfloat16).cuda()
    assert (tower.device, tower.dtype) == (torch.device("cuda", 0), torch.bfloat16)
    assert tower.encoder.graphs is not None
    loaded = VisionEncoder.from_pretrained(tmp_path, device="cuda")
    assert torch.equal(merged_by(tower), merged_by(as_hf_tower(loaded)))
    assert relative_error(merged_by(tower).cpu().float(), expected) < 0.1
    assert logits_of(model).isfinite().all()
    for name, tensor in tower.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, state[name])
    model.cpu()
    assert (tower.device, tower.dtype) == (torch.device("cpu"), torch.float32)
    assert torch.equal(merged_by(tower), expected)
    assert warnings_of(caplog) == [INSTEAD, INSTEAD]
    model.cuda()
    assert tower.dtype == torch.bfloat16
    model.float()
    assert tower.dtype == torch.float32
    assert relative_error(merged_by(tower).cpu(), expected) < FLOAT32
    tower.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    doubled = merged_by(tower)
    model.cpu()
    assert relative_error(merged_by(tower), doubled.cpu()) < FLOAT32


@gpu
def test_graphs_stay_off_where_they_were_off(tmp_path: Path) -> None:
    make_model(FAMILY, tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path, device="cuda", cuda_graphs=False)
    tower: Any = as_hf_tower(encoder)
    tower.float()
    assert tower.encoder is not encoder
    assert tower.encoder.graphs is None
    tower.load_state_dict({name: t * 2 for name, t in tower.state_dict().items()})
    assert tower.encoder.graphs is None


@gpu
def test_a_gpu_holds_the_weights_once() -> None:
    """The GPU has only the encoder's tensors after a load on the GPU, a move, or another load."""
    tensors = random_tensors(WIDE)
    first = gpu_bytes()
    encoder = VisionEncoder.from_tensors(tensors, WIDE, device="cuda", cuda_graphs=False)
    own = gpu_bytes() - first
    assert own > sum(tensor.nbytes for tensor in tensors.values())
    tower = as_hf_tower(encoder)
    del encoder
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    tower.load_state_dict({name: tensor * 2 for name, tensor in on_gpu.items()})
    del on_gpu
    assert gpu_bytes() - first == own
    tower.float()
    tower.bfloat16()
    assert gpu_bytes() - first == own
    tower.cpu()
    assert gpu_bytes() == first
    given = {name: tensor.cuda() for name, tensor in tensors.items()}
    encoder = VisionEncoder.from_tensors(given, WIDE, device="cuda", cuda_graphs=False)
    del given
    assert gpu_bytes() - first == own
    assert torch.equal(as_hf_tower(encoder).state_dict()["merger.mlp.2.bias"],
                       tensors["merger.mlp.2.bias"])  # fmt: skip


@gpu
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_answers_and_trains_the_same_on_a_gpu(
    tmp_path: Path, backend: str
) -> None:
    model, _ = make_model(FAMILY, tmp_path)
    model = model.cuda().requires_grad_(True).train()
    with_our_tower(model, VisionEncoder.from_pretrained(tmp_path, device="cuda", dtype="float32"))
    expected = logits_of(model)
    inputs = {name: tensor.cuda() for name, tensor in vision_inputs(FAMILY).items()}
    inputs["labels"] = inputs["input_ids"]
    gradients = []
    torch._dynamo.reset()
    for each in (model, torch.compile(model, backend=backend)):
        assert relative_error(logits_of(each), expected) < FLOAT32
        model.zero_grad()
        each(**inputs, use_cache=False).loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert relative_error(gradients[1], gradients[0]) < FLOAT32


@gpu
def test_our_tower_gives_the_answer_of_transformers_tower_on_a_gpu(tmp_path: Path) -> None:
    """Compare in float32, in which both errors are small, also with pixels on the host."""
    model, _ = make_model(FAMILY, tmp_path)
    model = model.cuda()
    # Their patch embedding is a convolution.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = logits_of(model)
    with_our_tower(model, VisionEncoder.from_pretrained(tmp_path, device="cuda", dtype="float32"))
    assert relative_error(logits_of(model), expected) < FLOAT32
    assert tower_name(model) == "model.visual"
    rows, grids = random_rows(104, 3), torch.tensor(GRIDS)
    with torch.no_grad():
        on_host = model.get_image_features(rows, grids, return_dict=True).pooler_output
        on_gpu = model.get_image_features(rows.cuda(), grids.cuda(), return_dict=True).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(on_host, on_gpu, strict=True))
