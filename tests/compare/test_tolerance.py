"""Test the tolerances and the measured differences."""

import math

import pytest
import torch

from qwen_vit.compare.tolerance import Difference, judge, relative_error
from qwen_vit.errors import ArgumentError


def test_float32_is_bounded_by_hugging_faces_own_error() -> None:
    def passes(distance: float, theirs: float) -> bool:
        return judge(torch.float32, distance=distance, ours=0.0, theirs=theirs).passed

    assert passes(9.9e-6, 1e-7)
    assert not passes(1.1e-5, 1e-7)
    assert passes(3.9e-5, 2e-5)
    assert not passes(4.1e-5, 2e-5)
    assert not passes(0.0, 1.1e-4)
    assert not passes(math.inf, 1e-7)
    assert not passes(0.0, math.inf)


def test_bfloat16_is_bounded_by_the_ratio_of_the_errors() -> None:
    def passes(ours: float, theirs: float, recorded: float | None = None) -> bool:
        verdict = judge(torch.bfloat16, distance=1.0, ours=ours, theirs=theirs, recorded=recorded)
        return verdict.passed

    assert passes(1.01e-3, 1e-3)
    assert not passes(1.02e-3, 1e-3)
    assert passes(0.0, 0.0)
    assert not passes(1e-3, 0.0)
    assert not passes(1e-3, 1.5)  # its error is larger than the error of zeros
    assert not passes(math.inf, 1e-3)
    # A golden file of other weights has a large error here. It must not raise our tolerance.
    assert not passes(2e-3, 0.5, recorded=1e-3)
    assert not passes(0.9e-3, 0.5, recorded=1e-3)


def test_a_difference_is_measured_per_token() -> None:
    b = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    a = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    found = Difference.between(a, b)
    assert found.relative == pytest.approx((2 / 5) ** 0.5)
    assert (found.largest, found.worst_cosine) == (1.0, 0.0)
    assert found.mean_cosine == pytest.approx(2 / 3)
    a[2, 0] = math.nan
    broken = Difference.between(a, b)
    assert (broken.relative, broken.largest, broken.worst_cosine) == (math.inf, math.inf, -1.0)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    with pytest.raises(ArgumentError, match="shapes"):
        relative_error(torch.zeros(2), torch.zeros(3))
