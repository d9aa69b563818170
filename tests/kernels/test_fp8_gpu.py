"""Compare the e4m3 MLP on a GPU with float64, and test equal bits in any batch and tile."""

from typing import Any

import pytest
import torch

from qwen_vit.device import FP8_CAPABILITY
from qwen_vit.encoder import VisionEncoder
from qwen_vit.kernels import IS_KNOWN_GLUON, linear_fp8
from qwen_vit.kernels.linear import ResidualStream, linear_residual
from qwen_vit.weight_format import QuantizedRows, fp8_column_order, quantize
from tests.support.fp8_cases import SHAPES, SUM_ERROR, Fp8Case
from tests.support.linear_cases import random_case
from tests.support.oracle import relative_error
from tests.support.towers import gpu
from tests.support.wide_tower import CONFIG
from tools.random_tower import random_weights

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_fp8_hopper

CUDA = torch.device("cuda")
ROUNDING = {"swiglu": 2.0**-4 / 3**0.5, "residual": 2e-3}
ROW_COUNTS = (1, 4, 63, 65, 129, 191, 193, 1535, 1537, 6145)

has_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="needs a GPU with matrix instructions for 8-bit floats",
)


def run(case: Fp8Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two results of the GPU kernel, with the tower's arguments."""
    launch = linear_fp8._gemm_for(case.rows)
    return launch(case.rows, case.weight, case.bias, epilogue=case.epilogue, **case.operands)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@gpu
@has_fp8
@pytest.mark.parametrize("M", ROW_COUNTS)
@pytest.mark.parametrize("epilogue", SHAPES)
def test_an_e4m3_gemm_equals_float64(epilogue: str, M: int) -> None:
    case = Fp8Case.random(epilogue, M, device=CUDA)
    out, extra = run(case)
    found = QuantizedRows(out, extra).dequantized() if epilogue == "swiglu" else out
    assert relative_error(found, case.oracle()) < ROUNDING[epilogue] + SUM_ERROR
    if epilogue == "residual":
        sums = out.double().square().sum(1)
        assert relative_error(extra.double().sum(0), sums) < 1e-6


@gpu
@has_fp8
@pytest.mark.parametrize("M", [1000, 6400])
@pytest.mark.parametrize("epilogue", SHAPES)
def test_all_tiles_of_an_e4m3_gemm_give_the_same_bits(epilogue: str, M: int) -> None:
    case = Fp8Case.random(epilogue, M, device=CUDA)
    runs: list[tuple[Any, Any]] = [(linear_fp8.launch_gemm, linear_fp8.TILES[epilogue])]
    if IS_KNOWN_GLUON and linear_fp8_hopper.supports(case.rows):
        tiles = dict.fromkeys(tile for _, tile in linear_fp8_hopper.TILES[epilogue])
        runs += [(linear_fp8_hopper.gemm, tile) for tile in tiles]
    first, *others = [
        launch(case.rows, case.weight, case.bias, epilogue=epilogue, tile=tile, **case.operands)[0]
        for launch, tile in runs
    ]
    assert all(same_bits(first, other) for other in others)


@gpu
@has_fp8
@pytest.mark.parametrize("epilogue", SHAPES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(epilogue: str) -> None:
    case = Fp8Case.random(epilogue, 20_000, device=CUDA)
    batch = run(case)[0]
    for start, count in ((0, 1), (6999, 1), (17, 4), (100, 63), (500, 769), (1000, 1537)):
        rows = slice(start, start + count)
        assert same_bits(run(case.rows_at(rows))[0], batch[rows])


@gpu
@has_fp8
@pytest.mark.parametrize("M", ROW_COUNTS)
def test_proj_writes_the_rows_of_quantize_and_the_bits_of_the_plain_stream(M: int) -> None:
    x, weight, bias = random_case(M, 1280, 1280, dtype=torch.bfloat16, device=CUDA)
    stream = ResidualStream.from_values(torch.randn(M, 1280, device=CUDA).bfloat16())
    found = linear_residual(stream, x, weight, bias, quantized=True)
    assert torch.equal(found.values, linear_residual(stream, x, weight, bias).values)
    expected = quantize(found.values[:, fp8_column_order(1280).to(CUDA)])
    assert found.quantized is not None
    assert same_bits(found.quantized.values, expected.values)
    assert torch.equal(found.quantized.scales, expected.scales)


@gpu
@has_fp8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epilogue", SHAPES)
def test_nan_and_infinity_change_no_other_row(epilogue: str, bad: float) -> None:
    case = Fp8Case.random(epilogue, 300, device=CUDA)
    clean = run(case)[0]
    rows = case.rows.dequantized()
    rows[100, 7] = bad
    poisoned = Fp8Case(epilogue, quantize(rows), case.weight, case.bias, case.squares, case.before)
    out, extra = run(poisoned)
    found = QuantizedRows(out, extra).dequantized() if epilogue == "swiglu" else out.float()
    assert bool(found[100].isnan().all())
    others = [row for row in range(300) if row != 100]
    assert same_bits(out[others], clean[others])


@gpu
@has_fp8
@pytest.mark.parametrize("epilogue", SHAPES)
def test_zero_rows_give_the_result_of_the_bias(epilogue: str) -> None:
    case = Fp8Case.random(epilogue, 70, device=CUDA)
    rows = case.rows.dequantized()
    rows[5] = 0
    zeroed = Fp8Case(epilogue, quantize(rows), case.weight, case.bias, case.squares, case.before)
    out, extra = run(zeroed)
    found = QuantizedRows(out, extra).dequantized() if epilogue == "swiglu" else out
    assert relative_error(found[5:6], zeroed.oracle()[5:6]) < ROUNDING[epilogue] + SUM_ERROR


@gpu
@has_fp8
def test_an_fp8_encoder_gives_the_same_bits_alone_by_graph_and_in_a_batch() -> None:
    weights = random_weights(CONFIG, 0, torch.device("cpu"))
    encoder = VisionEncoder.from_tensors(weights, CONFIG, device="cuda", quantization="fp8")
    eager = VisionEncoder.from_tensors(
        weights, CONFIG, device="cuda", quantization="fp8", cuda_graphs=False
    )
    exact = VisionEncoder.from_tensors(weights, CONFIG, device="cuda")
    generator = torch.Generator().manual_seed(0)
    pictures = [
        torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy()
        for h, w in ((224, 280), (448, 448), (56, 700), (336, 84))
    ]
    batch = encoder.encode(pictures)
    for picture, found in zip(pictures, batch, strict=True):
        assert torch.equal(encoder.encode(picture).embeds, found.embeds)
        assert torch.equal(eager.encode(picture).embeds, found.embeds)
        assert 0 < relative_error(found.embeds, exact.encode(picture).embeds) < 0.2
    assert encoder.metadata()["quantization"] == "fp8"
    assert repr(encoder) == "VisionEncoder('tensors', bfloat16, fp8, on cuda:0)"
