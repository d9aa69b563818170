"""Test that public functions raise our own errors for unusual tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import VisionEncoder, fused_rope_varlen_attention, write_features
from qwen_vit.errors import QwenVitError
from qwen_vit.features import ImageFeatures

ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor([*tensor.float()] or [tensor.float()]),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
}
GRID = torch.tensor([[1, 4, 6]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_unusual_tensors_raise_our_own_errors(
    encoder: VisionEncoder, kind: str, tmp_path: Path
) -> None:
    odd = ODD[kind]
    qkv, table, ends = torch.zeros(9, 3, 2, 8), torch.ones(9, 4), torch.tensor([0, 9])
    feature = ImageFeatures("a", torch.zeros(6, 8), (1, 4, 6), layers={0: odd(torch.zeros(24, 8))})
    calls: list[Callable[[], Any]] = [
        lambda: encoder.encode(odd(torch.zeros(56, 84, 3))),
        lambda: encoder.encode_patches(odd(torch.zeros(24, 1176)), GRID),
        lambda: encoder.encode_patches(torch.zeros(24, 1176), odd(GRID)),
        lambda: encoder.encode_pixels(odd(torch.zeros(24, 1176, dtype=torch.uint8)), GRID),
        lambda: write_features(tmp_path / "f", [feature], encoder.metadata()),
        lambda: write_features(
            tmp_path / "f", [ImageFeatures("a", odd(torch.zeros(6, 8)), (1, 4, 6))], {}
        ),
        lambda: fused_rope_varlen_attention(odd(qkv), table, table, ends),
        lambda: fused_rope_varlen_attention(qkv, odd(table), table, ends),
    ]
    for place, call in enumerate(calls):
        with pytest.raises(QwenVitError) as caught:
            call()
        assert str(caught.value).isprintable(), place


def negative(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor times -1, which torch stores as the same memory and a bit."""
    view = torch.complex(torch.zeros_like(tensor), tensor).conj().imag
    assert view.is_neg()
    return view


def test_a_negative_view_gives_the_results_of_its_values(
    encoder: VisionEncoder, tmp_path: Path
) -> None:
    rows, qkv = torch.randn(24, 1176), torch.randn(9, 3, 2, 8)
    table, ends = torch.rand(9, 4), torch.tensor([0, 9])
    got = encoder.encode_patches(negative(rows), GRID)
    assert torch.equal(got, encoder.encode_patches(-rows, GRID))
    assert torch.equal(
        fused_rope_varlen_attention(negative(qkv), table, negative(table), ends),
        fused_rope_varlen_attention(-qkv, table, -table, ends),
    )
