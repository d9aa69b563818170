"""Test that colours of features are reproducible, comparable, and clear to colour-blind readers."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import VisionEncoder
from qwen_vit.show.colours import PrincipalColours, component_colours, similarity_map
from qwen_vit.show.views import view_features


def features(rows: int, columns: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Return maps whose first components differ in strength, like a tower's maps."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(4.0, 0.1, width) ** 2
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]
    return (torch.randn(rows, columns, width, generator=generator) * strength) @ turn


def test_the_same_features_always_have_the_same_colours() -> None:
    maps = [features(6, 8), features(3, 5, seed=1)]
    torch.manual_seed(1)
    first = PrincipalColours.fit(maps)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = PrincipalColours.fit([each.clone() for each in maps])
    assert np.array_equal(first.paint(maps[0]), again.paint(maps[0]))
    torch.manual_seed(1)
    PrincipalColours.fit(maps)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's state


def test_the_components_are_those_of_an_exact_decomposition() -> None:
    rows = features(40, 30).flatten(0, 1)
    colours = PrincipalColours.fit([rows])
    _, strength, axes = torch.linalg.svd(rows.double() - rows.double().mean(0))
    for found, expected in zip(colours.axes.T.double(), axes[:3], strict=True):
        assert abs(float(found @ expected)) == pytest.approx(1, abs=1e-5)
    shares = strength**2 / (strength**2).sum()
    assert colours.explained == pytest.approx(shares[:3].tolist(), rel=1e-3)


def test_an_axis_points_where_its_largest_weight_is_positive() -> None:
    """A library may return the opposite axis, which would exchange light and dark."""
    axes = PrincipalColours.fit([features(20, 20)]).axes
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_images_are_coloured_together() -> None:
    """With a separate fit, the same features would have another colour in each image."""
    one, other = features(6, 8), features(5, 5, seed=3) * 0.2 + 3.0
    other[2, 2] = one[1, 1]
    together = PrincipalColours.fit([one, other])
    assert np.allclose(together.paint(one)[1, 1], together.paint(other)[2, 2], atol=1e-6)
    alone = PrincipalColours.fit([one]).paint(one)[1, 1]
    assert not np.allclose(alone, PrincipalColours.fit([other]).paint(other)[2, 2], atol=0.05)


@pytest.mark.parametrize(
    "cells",
    [
        torch.ones(4, 6, 8),
        torch.full((4, 6, 8), float("nan")),
        torch.randn(1, 1, 8),
        torch.randn(1, 2, 8),
        torch.randn(4, 6, 1),
        torch.randn(4, 6, 8).bfloat16(),
        torch.cat([torch.zeros(3, 6, 8), torch.full((1, 6, 8), float("inf"))]),
    ],
    ids=["constant", "nan", "one cell", "two cells", "one value", "bfloat16", "infinity"],
)
def test_unusual_features_have_valid_colours(cells: torch.Tensor) -> None:
    painted = PrincipalColours.fit([cells]).paint(cells)
    assert painted.shape == (*cells.shape[:2], 3)
    assert np.isfinite(painted).all()
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_rounding_errors_have_no_colours() -> None:
    """An image of one colour was once drawn as a patchwork of strong colours."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    red = encoder.encode(Image.new("RGB", (140, 112), "red"), output="patch")
    assert float(red.map.std(dim=(0, 1, 2)).max()) > 0  # the rows differ in their last bits
    [view] = view_features([red], point=(5, 5)).views
    assert len(np.unique(view.colours.reshape(-1, 3), axis=0)) == 1
    found = view_features([red], point=(5, 5))
    assert found.explained == (0, 0, 0)
    assert found.span == (0.999, 1)
    assert view.similarity is not None
    assert float(view.similarity.min()) > 1 - 1e-6


def test_a_few_cells_that_differ_have_another_colour() -> None:
    noise = 1 + 1e-7 * torch.randn(20, 20, 48, generator=torch.Generator().manual_seed(0))
    noise[3, 4] += features(1, 1)[0, 0]
    colours = PrincipalColours.fit([noise]).paint(noise)
    others = np.delete(colours.reshape(-1, 3), 3 * 20 + 4, axis=0)
    assert np.abs(others - others[0]).max() < 1e-3
    assert np.abs(colours[3, 4] - others[0]).max() > 0.1


def test_the_first_component_is_lightness() -> None:
    cells = torch.zeros(1, 9, 4)
    cells[0, :, 0] = torch.linspace(0, 1, 9)
    painted = PrincipalColours.fit([cells]).paint(cells)[0]
    brightness = painted @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all()
    assert np.allclose(painted[:, 0], painted[:, 2], atol=0.01)  # all colours are grey
    assert np.allclose(painted, component_colours()[0], atol=0.1)


# The matrices for linear RGB of Machado, Oliveira and Fernandes, 2009, at full severity.
BLINDNESS = {
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def as_seen(srgb: np.ndarray, blindness: str) -> np.ndarray:
    """Convert colours to a colour-blind reader's colours in CIELAB, where distances match
    perception."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(BLINDNESS[blindness]).T, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colour_blind_readers_see_similar_features(blindness: str) -> None:
    """In plain red, green and blue, such readers confuse two of the three components."""
    cells = features(40, 30).flatten(0, 1)
    colours = PrincipalColours.fit([cells])
    along = ((cells - colours.mean) @ colours.axes - colours.low) / (colours.high - colours.low)
    rgb = along.clamp(0, 1).numpy()
    random = np.random.default_rng(0)
    i, j = random.integers(0, len(rgb), (2, 20_000))
    distance = np.linalg.norm(rgb[i] - rgb[j], axis=1)
    found = {}
    for name, shown in (("ours", colours.paint(cells)), ("rgb", rgb)):
        seen = as_seen(shown.astype(float), blindness)
        found[name] = rank_correlation(distance, np.linalg.norm(seen[i] - seen[j], axis=1))
    print(found)
    assert found["ours"] > found["rgb"] + 0.03


def test_similarity_is_the_cosine() -> None:
    cells = features(5, 7)
    found = similarity_map(cells, cells[2, 3])
    expected = cells.double() @ cells[2, 3].double()
    expected /= cells.double().norm(dim=-1) * cells[2, 3].double().norm()
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert tuple(map(int, np.unravel_index(found.argmax(), found.shape))) == (2, 3)
    assert similarity_map(torch.zeros(2, 3, 4), torch.ones(4)).tolist() == [[0.0] * 3] * 2
