"""Measure how much two results differ, and compare the difference with a tolerance.

A stage's tolerance depends on the error of Hugging Face's own result against a float64 oracle. The
command prints the tolerance beside the measured value.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qwen_vit.errors import ArgumentError

__all__ = [
    "Difference",
    "Verdict",
    "fp32_budget",
    "judge",
    "max_ratio",
    "ratio",
    "relative_error",
]

RELATIVE_TOLERANCE = 1e-5  # about 100 float32 roundings; two correct towers differ by about 1e-6
MAX_FP32_ERROR = 1e-4  # twice the measured error of 32 blocks of peaked attention
MAX_BF16_RATIO = 1.01
MAX_FP8_RATIO = 1.5  # of an MLP in 8-bit floats, against Hugging Face's bfloat16
MAX_GOLDEN_DRIFT = 1.01  # the same tensors and the same oracle differ only by rounding


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||, Frobenius, in float64. NaN gives infinity.

    >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
    0.2
    """
    if a.shape != b.shape:
        raise ArgumentError(
            f"the results have shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected="equal shapes",
            remedy="compare results of one input",
        )
    b = b.double()
    distance, norm = float((a.to(b) - b).norm()), float(b.norm())
    if distance == 0:
        return 0.0
    error = distance / norm if norm else float("inf")
    return error if error == error else float("inf")


@dataclass(frozen=True, slots=True)
class Difference:
    """Hold the difference of two results, (rows, values), with one cosine similarity per row."""

    relative: float
    largest: float  # absolute error
    worst_cosine: float
    mean_cosine: float

    @classmethod
    def between(cls, a: Tensor, b: Tensor) -> Self:
        """Measure `a` against `b`, in float64.

        >>> Difference.between(torch.eye(2), torch.eye(2))
        Difference(relative=0.0, largest=0.0, worst_cosine=1.0, mean_cosine=1.0)
        """
        relative = relative_error(a, b)
        a, b = a.double(), b.to(a.device).double()
        norms = a.norm(dim=1) * b.norm(dim=1)
        # a row of zeros has no direction: it agrees only with another row of zeros
        is_zero = norms == 0
        cosines = torch.where(
            is_zero, (a == b).all(1).double(), (a * b).sum(1) / norms.masked_fill(is_zero, 1)
        )
        cosines = cosines.nan_to_num(-1.0).clamp(-1, 1)
        largest = float((a - b).abs().amax()) if a.numel() else 0.0
        return cls(
            relative,
            largest if largest == largest else float("inf"),
            float(cosines.min()) if len(cosines) else 1.0,
            float(cosines.mean()) if len(cosines) else 1.0,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold the measured and the allowed value of a stage. `problem` is empty if the stage
    passed."""

    measured: float
    allowed: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem

    @property
    def excess(self) -> float:
        return self.measured / self.allowed


def fp32_budget(reference_error: float) -> float:
    """Return the allowed float32 error: the larger of 1e-5 and twice Hugging Face's error.

    >>> fp32_budget(1e-6), fp32_budget(2e-5)
    (1e-05, 4e-05)
    """
    return max(RELATIVE_TOLERANCE, 2 * reference_error)


def max_ratio(quantization: str | None) -> float:
    """Return the tolerance for the ratio of our error to Hugging Face's error in bfloat16."""
    return MAX_BF16_RATIO if quantization is None else MAX_FP8_RATIO


def judge(
    dtype: torch.dtype,
    *,
    distance: float,
    ours: float,
    theirs: float,
    recorded: float | None = None,
    quantization: str | None = None,
) -> Verdict:
    """Compare one stage's errors with the tolerances.

    >>> judge(torch.float32, distance=2e-6, ours=1e-6, theirs=1e-6).passed
    True
    >>> judge(torch.bfloat16, distance=3e-3, ours=2.2e-3, theirs=2.0e-3).problem
    'ours is 1.1 times as far from float64 as Hugging Face, allowed 1.01'

    `distance` is our relative error against Hugging Face's result. `ours` and `theirs` are the two
    errors against the float64 oracle. `recorded` is Hugging Face's error as a golden file records
    it. In float32 the tolerance bounds `distance`. In bfloat16 the tolerance bounds the ratio of
    `ours` to `recorded`, or to `theirs` without a golden file. The bound is 1.01, or 1.5 with
    `quantization`. A stage also fails if Hugging Face's error is above 1e-4 in float32 or above 1
    in bfloat16: a result of zeros has the error 1. With a golden file, a stage also fails if
    `theirs` exceeds 1.01 times `recorded`.
    """
    is_fp32 = dtype == torch.float32
    own_error = theirs if recorded is None else recorded
    if is_fp32:
        measured, allowed = distance, fp32_budget(own_error)
        problem = f"{measured:.2g} from Hugging Face, allowed {allowed:.2g}"
    else:
        allowed = max_ratio(quantization)
        measured = ratio(ours, own_error)
        problem = (
            f"ours is {measured:.3g} times as far from float64 as Hugging Face, allowed {allowed:g}"
        )
    if measured <= allowed:
        problem = ""
    limit = MAX_FP32_ERROR if is_fp32 else 1.0
    if recorded is not None and not theirs <= MAX_GOLDEN_DRIFT * recorded:
        problem = (
            f"the golden is {theirs:.2g} from the float64 oracle of these weights, but was "
            f"{recorded:.2g} from the oracle of its own weights: the weights differ"
        )
    elif not own_error <= limit:
        problem = (
            f"Hugging Face is {own_error:.2g} from the float64 oracle of these weights, expected "
            f"at most {limit:g}: not the same model, or not the same input"
        )
    return Verdict(measured, allowed, problem)


def ratio(ours: float, theirs: float) -> float:
    """Return our error divided by Hugging Face's error. Below 1, our result is closer to float64.

    >>> ratio(1.0, 2.0), ratio(0.0, 0.0), ratio(1.0, 0.0)
    (0.5, 1.0, inf)
    """
    if theirs:
        return ours / theirs
    return 1.0 if ours == 0 else float("inf")
