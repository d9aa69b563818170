"""Compare GEMMs on a GPU with float64, and test equal bits in any batch and tile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit.kernels import linear as kernels
from qwen_vit.kernels import linear_hopper
from qwen_vit.kernels.linear import (
    ResidualStream,
    linear,
    linear_residual,
    normed_linear,
    rms_norm,
)
from tests.support.linear_cases import (
    BOUNDS,
    EPILOGUES,
    EPS,
    assert_gathered_pixels_are_exact,
    linear_oracle,
    norm_case,
    normed_oracle,
    random_case,
    their_norm,
)
from tests.support.oracle import relative_error
from tests.support.towers import gpu

CUDA = torch.device("cuda")
# (K, N, epilogue) of the GEMMs of the published 7B tower: pixels, qkv, proj, gate and up, down, and
# the merger's two GEMMs.
PUBLISHED_PRODUCTS = {
    "rows": (1176, 1280, "plain"),
    "pixels": (640, 1280, "plain"),
    "qkv": (1280, 3840, "normed"),
    "proj": (1280, 1280, "residual"),
    "gate-up": (1280, 3456, "swiglu"),
    "down": (3456, 1280, "residual"),
    "fc1": (5120, 5120, "gelu"),
    "fc2": (5120, 3584, "plain"),
}
ROW_COUNTS = (1, 4, 63, 65, 129, 191, 193, 768, 1535, 1537, 3073, 5000, 6145)


class GemmCase:
    """Run one of the tower's GEMMs on a GPU, on rows of one random input."""

    def __init__(
        self, K: int, N: int, epilogue: str, M: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.epilogue = epilogue
        case = random_case(M, K, N, epilogue, dtype=dtype, device=CUDA, seed=seed)
        self.x, self.weight, self.bias = case
        self.before = torch.randn(M, N, device=CUDA).to(dtype)  # the residual stream

    def run(self, rows: slice = slice(None)) -> Tensor:
        x = self.x[rows].clone()
        if self.epilogue == "residual":
            stream = linear_residual(
                ResidualStream.from_values(self.before[rows].clone()), x, self.weight, self.bias
            )
            sums = stream.values.double().square().sum(1)
            assert relative_error(stream.squares.double().sum(0), sums) < 1e-6
            return torch.cat([stream.values, stream.squares.T.to(x.dtype)], dim=1)
        if self.epilogue in ("normed", "swiglu"):
            kind = "plain" if self.epilogue == "normed" else "swiglu"
            # ResidualStream.from_values adds in another order than the tower's "residual" epilogue
            stream = ResidualStream.from_values(x)
            return normed_linear(stream, self.weight, self.bias, eps=EPS, epilogue=kind)
        return linear(x, self.weight, self.bias, epilogue=self.epilogue)

    def oracle(self) -> Tensor:
        if self.epilogue in ("normed", "swiglu"):
            kind = "plain" if self.epilogue == "normed" else "swiglu"
            return normed_oracle(self.x, self.weight, self.bias, epilogue=kind)
        kind = "plain" if self.epilogue == "residual" else self.epilogue
        y = linear_oracle(self.x, self.weight, self.bias, epilogue=kind)
        return y + self.before.double() if self.epilogue == "residual" else y

    def error(self) -> float:
        oracle = self.oracle()
        return relative_error(self.run()[:, : oracle.shape[1]], oracle)


def published(name: str, M: int, dtype: torch.dtype) -> GemmCase:
    return GemmCase(*PUBLISHED_PRODUCTS[name], M, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", ROW_COUNTS)
@pytest.mark.parametrize("name", PUBLISHED_PRODUCTS)
def test_a_gemm_on_a_gpu_equals_float64(name: str, M: int, dtype: torch.dtype) -> None:
    assert published(name, M, dtype).error() < BOUNDS[dtype]


@gpu
@pytest.mark.parametrize("epilogue", [*EPILOGUES, "normed", "swiglu", "residual"])
@pytest.mark.parametrize(("K", "N"), [(16, 24), (40, 8), (160, 480), (72, 136)])
def test_a_small_gemm_on_a_gpu_equals_float64(K: int, N: int, epilogue: str) -> None:
    """The sizes are smaller than any tile, with edges in every direction."""
    for dtype in (torch.bfloat16, torch.float32):
        assert GemmCase(K, N, epilogue, 37, dtype).error() < BOUNDS[dtype]


@gpu
def test_the_gemm_of_pixels_on_a_gpu_takes_fp16_and_returns_bf16() -> None:
    x, weight, _ = random_case(1000, 640, 1280, dtype=torch.float16, device=CUDA)
    bias = torch.randn(1280, device=CUDA)
    options: dict[str, Any] = {"out_scale": 2.0**-10}
    ours = linear(x, weight, bias, out_dtype=torch.bfloat16, **options)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, linear_oracle(x, weight, bias, **options)) < 2e-3


SHARED_BYTES = 229_376  # of a program on Hopper, without the memory of barriers and exchanges


@gpu
@pytest.mark.parametrize("M", [1000, 6400])  # one tile for each multiprocessor, and several
@pytest.mark.parametrize("name", PUBLISHED_PRODUCTS)
def test_all_tiles_give_the_same_bits(name: str, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows may choose the tile only because all tiles give the same bits, in both
    kernels. Each kernel has its own chunk size for the sums of squares of a `residual`. For these
    sums, the test compares values between the kernels, and all bits between one kernel's tiles.
    """
    case = published(name, M, torch.bfloat16)
    N = case.before.shape[1]
    results = []
    for rows in linear_hopper.TILES.values():
        for _, tile in rows:
            stages = tile.num_stages * (tile.rows + tile.columns) * linear_hopper.BK * 2
            stored = tile.rows * tile.columns * (1 if case.epilogue == "swiglu" else 2)
            if stages + stored > SHARED_BYTES:
                continue  # for SwiGLU, whose result has half the width
            if case.epilogue == "residual" and tile.columns < linear_hopper.SQUARES_COLUMNS:
                continue  # narrower than a chunk of sums of squares
            everywhere = dict.fromkeys(linear_hopper.TILES, ((0, tile),))
            monkeypatch.setattr(linear_hopper, "TILES", everywhere)
            results.append(case.run())
    for result in results:
        assert torch.equal(result, results[0])
    monkeypatch.setattr(kernels, "_is_for_hopper", lambda *_: False)
    tiles = {tile for rows in kernels.HOPPER_TILES.values() for _, tile in rows}
    for simple in [*tiles, kernels.FALLBACK_TILES[16]]:
        monkeypatch.setattr(kernels, "_gemm_tile", lambda *_, tile=simple: tile)
        assert torch.equal(case.run()[:, :N], results[0][:, :N])
    monkeypatch.setattr(kernels, "_capability", lambda _: (8, 0))  # without tensor descriptors
    assert torch.equal(case.run()[:, :N], results[0][:, :N])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PUBLISHED_PRODUCTS)
def test_a_row_on_a_gpu_has_the_same_bits_alone_and_in_any_batch(
    name: str, dtype: torch.dtype
) -> None:
    case = published(name, 20_000 if dtype == torch.bfloat16 else 7000, dtype)
    batch = case.run()
    for start, count in (
        (0, 1),
        (6999, 1),
        (17, 4),
        (100, 63),
        (500, 769),
        (1000, 1537),
        (0, 4096),
    ):
        rows = slice(start, start + count)
        assert torch.equal(case.run(rows), batch[rows])


@gpu
def test_a_gemm_gives_the_same_bits_a_thousand_times() -> None:
    for name in ("qkv", "proj", "gate-up", "down"):
        case = published(name, 2500, torch.bfloat16)
        first = case.run()
        assert all(torch.equal(case.run(), first) for _ in range(250))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_on_a_gpu_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    """The scale may differ by a rounding in fp32, so few bf16 values round in the other
    direction."""
    x, weight = norm_case(dtype, CUDA)
    ours, theirs = rms_norm(x, weight, 1e-6), their_norm(x, weight)
    assert relative_error(ours, theirs) < (2e-7 if dtype == torch.float32 else 2e-4)
    assert (ours != theirs).float().mean() < (1 if dtype == torch.float32 else 1e-2)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_pixels_on_a_gpu_are_centred_and_exact(dtype: torch.dtype) -> None:
    assert_gathered_pixels_are_exact(CUDA, dtype)
