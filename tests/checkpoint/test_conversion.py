"""Test the conversion of weights: places, zero padding, folded norms and pixel scales."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_vit.checkpoint.convert import convert, rotary_permutation
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.weight_format import padded_mlp_size, padded_pixel_size, pixel_weight_exponent
from tests.support.checkpoint_cases import IMAGE_CONFIG, NORM_OF_A_BLOCK, QKV, assert_same_tensors
from tests.support.checkpoints import (
    SMALL,
    WIDE,
    random_tensors,
    write_checkpoint,
)


def gate_and_up(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the loader's interleaving of 8 rows."""
    gate, up = gate_up.view(-1, 2, 8, *gate_up.shape[1:]).unbind(1)
    return gate.flatten(0, 1), up.flatten(0, 1)


def marked_tensors(config: VisionConfig) -> tuple[dict[str, torch.Tensor], int]:
    """Return tensors whose elements are different whole numbers from 1, exact in float32. The norms
    of the blocks are 1, because the loader folds the norms into the weights that follow.
    """
    tensors, start = {}, 1
    for name, shape in expected_tensors(config).items():
        if NORM_OF_A_BLOCK.search(name):
            tensors[name] = torch.ones(shape)
            continue
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    assert start < 2**24
    return tensors, start - 1


def test_every_published_weight_is_copied_exactly_once_and_all_padding_is_zero() -> None:
    tensors, count = marked_tensors(SMALL)
    state = convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)
    converted = torch.cat([v.flatten() for k, v in state.items() if "pixel" not in k])
    marks = converted[converted != 0].long().sort().values
    assert torch.equal(marks, torch.arange(1, count + 1))
    padding = SMALL.depth * (128 - 12) * (2 * 32 + 2 + 32)
    assert int((converted == 0).sum()) == padding


def test_padding_follows_the_rows_of_gate_and_up_and_the_columns_of_down() -> None:
    tensors = random_tensors(SMALL, dtype=torch.float32)
    state = convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)
    I, I_padded = 12, padded_mlp_size(SMALL)  # noqa: E741
    assert I_padded == 128
    gate, up = gate_and_up(state["blocks.0.mlp.gate_up.weight"])
    gain = tensors["blocks.0.norm2.weight"]
    assert torch.equal(gate[:I], tensors["blocks.0.mlp.gate_proj.weight"] * gain)
    assert torch.equal(up[:I], tensors["blocks.0.mlp.up_proj.weight"] * gain)
    gate_bias, up_bias = gate_and_up(state["blocks.0.mlp.gate_up.bias"])
    assert torch.equal(gate_bias[:I], tensors["blocks.0.mlp.gate_proj.bias"])
    assert torch.equal(up_bias[:I], tensors["blocks.0.mlp.up_proj.bias"])
    down = state["blocks.0.mlp.down.weight"]
    assert torch.equal(down[:, :I], tensors["blocks.0.mlp.down_proj.weight"])
    assert not gate[I:].any()
    assert not up[I:].any()
    assert not down[:, I:].any()
    assert padded_mlp_size(replace(SMALL, intermediate_size=128)) == 128
    assert padded_mlp_size(replace(SMALL, intermediate_size=3420)) == 3456


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_weights_of_a_block_are_folded_with_one_rounding(
    dtype: torch.dtype,
) -> None:
    """W (g x) = (W g) x, so the remaining norm has no weight."""
    tensors = random_tensors(SMALL, dtype=torch.bfloat16)
    tensors |= {
        name: torch.rand(32, generator=torch.Generator().manual_seed(3)).bfloat16() * 4 - 1
        for name in tensors
        if NORM_OF_A_BLOCK.search(name)
    }
    state = convert(tensors, SMALL, IMAGE_CONFIG, dtype)
    values = state["blocks.1.attn.qkv.weight"][2 * 32 :]  # V's rows are not permuted
    expected = tensors["blocks.1.attn.qkv.weight"][2 * 32 :].double()
    expected = (expected * tensors["blocks.1.norm1.weight"].double()).to(dtype)
    assert torch.equal(values, expected)
    gate, _ = gate_and_up(state["blocks.1.mlp.gate_up.weight"])
    expected = tensors["blocks.1.mlp.gate_proj.weight"].double()
    expected = (expected * tensors["blocks.1.norm2.weight"].double()).to(dtype)
    assert torch.equal(gate[: len(expected)], expected)


