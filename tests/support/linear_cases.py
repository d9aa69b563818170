"""Random cases for the linear kernels and the norm, and their float64 oracles."""

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from tests.support.towers import CPU

EPS = 1e-6


def linear_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: str = "plain",
    out_scale: float = 1.0,
) -> Tensor:
    """`linear` in float64; the exact GELU is 0.5 y (1 + erf(y / sqrt 2))."""
    y = x.double() @ weight.double().T * out_scale
    if bias is not None:
        y = y + bias.double()
    if epilogue == "gelu":
        y = 0.5 * y * (1 + torch.erf(y * 0.5**0.5))
    return y


def normed_oracle(x: Tensor, weight: Tensor, bias: Tensor, *, epilogue: str) -> Tensor:
    """`normed_linear` in float64."""
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
    """(x, weight, bias), with results of the order of 1; the SwiGLU gives N columns."""
    generator = torch.Generator().manual_seed(seed)
    n_out = 2 * N if epilogue == "swiglu" else N

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return normal(M, K), normal(n_out, K, scale=K**-0.5), normal(n_out)


def norm_case(dtype: torch.dtype, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.linspace(-4, 3, 256)[:, None]  # where eps decides, to large activations
    x = torch.randn(256, 160, generator=generator) * scales
    weight = torch.rand(160, generator=generator) * 2 - 0.5
    return x.to(device, dtype), weight.to(device, dtype)


def their_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = Qwen2_5_VLRMSNorm(len(weight), eps=1e-6)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)
