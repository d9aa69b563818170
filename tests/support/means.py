"""Provide random rows of images and their means in float64."""

import torch
from torch import Tensor


def random_rows(lengths: list[int], width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return each image's rows, with a mean that is small against the values, as in embeddings."""
    made = torch.Generator().manual_seed(len(lengths) * width)
    return [(torch.randn(n, width, generator=made) + 0.1).to(dtype) for n in lengths]


def oracle(rows: Tensor, *, normalize: bool = False) -> Tensor:
    mean = rows.double().mean(0, keepdim=True)
    return mean / mean.norm() if normalize else mean
