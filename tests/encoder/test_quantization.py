"""Test the refusals of `quantization`, and the quantised tower of a checkpoint."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_vit import VisionEncoder, loaded_tower
from qwen_vit import device as device_module
from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.update import WeightUpdates
from qwen_vit.compare.result import Comparison, ImageComparison, Stage
from qwen_vit.compare.text import as_text
from qwen_vit.compare.tolerance import Difference, judge
from qwen_vit.config import Grid, ImageConfig
from qwen_vit.device import check_fits, choose_quantization
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.model import VisionTower
from qwen_vit.weight_format import FP8
from tests.support.checkpoints import SMALL, random_tensors
from tests.support.oracle import relative_error
from tests.support.towers import build_tower, random_pixels, tower_trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# like SMALL, with a width of complete scales of 128 columns
WIDE = replace(SMALL, hidden_size=128, num_heads=2, intermediate_size=200)
IMAGE_CONFIG = ImageConfig.from_json({})
GRIDS = [(1, 10, 14), (1, 2, 6)]


def test_a_cpu_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ArgumentError, match=r"'fp8' on a CPU.*8\.9 .*Leave quantization out"):
        VisionEncoder.from_pretrained("no/model", device="cpu", quantization="fp8")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"quantization is 'int4'\. Expected None or 'fp8'"):
        choose_quantization("int4", CPU, torch.float32)


def test_float32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with pytest.raises(ArgumentError, match=r"with dtype torch.float32.*Expected bfloat16"):
        choose_quantization("fp8", CUDA, torch.float32)


def test_one_refusal_states_that_both_gpu_and_dtype_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 on an A100, the first refusal named only the dtype, and the second the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    words = r"NVIDIA A100 .*8\.9 \(Ada\) or newer, and bfloat16 instead of torch\.float32\."
    with pytest.raises(ArgumentError, match=words):
        choose_quantization("fp8", CUDA, torch.float32)


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True)])
def test_a_gpu_without_8_bit_floats_is_refused(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    if fits:
        assert choose_quantization("fp8", CUDA, torch.bfloat16) == "fp8"
        return
    with pytest.raises(ArgumentError, match=r"NVIDIA A100 .*has no matrix instructions.*8.9"):
        choose_quantization("fp8", CUDA, torch.bfloat16)


def test_a_width_without_whole_scales_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size is 160\. Expected a multiple of 128"):
        check_fits(replace(WIDE, hidden_size=160), CPU, "fp8")


def test_a_quantised_tower_is_close_to_the_exact_one_at_every_stage() -> None:
    tensors = random_tensors(WIDE)
    pixels = random_pixels(152, 0)
    exact = tower_trace(build_tower(tensors, WIDE), pixels, GRIDS)
    found = tower_trace(build_tower(tensors, WIDE, quantization="fp8"), pixels, GRIDS)
    assert torch.equal(found["patch_embed"], exact["patch_embed"])
    errors = [relative_error(found[stage], exact[stage]) for stage in exact]
    assert 1e-4 < max(errors) < 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_out_of_range_fail_only_their_image(bad: float) -> None:
    tower = build_tower(random_tensors(WIDE), WIDE, quantization="fp8")
    rows = torch.randn(152, 1176)
    clean = tower_trace(tower, rows, GRIDS)["merger"]
    rows[3, 5] = bad
    found = tower_trace(tower, rows, GRIDS)["merger"]
    assert not bool(found[:35].isfinite().all())
    assert torch.equal(found[35:], clean[35:])


def test_rows_of_zeros_equal_those_without_quantisation() -> None:
    tensors, rows = random_tensors(WIDE), torch.zeros(152, 1176)
    exact = tower_trace(build_tower(tensors, WIDE), rows, GRIDS)["merger"]
    found = tower_trace(build_tower(tensors, WIDE, quantization="fp8"), rows, GRIDS)["merger"]
    assert relative_error(found, exact) < 0.3


@pytest.mark.parametrize("name", ["blocks.0.mlp.gate_proj.weight", "blocks.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_with_nan_or_infinity_are_refused(name: str, bad: float) -> None:
    tensors = random_tensors(WIDE)
    tensors[name] = tensors[name].clone()
    tensors[name][1, 2] = bad
    with pytest.raises(CheckpointError, match=name):
        convert(tensors, WIDE, IMAGE_CONFIG, torch.float32, quantization="fp8")


def test_updates_write_the_same_quantised_weights_as_loading() -> None:
    tensors = random_tensors(WIDE)
    expected = convert(tensors, WIDE, IMAGE_CONFIG, torch.float32, quantization="fp8")
    with torch.device("meta"):
        tower = VisionTower(WIDE, torch.float32, "fp8")
    tower = tower.to_empty(device=CPU)
    updates = WeightUpdates(tower, WIDE, IMAGE_CONFIG, "fp8")
    assert updates.load(tensors.items()) == expected.keys()
    for name, value in tower.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value.float(), expected[name].float()), name
    assert tower.state_dict()["blocks.0.mlp.down.weight"].dtype == FP8


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=("copy", "pickle")
)
def test_a_quantised_encoder_is_copied_and_pickled(
    copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_tower, "choose_quantization", lambda name, *_: name)
    tensors = random_tensors(WIDE)
    encoder = VisionEncoder.from_tensors(tensors, WIDE, device="cpu", quantization="fp8")
    picture = torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8).numpy()
    again = copied(encoder)
    assert again.tower.state_dict()["blocks.0.mlp.down.weight"].dtype == FP8
    assert again.metadata() == encoder.metadata()
    assert torch.equal(again.encode(picture).embeds, encoder.encode(picture).embeds)


def compared(ratios: dict[str, float]) -> Comparison:
    """Return an fp8 comparison with these ratios of a stage's error to Hugging Face's error."""
    stages = tuple(
        Stage(
            name, Difference(0.01, 0.1, 0.9, 0.99), ratio * 1e-2, 1e-2,
            judge(torch.bfloat16, distance=0.01, ours=ratio * 1e-2, theirs=1e-2,
                  quantization="fp8"),
        )
        for name, ratio in ratios.items()
    )  # fmt: skip
    image = ImageComparison(
        "cat.png", "0" * 64, (28, 28), Grid(1, 2, 2), "uint8 pixels", (), stages, None
    )
    facts = {
        "model": "tiny", "weights_sha256": "0" * 64, "dtype": "bfloat16", "quantization": "fp8",
        "device": "NVIDIA H200", "golden": None,
        "reference": {
            "device": "cpu", "attention": "sdpa", "processor": "slow",
            "versions": {"transformers": "5.23.0"},
        },
    }  # fmt: skip
    return Comparison(facts, (image,), ())


def test_a_comparison_in_fp8_names_the_worst_block_and_its_ratio() -> None:
    comparison = compared({"block.0": 4.5, "block.1": 6.0, "merger": 1.4})
    assert not comparison.passed
    lines = as_text(comparison).splitlines()
    assert lines[0] == (
        "differs: cat.png: first at block.0: ours is 4.5 times as far from float64 as Hugging "
        "Face, allowed 1.5 (and 1 more; the worst is block.1, at 4 times its tolerance)"
    )
    assert "bfloat16, the MLP in fp8, on NVIDIA H200" in "\n".join(lines)
    assert compared({"block.0": 1.2, "merger": 1.4}).passed


def test_loading_in_fp8_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loaded_tower, "choose_quantization", lambda name, *_: name)
    tensors = random_tensors(WIDE)
    device_module._warn_once.cache_clear()
    VisionEncoder.from_tensors(tensors, WIDE, device="cpu")
    assert not caplog.messages
    for _ in range(2):
        VisionEncoder.from_tensors(tensors, WIDE, device="cpu", quantization="fp8")
    [message] = caplog.messages
    assert "experimental" in message
    assert "run qwen-vit compare" in message


def test_the_comparison_allows_fp8_one_and_a_half_times_the_error() -> None:
    def passes(ours: float, quantization: str | None) -> bool:
        return judge(
            torch.bfloat16, distance=0.0, ours=ours, theirs=1e-2, quantization=quantization
        ).passed

    assert passes(1.49e-2, "fp8")
    assert not passes(1.51e-2, "fp8")
    assert not passes(1.02e-2, None)
