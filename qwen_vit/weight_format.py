"""Define padding and scales of stored weights, for the loader and the model."""

import torch

from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError

__all__ = ["PIXEL_ZERO", "padded_mlp_size", "padded_pixel_size", "pixel_weight_exponent"]

MLP_MULTIPLE = 128  # one GEMM tile; 3420 alone is not aligned to 16 bytes and costs 3.5x
PIXEL_MULTIPLE = 64
PIXEL_ZERO = 128  # uint8 pixels enter as pixel - 128, so that fp16 represents each exactly


def pixel_weight_exponent(dtype: torch.dtype) -> int:
    """Return the exponent e of pixel_weight's scale 2**e: 10 for bfloat16, 0 for float32.

    With bfloat16 the folded weights are float16, which has 3 more bits but a smaller range. The
    factor keeps weights of about 1e-4 out of float16's subnormal numbers.

    >>> pixel_weight_exponent(torch.bfloat16)
    10

    Raises ArgumentError for float16, which the published weights overflow, and for other types.
    """
    exponents = {torch.bfloat16: 10, torch.float32: 0}
    if dtype == torch.float16:
        raise ArgumentError(
            "dtype is float16, and the published weights overflow float16 in the last block",
            remedy="use bfloat16 or float32",
        )
    if dtype not in exponents:
        raise ArgumentError(f"dtype is {dtype}", expected="torch.bfloat16 or torch.float32")
    return exponents[dtype]


def padded_mlp_size(config: VisionConfig) -> int:
    """Return I', the MLP size with zero padding: a multiple of 128."""
    return _round_up(config.intermediate_size, MLP_MULTIPLE)


def padded_pixel_size(config: VisionConfig) -> int:
    """Return K, the values of one patch in one frame, with zero padding: a multiple of 64."""
    return _round_up(config.in_channels * config.patch_px**2, PIXEL_MULTIPLE)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
