"""Compare GEMMs with epilogues, the RMSNorm and the pixel gather with float64."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qwen_vit.kernels import linear as kernels
from qwen_vit.kernels import linear_hopper
from qwen_vit.kernels.linear import (
    ResidualStream,
    linear,
    linear_residual,
    normed_linear,
    rms_norm,
)
from qwen_vit.weight_format import SCALE_COLUMNS
from tests.support import ROOT
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
from tests.support.oracle import relative_error, rms_norm_wrong_casts
from tests.support.towers import CPU


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("M", [1, 7, 65])
def test_a_gemm_on_the_cpu_equals_float64(M: int, epilogue: str, with_bias: bool) -> None:
    x, weight, bias = random_case(M, 96, 40, epilogue)
    ours = linear(x, weight, bias if with_bias else None, epilogue=epilogue)
    oracle = linear_oracle(x, weight, bias if with_bias else None, epilogue=epilogue)
    assert ours.dtype == torch.float32
    assert relative_error(ours, oracle) < BOUNDS[torch.float32]


def test_the_scale_comes_before_the_bias_and_the_epilogue() -> None:
    x, weight, bias = random_case(9, 64, 40)
    options: dict[str, Any] = {"epilogue": "gelu", "out_scale": 2.0**-3}
    ours = linear(x, weight, bias, **options)
    assert relative_error(ours, linear_oracle(x, weight, bias, **options)) < 1e-6


def test_the_gelu_is_the_exact_one() -> None:
    """The tanh form has errors of at most 5e-4, and 2e-4 in this test, which far exceeds the
    bound."""
    x, weight, bias = random_case(64, 96, 40)
    tanh = F.gelu(linear_oracle(x, weight, bias), approximate="tanh")
    exact = linear_oracle(x, weight, bias, epilogue="gelu")
    assert relative_error(tanh, exact) > 50 * BOUNDS[torch.float32]
    assert relative_error(linear(x, weight, bias, epilogue="gelu"), exact) < 1e-6


@pytest.mark.parametrize("epilogue", ["plain", "swiglu"])
@pytest.mark.parametrize("M", [1, 7, 65])
def test_a_gemm_of_a_normed_stream_on_the_cpu_equals_float64(M: int, epilogue: str) -> None:
    x, weight, bias = random_case(M, 96, 40, epilogue)
    x = x * 10.0 ** torch.linspace(-3, 3, M)[:, None]  # from values below eps to large activations
    ours = normed_linear(ResidualStream.from_values(x), weight, bias, eps=EPS, epilogue=epilogue)
    assert ours.shape == (M, 40)
    assert relative_error(ours, normed_oracle(x, weight, bias, epilogue=epilogue)) < 2e-6


def test_a_residual_gemm_on_the_cpu_returns_sums_of_squares() -> None:
    x, weight, bias = random_case(9, 96, 40)
    before = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    stream = linear_residual(ResidualStream.from_values(before), x, weight, bias)
    assert relative_error(stream.values, before.double() + linear_oracle(x, weight, bias)) < 2e-6
    assert relative_error(stream.squares.sum(0), stream.values.double().square().sum(1)) < 1e-6


def test_no_rows_give_no_rows() -> None:
    for epilogue in EPILOGUES:
        x, weight, bias = random_case(0, 96, 40, epilogue)
        assert linear(x, weight, bias, epilogue=epilogue).shape == (0, 40)
    for epilogue in ("plain", "swiglu"):
        x, weight, bias = random_case(0, 96, 40, epilogue)
        stream = ResidualStream.from_values(x)
        assert normed_linear(stream, weight, bias, eps=EPS, epilogue=epilogue).shape == (0, 40)
    x, weight, bias = random_case(0, 96, 40)
    assert linear_residual(
        ResidualStream.from_values(torch.zeros(0, 40)), x, weight, bias
    ).values.shape == (
        0,
        40,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_on_the_cpu_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    x, weight = norm_case(dtype)
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == dtype
    assert torch.equal(ours, their_norm(x, weight))


def test_the_cast_order_of_the_norm_changes_bits_in_bf16() -> None:
    x, weight = norm_case(torch.bfloat16)
    moved = (rms_norm(x, weight, 1e-6) != rms_norm_wrong_casts(x, weight)).float().mean()
    assert moved > 1 / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_pixels_are_centred_and_exact(dtype: torch.dtype) -> None:
    assert_gathered_pixels_are_exact(CPU, dtype)


# A child process runs the source of the compiled kernels in Triton's interpreter, which must be on
# before the import of triton. These kernels use features that `qwen_vit.kernels.interpret` lacks.
INTERPRETED = """
import json, sys
import torch
from triton.tools.tensor_descriptor import TensorDescriptor
from qwen_vit.kernels import linear as kernels, pixels
from tests.support import linear_cases as t
from tests.support.oracle import relative_error
from tests.support.towers import random_pixels

