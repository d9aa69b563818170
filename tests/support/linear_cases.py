"""Provide random cases for the linear kernels and the norm, and float64 oracles."""

import torch
from torch import Tensor

from qwen_vit.kernels.pixels import gather_pixels
from qwen_vit.weight_format import PIXEL_ZERO
from tests.support.towers import CPU, random_pixels

EPS = 1e-6


def linear_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: str = "plain",
    out_scale: float = 1.0,
) -> Tensor:
    """Compute `linear` in float64. The exact GELU is 0.5 y (1 + erf(y / sqrt 2))."""
    y = x.double() @ weight.double().T * out_scale
    if bias is not None:
        y = y + bias.double()
    if epilogue == "gelu":
        y = 0.5 * y * (1 + torch.erf(y * 0.5**0.5))
    return y


def normed_oracle(x: Tensor, weight: Tensor, bias: Tensor, *, epilogue: str) -> Tensor:
    """Compute `normed_linear` in float64."""
    x = x.double()
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) @ weight.double().T + bias.double()
    if epilogue == "swiglu":
        gate, up = y.unflatten(1, (-1, 2, 8)).unbind(2)
        y = (gate / (1 + torch.exp(-gate)) * up).flatten(1)
    return y


def random_case(
    M: int,
    K: int,
    N: int,
    epilogue: str = "plain",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, weight, bias) with results of about 1. The SwiGLU gives N columns."""
    generator = torch.Generator().manual_seed(seed)
    n_out = 2 * N if epilogue == "swiglu" else N

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return normal(M, K), normal(n_out, K, scale=K**-0.5), normal(n_out)


def norm_case(dtype: torch.dtype, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # from values below eps to large activations
    scales = 10.0 ** torch.linspace(-4, 3, 256)[:, None]
    x = torch.randn(256, 160, generator=generator) * scales
    weight = torch.rand(160, generator=generator) * 2 - 0.5
    return x.to(device, dtype), weight.to(device, dtype)


def their_norm(x: Tensor, weight: Tensor) -> Tensor:
    # This import takes seconds, and the child process that interprets GEMMs does not need it.
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    norm = Qwen2_5_VLRMSNorm(len(weight), eps=1e-6)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


EPILOGUES = ("plain", "gelu")
# float32: a sum of K products has an error of about sqrt(K) roundings of 6e-8, 2e-6 at K = 1,280.
# bfloat16: one rounding of the result is 1.7e-3 in the mean (2^-9 uniformly over a binade).
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0e-3}


def assert_gathered_pixels_are_exact(device: torch.device, dtype: torch.dtype) -> None:
    pixels = random_pixels(67, 0)
    pixels[0, :256] = torch.arange(256, dtype=torch.uint8)  # every uint8 value
    index = torch.randint(0, 67, (101,), dtype=torch.int32)
    index[0] = 0
    out = gather_pixels(
        pixels.to(device), index.to(device), zero=PIXEL_ZERO, width=640, dtype=dtype
    ).cpu()
    assert (out.shape, out.dtype) == ((101, 640), dtype)
    assert torch.equal(out[:, :588].double(), pixels[index.long()].double() - 128)
    assert not out[:, 588:].any()
