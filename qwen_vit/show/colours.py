"""Convert dense features to colours by up to three principal components, or to similarities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["COMPONENTS", "PrincipalColours", "component_colours", "similarity_map"]

MAX_FIT_ROWS = 16_384  # rows of 3,584 values: 235 MB in float32
EXTRA_AXES = 13  # extra components: the axes then match an exact decomposition to 1e-6
NOISE = 1e-5  # relative difference: above rounding errors, and below one grey level's effect
TAILS = (0.01, 0.99)  # otherwise a few outliers would use the whole range of colours
COMPONENTS = ("lightness", "blue to yellow", "green to red")  # what each component sets
# OKLab: lightness, green to red, blue to yellow. Within these ranges few colours are clipped.
LIGHTNESS, GREEN_RED, BLUE_YELLOW = (0.35, 0.90), (-0.12, 0.12), (-0.18, 0.18)


@dataclass(frozen=True, slots=True, eq=False)
class PrincipalColours:
    """Hold up to three principal components of features, and convert cells to colours with them.

    >>> maps = [torch.randn(4, 6, 192), torch.randn(2, 3, 192)]
    >>> colours = PrincipalColours.fit(maps)
    >>> colours.paint(maps[1]).shape
    (2, 3, 3)

    The first component sets the lightness, the second blue to yellow, and the third green to red.
    With the usual red, green and blue, colour-blind readers would distinguish fewer colours. Most
    of these readers confuse red and green. The third component has these colours, because it has
    the least variance. A component that varies no more than rounding errors has one colour.

    Attributes:
        explained: the share of the variance that each component explains.

    Source: Björn Ottosson, "A perceptual color space for image processing" (OKLab), 2020.
    """

    mean: Tensor  # (D,)
    axes: Tensor  # (D, 3 or fewer)
    low: Tensor  # value of each component at the lower end of the colour range
    high: Tensor
    explained: tuple[float, ...]

    @classmethod
    def fit(cls, maps: Sequence[Tensor]) -> Self:
        """Fit the components to maps (..., D) together, so that colours are comparable across maps.

        The same features give the same colours, because the algorithm's random numbers have a fixed
        seed. Each axis's weight of largest magnitude is positive, as in scikit-learn.
        """
        rows = _rows(maps)
        mean = rows.mean(0)
        centred = rows - mean
        rank = min(3 + EXTRA_AXES, *rows.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, strength, axes = torch.pca_lowrank(centred, q=rank, center=False, niter=4)
        axes = axes[:, :3]
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        axes = axes * torch.where(largest < 0, -1.0, 1.0)
        along = centred @ axes
        least = NOISE * rows.square().sum(1).mean().sqrt()
        low, high = along.quantile(torch.tensor(TAILS), dim=0)
        is_rare = high - low <= least  # only a few cells differ, or none
        low = torch.where(is_rare, along.amin(0), low)
        high = torch.where(is_rare, along.amax(0), high)
        is_noise = high - low <= least
        total = float(centred.square().sum())
        shares = [
            0.0 if noise or not total else float(s) ** 2 / total
            for s, noise in zip(strength[:3], is_noise.tolist(), strict=True)
        ]
        return cls(mean, axes, low, torch.where(is_noise, low, high), tuple(shares))

    def paint(self, features: Tensor) -> NDArray[np.float32]:
        """Return the colour of every cell of a map (..., D), in sRGB from 0 to 1."""
        along = (_float(features) - self.mean) @ self.axes
        span = self.high - self.low
        along = torch.where(span > 0, (along - self.low) / span, 0.5)
        along = torch.nn.functional.pad(along, (0, 3 - along.shape[-1]), value=0.5)
        return _colours(along.clamp(0, 1).numpy())


def component_colours(count: int = 9) -> list[NDArray[np.float32]]:
    """Return each component's colours from the low end to the high end: (count, 3) sRGB.

    >>> [ramp.shape for ramp in component_colours(5)]
    [(5, 3), (5, 3), (5, 3)]
    """
    ramps = np.full((3, count, 3), 0.5, np.float32)
    for component in range(3):
        ramps[component, :, component] = np.linspace(0, 1, count)
    return list(_colours(ramps))


def similarity_map(features: Tensor, cell: Tensor) -> NDArray[np.float32]:
    """Return the cosine similarity of every cell of a map (..., D) to one cell's features (D,).

    >>> similarity_map(torch.eye(2), torch.tensor([2.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    cosine = torch.nn.functional.cosine_similarity(_float(features), _float(cell), dim=-1)
    values: NDArray[np.float32] = cosine.numpy()
    return values


def _float(features: Tensor) -> Tensor:
    return features.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """Return all cells' features, or an evenly spaced sample from which to fit the components."""
    counts = [each.numel() // each.shape[-1] for each in maps]
    step = -(-sum(counts) // MAX_FIT_ROWS)
    return torch.cat([_float(each.reshape(-1, each.shape[-1])[::step]) for each in maps])


def _colours(components: NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert components (..., 3) from 0 to 1 to sRGB, clipped to the sRGB range.

    OKLab and sRGB define the matrices and the curve.
    """
    low, high = np.array((LIGHTNESS, BLUE_YELLOW, GREEN_RED)).T
    lightness, blue_yellow, green_red = np.moveaxis(low + (high - low) * components, -1, 0)
    lab = np.stack([lightness, green_red, blue_yellow], axis=-1)
    to_cones = np.array(
        [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728],
         [1.0, -0.0894841775, -1.2914855480]]
    )  # fmt: skip
    to_linear = np.array(
        [[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
         [-0.0041960863, -0.7034186147, 1.7076147010]]
    )  # fmt: skip
    linear = np.clip((lab @ to_cones.T) ** 3 @ to_linear.T, 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours: NDArray[np.float32] = curved.astype(np.float32)
    return colours