def gemm(M, K, N, epilogue, with_bias, rows, columns, depth, group, scale, has_tma=True):
    x, weight, bias = t.random_case(M, K, N, epilogue)
    squares_in, residual = None, torch.randn(M, N)
    if epilogue in ("swiglu", "normed"):
        squares_in = x.square().unflatten(1, (4, -1)).sum(2).T.contiguous()  # four chunks
    out = torch.full((M, N), float("nan"))
    column_tiles = -(-weight.shape[0] // columns)
    squares = torch.full((column_tiles, M), float("nan"))
    block = [rows, columns // 2 if epilogue == "swiglu" else columns]
    matrix = TensorDescriptor.from_tensor if has_tma else lambda rows, block: rows
    kernels._gemm[(-(-M // rows) * column_tiles,)](
        matrix(x, [rows, depth]), matrix(weight, [columns, depth]), bias,
        matrix(residual, block) if epilogue == "residual" else None, squares_in,
        matrix(out, block), squares, None, None, M, weight.shape[0], scale, t.EPS, K=K,
        HAS_BIAS=with_bias, EPILOGUE="plain" if epilogue == "normed" else epilogue,
        SQUARES=0 if squares_in is None else 4, PRECISION="ieee", BM=rows, BN=columns, BK=depth,
        GROUP=group, TMA=has_tma,
    )
    if squares_in is not None:
        kind = "plain" if epilogue == "normed" else epilogue
        return relative_error(out, t.normed_oracle(x, weight, bias, epilogue=kind))
    product = "plain" if epilogue == "residual" else epilogue
    oracle = t.linear_oracle(
        x, weight, bias if with_bias else None, epilogue=product, out_scale=scale,
    )
    if epilogue == "residual":
        oracle = oracle + residual
        sums = relative_error(squares.sum(0), out.double().square().sum(1))
        return max(sums, relative_error(out, oracle))
    return relative_error(out, oracle)

def norm():
    x, weight = t.norm_case(torch.float32)
    out = torch.full_like(x, float("nan"))
    kernels._rms_norm[(len(x),)](x, weight, out, C=160, C_PADDED=256, EPS=1e-6)
    squares = torch.full((1, len(x)), float("nan"))
    kernels._row_squares[(-(-len(x) // 3),)](x, squares, len(x), C=160, C_PADDED=256, BM=4)
    sums = relative_error(squares[0], x.double().square().sum(1))
    return max(sums, relative_error(out, t.their_norm(x, weight)))

def gather():
    data, index = random_pixels(20, 0), torch.randint(0, 20, (37,), dtype=torch.int32)
    out = torch.full((37, 640), float("nan"))
    pixels._gather_pixels[(-(-37 // 8),)](
        data, index, out, 37, P=588, P_OUT=640, P_BLOCK=1024, ZERO=128, BM=8
    )
    expected = torch.nn.functional.pad(data[index.long()].float() - 128, (0, 52))
    return float((out - expected).abs().max())

cases = json.loads(sys.argv[1])
print(json.dumps([gemm(*case) for case in cases] if cases else [norm(), gather()]))
"""
# M, K, N, epilogue, bias; rows, columns and depth of a tile, row tiles of a group; scale; TMA
INTERPRETED_CASES = [
    (33, 96, 48, "plain", True, 16, 32, 32, 8, 0.5),
    (33, 64, 48, "plain", False, 16, 16, 64, 2, 1.0),  # three row tiles in groups of two
    (150, 64, 80, "plain", True, 16, 16, 32, 4, 1.0),
    (1, 64, 48, "gelu", True, 16, 16, 32, 8, 1.0),
    (70, 80, 48, "gelu", True, 32, 32, 32, 1, 0.5),  # K ends inside a tile
    (33, 96, 48, "normed", True, 16, 32, 32, 8, 1.0),
    (33, 96, 64, "swiglu", True, 16, 32, 32, 8, 1.0),
    (50, 64, 40, "swiglu", True, 32, 16, 64, 2, 1.0),
    (33, 96, 48, "residual", True, 16, 32, 32, 8, 1.0),  # N ends inside a tile
    (70, 64, 48, "residual", True, 32, 16, 64, 2, 1.0),
    (70, 80, 48, "gelu", True, 32, 32, 32, 1, 0.5, False),  # like GPUs without TMA
    (50, 72, 40, "swiglu", True, 32, 16, 64, 2, 1.0, False),
    (33, 96, 40, "residual", True, 16, 32, 32, 8, 1.0, False),
]


@cache
def interpreted_errors(*cases: tuple[Any, ...]) -> tuple[float, ...]:
    """Return the errors of each case's GEMM, or of the norm and the gather without cases."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.slow
def test_the_interpreted_norm_and_gather_equal_the_oracle() -> None:
    norm_error, gather_error = interpreted_errors()
    assert norm_error < 2e-7  # the scale has a separate rounding
    assert gather_error == 0.0


@pytest.mark.parametrize("case", range(len(INTERPRETED_CASES)))
def test_the_interpreted_gemm_equals_the_oracle(case: int) -> None:
    """Test tile order, edges, SwiGLU halves, epilogues and scale, without the compiler."""
    error = interpreted_errors(*INTERPRETED_CASES)[case]
    print(INTERPRETED_CASES[case], f"{error:.1e}")
    assert error < BOUNDS[torch.float32]


@pytest.mark.parametrize("N", [1280, 2176, 5120])
def test_the_chunk_of_sums_of_squares_does_not_depend_on_the_rows(
    N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another chunk size would round differently, so an image's bits would depend on its batch."""
    monkeypatch.setattr(kernels, "_capability", lambda _: (9, 0))
    weight = torch.empty(N, 1280, dtype=torch.bfloat16, device="meta")
    rows = [
        torch.empty(M, 1280, dtype=torch.bfloat16, device="meta") for M in (1, 1024, 1536, 8192)
    ]
    assert {kernels._gemm_tile(x, weight, "residual").columns for x in rows} == {128}


def test_every_gemm_for_hopper_has_a_tile_at_any_depth_and_rows() -> None:
    """A tower wider than the published towers once used a depth that the table does not contain."""
    for epilogue in ("plain", "gelu", "swiglu", "residual"):
        for K in (640, 1280, 2560, 5120, 10_240):
            for M in (1, 1000, 2304, 9216, 100_000):
                tile = linear_hopper._tile(epilogue, K, M)
                first = linear_hopper.FIRST_STEPS if epilogue == "residual" else 0
                assert first + tile.num_stages <= 10, "of 64 columns each"


def test_a_tile_that_quantises_has_the_columns_of_a_scale_at_any_width() -> None:
    for K in (1280, 2560, 5120):
        tiles = [
            linear_hopper._tile("residual", K, M, is_quantizing=True) for M in (1, 1536, 6144, 9216)
        ]
        assert {tile.columns for tile in tiles} == {SCALE_COLUMNS}
