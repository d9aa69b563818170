"""Compare quantised e4m3 rows, their orders, and the MLP on a CPU with float64."""

import pytest
import torch
from torch.nn import functional as F

from qwen_vit.kernels.linear import ResidualStream, linear_residual
from qwen_vit.kernels.linear_fp8 import gated_rows, linear_residual_fp8
from qwen_vit.weight_format import (
    QuantizedRows,
    fp8_column_order,
    interleave_fp8,
    quantize,
    split_gate_and_up,
)
from tests.support.fp8_cases import Fp8Case
from tests.support.linear_cases import EPS
from tests.support.oracle import relative_error

ROUNDING = 2.0**-4 / 3**0.5  # the mean error if every value is just above a power of two


def rows_of_every_size() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.arange(-100, 100)[:, None]
    return torch.randn(len(sizes), 256, generator=generator) * sizes


def test_a_quantised_value_is_rounded_once_to_three_bits() -> None:
    """The relative error of normal e4m3 numbers is at most 2^-4. The error of smaller numbers is at
    most half a step of 2^-9."""
    rows = rows_of_every_size()
    quantized = quantize(rows)
    scales = quantized.scales.T.repeat_interleave(128, dim=1)
    off = (quantized.dequantized() - rows).abs()
    assert bool((off <= torch.maximum(rows.abs() * 2.0**-4, scales * 2.0**-10)).all())
    assert relative_error(quantized.dequantized(), rows) < ROUNDING
    largest = quantized.values.float().unflatten(1, (-1, 128)).abs().amax(2)
    assert bool(((largest >= 224) & (largest <= 448)).all())


def test_scales_are_powers_of_two_and_depend_on_one_row() -> None:
    rows = rows_of_every_size()
    quantized = quantize(rows)
    mantissas, _ = torch.frexp(quantized.scales)
    assert bool((mantissas == 0.5).all())
    alone = quantize(rows[7:8])
    assert torch.equal(alone.scales, quantized.scales[:, 7:8])
    assert torch.equal(alone.values.view(torch.uint8), quantized.values[7:8].view(torch.uint8))


def test_values_just_above_448_take_the_next_scale() -> None:
    for value, scale in (
        (448.0, 1.0), (448.0 * (1 + 2.0**-20), 2.0), (256.0, 1.0), (223.9, 0.5),
        (torch.finfo(torch.float32).max, 2.0**120),
    ):  # fmt: skip
        rows = torch.zeros(1, 128)
        rows[0, 3] = value
        assert quantize(rows).scales.item() == scale
        assert bool(quantize(rows).values.float().isfinite().all())


def test_zero_rows_stay_zero() -> None:
    assert not quantize(torch.zeros(3, 128)).dequantized().any()


def test_nan_and_infinity_change_no_other_row() -> None:
    rows = torch.ones(4, 256)
    rows[1, 5], rows[2, 200] = float("nan"), float("inf")
    found = quantize(rows).dequantized()
    assert int(found[1].isnan().sum()) == 1  # the value itself
    assert bool(found[2, 128:].isnan().all())  # the values with the same scale
    assert bool((found[[0, 3]] == 1).all())


def test_values_below_the_range_of_scales_become_zero() -> None:
    rows = torch.full((1, 128), 2.0**-140)
    assert not quantize(rows).dequantized().any()


def test_the_orders_are_permutations_with_correct_inverses() -> None:
    order = fp8_column_order(256)
    assert torch.equal(order.sort().values, torch.arange(256))
    assert order[:128].max() < 128  # each column keeps its scale
    gate, up = torch.arange(128.0)[:, None], 1000 + torch.arange(128.0)[:, None]
    interleaved = interleave_fp8(gate, up).T
    again = split_gate_and_up(interleaved)
    assert torch.equal(again[0], gate.T)
    assert torch.equal(again[1], up.T)
    for column in range(128):  # a gate and its up are 8 columns apart
        where = int((interleaved[0] == column).nonzero())
        assert interleaved[0, where + 8] == 1000 + column


@pytest.mark.parametrize("M", [1, 9])
def test_gated_rows_on_a_cpu_equal_float64(M: int) -> None:
    case = Fp8Case.random("swiglu", M, K=256, N=512, dtype=torch.float32)
    stream = ResidualStream(case.before, case.squares, case.rows)
    found = gated_rows(stream, case.weight, case.bias, eps=EPS)
    assert relative_error(found.dequantized(), case.oracle()) < ROUNDING
    again = quantize(case.oracle().float()).dequantized()
    assert relative_error(found.dequantized(), again) < 2e-3  # values between two steps


@pytest.mark.parametrize("M", [1, 9])
def test_a_sum_from_e4m3_rows_on_a_cpu_equals_float64(M: int) -> None:
    case = Fp8Case.random("residual", M, K=256, N=128, dtype=torch.float32)
    stream = ResidualStream.from_values(case.before)
    found = linear_residual_fp8(stream, case.rows, case.weight, case.bias)
    assert relative_error(found.values, case.oracle()) < 2e-6
    assert found.quantized is None


def test_a_stream_in_e4m3_has_its_columns_in_the_kernels_order() -> None:
    x, weight = torch.randn(5, 64), torch.randn(256, 64)
    stream = ResidualStream.from_values(torch.randn(5, 256))
    found = linear_residual(stream, x, weight, torch.zeros(256), quantized=True)
    assert found.quantized is not None
    order = fp8_column_order(256)
    expected = quantize(F.linear(x, weight).add(stream.values)[:, order])
    assert torch.equal(found.quantized.dequantized(), expected.dequantized())
    assert linear_residual(stream, x, weight, torch.zeros(256)).quantized is None


def test_rows_of_a_scale_per_output_column_are_dequantised() -> None:
    weight = torch.randn(6, 384)
    assert relative_error(quantize(weight, 384).dequantized(), weight) < ROUNDING
    rows = QuantizedRows.empty(4, 256, torch.device("cpu"))
    assert (rows.values.shape, rows.scales.shape) == ((4, 256), (2, 4))
