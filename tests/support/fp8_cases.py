"""Provide random cases for the e4m3 GEMMs, and their float64 oracles on the same e4m3 values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_vit.weight_format import QuantizedRows, quantize, split_gate_and_up
from tests.support.linear_cases import EPS
from tests.support.towers import CPU

# epilogue -> (K, N) of the GEMM in the published tower
SHAPES = {"swiglu": (1280, 6912), "residual": (3456, 1280)}
# The error of the sums against float64. The matrix instruction adds 32 products with 14 bits.
SUM_ERROR = 1e-3


@dataclass(frozen=True, slots=True)
class Fp8Case:
    """Hold the operands of one GEMM, as the tower passes them."""

    epilogue: str
    rows: QuantizedRows
    weight: tuple[Tensor, Tensor]
    bias: Tensor
    squares: Tensor  # of the rows before quantisation
    before: Tensor  # the stream that `residual` adds to

    @classmethod
    def random(
        cls, epilogue: str, M: int, *, K: int = 0, N: int = 0, device: torch.device = CPU,
        dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> "Fp8Case":  # fmt: skip
        K, N = K or SHAPES[epilogue][0], N or SHAPES[epilogue][1]
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        x = normal(M, K) * 2.0 ** torch.randint(-8, 9, (M, 1), generator=generator, device=device)
        weight = quantize(normal(N, K) * K**-0.5, K)
        squares = x.square().unflatten(1, (-1, 128)).sum(2).T.contiguous()
        return cls(
            epilogue, quantize(x), (weight.values, weight.scales[0]), normal(N).to(dtype), squares,
            normal(M, N).to(dtype),
        )  # fmt: skip

    def rows_at(self, rows: slice) -> "Fp8Case":
        """Return the case with only these rows, in separate memory."""
        quantized = QuantizedRows(
            self.rows.values[rows].clone(), self.rows.scales[:, rows].clone(),
        )  # fmt: skip
        squares = self.squares[:, rows].clone()
        return Fp8Case(
            self.epilogue, quantized, self.weight, self.bias, squares, self.before[rows].clone()
        )

    @property
    def operands(self) -> dict[str, Any]:
        """Return the operands of a launch in addition to rows, weight and bias."""
        if self.epilogue == "swiglu":
            return {"squares": self.squares, "eps": EPS}
        return {"residual": self.before}

    def oracle(self) -> Tensor:
        """Return the result in float64, without the rounding to e4m3 or bf16."""
        values, scale = self.weight
        y = self.rows.dequantized().double() @ (values.double() * scale.double()[:, None]).T
        if self.epilogue == "residual":
            return y + self.bias.double() + self.before.double()
        mean = self.squares.double().sum(0)[:, None] / self.rows.values.shape[1]
        gate, up = split_gate_and_up(y * torch.rsqrt(mean + EPS) + self.bias.double())
        return gate / (1 + torch.exp(-gate)) * up