def test_weights_that_overflow_with_their_norm_are_named() -> None:
    tensors = random_tensors(SMALL, dtype=torch.float32)
    tensors["blocks.0.norm1.weight"] = torch.full((32,), 1e30)
    tensors[QKV] = torch.full_like(tensors[QKV], 1e30)
    with pytest.raises(
        CheckpointError,
        match=r"qkv\.weight with .*norm1\.weight in .*32: contains 0 NaN and .* infinite",
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


def test_weights_that_overflow_in_bfloat16_are_named() -> None:
    tensors = random_tensors(SMALL, dtype=torch.float32)
    tensors["merger.mlp.2.bias"][3] = torch.finfo(torch.float32).max
    with pytest.raises(
        CheckpointError, match=r"^merger\.mlp\.2\.bias in torch\.bfloat16: contains 0 NaN and 1 "
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)


def test_the_permutation_makes_rotary_pairs_adjacent_and_keeps_attention_scores() -> None:
    tensors = random_tensors(WIDE, dtype=torch.float32)
    tensors["blocks.0.norm1.weight"] = torch.ones(WIDE.hidden_size)
    state = convert(tensors, WIDE, IMAGE_CONFIG, torch.float32)
    H, D = WIDE.num_heads, WIDE.head_dim
    assert sorted(rotary_permutation(D).tolist()) == list(range(D))
    assert rotary_permutation(D)[:4].tolist() == [0, 40, 1, 41]

    x = torch.randn(5, WIDE.hidden_size, generator=torch.Generator().manual_seed(1)).double()

    def project(source: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        weight, bias = source[QKV].double(), source["blocks.0.attn.qkv.bias"].double()
        return (x @ weight.T + bias).view(5, 3, H, D).unbind(1)

    q, k, v = project(tensors)
    q_new, k_new, v_new = project(state)
    # Both sum the same 160 products in float64. Only the BLAS's blocking may change the order.
    assert torch.allclose(q_new[..., 0::2], q[..., : D // 2], rtol=0, atol=1e-13)
    assert torch.allclose(q_new[..., 1::2], q[..., D // 2 :], rtol=0, atol=1e-13)
    assert torch.allclose(v_new, v, rtol=0, atol=1e-13)
    scores, scores_new = (torch.einsum("nhd,mhd->hnm", *pair) for pair in ((q, k), (q_new, k_new)))
    assert torch.allclose(scores, scores_new, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8_pixels_and_published_float_rows_give_equal_results(dtype: torch.dtype) -> None:
    """The folded weights equal the published weights to half a unit in the last place. Every
    product and sum below is in float64. The differences are therefore the rounding of pixel_weight
    and the rounding of the bias to float32. The rounding of pixel_weight (24 bits, or 11 bits in
    fp16) is at most 2**-24 or 2**-11 of each term, plus fp16's subnormal step of 2**-25 / 2**10.
    """
    config = replace(SMALL, patch_px=14)
    tensors = random_tensors(config, dtype=torch.bfloat16)
    state = convert(tensors, config, IMAGE_CONFIG, dtype)
    pixels = torch.randint(0, 256, (7, 3, 14, 14), generator=torch.Generator().manual_seed(2))

    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (IMAGE_CONFIG.image_mean, IMAGE_CONFIG.image_std)
    )
    frame = (pixels.double() / 255 - mean) / std
    rows = frame.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)  # (N, 1176)
    truth = rows @ tensors["patch_embed.proj.weight"].double().flatten(1).T

    K = padded_pixel_size(config)
    assert (K, state["patch_embed.pixel_weight"].shape) == (640, (32, 640))
    centred = torch.nn.functional.pad((pixels - 128).double().flatten(1), (0, K - 588))
    weight = state["patch_embed.pixel_weight"].double() * 2.0 ** -pixel_weight_exponent(dtype)
    found = centred @ weight.T + state["patch_embed.pixel_bias"].double()
    assert not weight[:, 588:].any()

    bits = 24 if dtype == torch.float32 else 11
    bound = centred.abs() @ (weight.abs() * 2.0**-bits + 2.0**-35).T
    bound += state["patch_embed.pixel_bias"].double().abs() * 2.0**-24 + 1e-12
    print(f"{dtype}: largest error {(found - truth).abs().max():.2e}, bound {bound.max():.2e}")
    assert ((found - truth).abs() <= bound).all()
    row_weight = state["patch_embed.weight"].float() * 2.0 ** -pixel_weight_exponent(dtype)
    assert torch.equal(row_weight, tensors["patch_embed.proj.weight"].float().flatten(1))


def test_the_state_has_the_types_that_the_model_expects() -> None:
    state = convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, torch.bfloat16)
    others = {
        "patch_embed.weight": torch.float16,
        "patch_embed.pixel_weight": torch.float16,
        "patch_embed.pixel_bias": torch.float32,
    }
    for name, tensor in state.items():
        assert tensor.dtype == others.get(name, torch.bfloat16), name
        assert tensor.is_contiguous(), name
    float_state = convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, torch.float32)
    assert {tensor.dtype for tensor in float_state.values()} == {torch.float32}
    assert set(float_state) == set(state)
    in_block = {name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")}
    assert in_block == {
        "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "mlp.gate_up.weight", "mlp.gate_up.bias", "mlp.down.weight", "mlp.down.bias",
    }  # fmt: skip
    assert {name for name in state if not name.startswith("blocks.")} == {
        "patch_embed.weight", "patch_embed.pixel_weight", "patch_embed.pixel_bias",
        "merger.norm_weight", "merger.fc1.weight", "merger.fc1.bias", "merger.fc2.weight",
        "merger.fc2.bias",
    }  # fmt: skip


def test_the_state_is_unchanged_after_the_file_is_overwritten(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, SMALL)
    state = convert(load_checkpoint(tmp_path).tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    expected = convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    assert_same_tensors(state, expected)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, r"activations .* overflow float16 in the last block\. Use bfloat16"),
        (torch.float64, r"dtype is torch.float64\. Expected torch.bfloat16 or torch.float32"),
    ],
)
def test_other_types_are_refused_with_the_reason(dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        pixel_weight_exponent(dtype)
    with pytest.raises(ArgumentError, match=words):
        convert(random_tensors(SMALL), SMALL, IMAGE_CONFIG, dtype)


def test_patch_weights_too_large_to_fold_into_float16_are_refused() -> None:
    tensors = random_tensors(SMALL)
    tensors["patch_embed.proj.weight"][0, 0, 0, 0, 0] = 1e5
    with pytest.raises(
        CheckpointError,
        match=r"patch_embed\.proj\.weight: has values up to 99840, .* Use dtype=.float32.",
    ):
        convert(tensors, SMALL, IMAGE_CONFIG, torch.bfloat16)
    convert(tensors, SMALL, IMAGE_CONFIG, torch.float32)
