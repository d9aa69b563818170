"""Test Hugging Face's rows and pixels before normalisation, as an engine passes them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit.errors import ImageError
from qwen_vit.images.patches import Patches, patchify
from tests.support.encoders import forget_above, picture, tiny
from tests.support.oracle import relative_error
from tests.support.towers import random_rows

# Hugging Face's rows

ROWS = torch.zeros(24, 1176)
GRID = torch.tensor([[1, 4, 6]])
BAD_PATCHES = {
    "too few rows": (ROWS[:20], GRID, "patches", ("(20, 1176)", "(24, 1176)")),
    "too many rows": (ROWS, torch.tensor([[1, 4, 4]]), "patches", ("(24, 1176)", "(16, 1176)")),
    "one image too few": (ROWS, torch.tensor([[1, 4, 6]] * 2), "patches", ("(48, 1176)",)),
    "narrow rows": (ROWS[:, :588], GRID, "patches", ("(24, 588)", "(24, 1176)")),
    "flat": (ROWS.flatten(), GRID, "patches", ("(28224,)", "(24, 1176)")),
    "integers": (ROWS.long(), GRID, "patches", ("torch.int64", "floating-point")),
    "bytes": (ROWS.byte(), GRID, "patches", ("torch.uint8", "floating-point")),
    "an array": (ROWS.numpy(), GRID, "patches", ("ndarray", "torch tensor")),
    "odd height": (ROWS[:18], torch.tensor([[1, 3, 6]]), "grid", ("(1, 3, 6)", "multiples of 2")),
    "odd width": (ROWS[:20], torch.tensor([[1, 4, 5]]), "grid", ("(1, 4, 5)", "multiples of 2")),
    "zero": (ROWS[:0], torch.tensor([[1, 0, 6]]), "grid", ("(1, 0, 6)", "at least 1")),
    "zero frames": (ROWS[:0], torch.tensor([[0, 4, 6]]), "grid", ("(0, 4, 6)", "at least 1")),
    "negative twice": (ROWS, torch.tensor([[1, -4, -6]]), "grid", ("(1, -4, -6)", "at least 1")),
    "negative": (ROWS, torch.tensor([[1, -4, 6]]), "patches", ("(24, 1176)", "(-24, 1176)")),
    "float grid": (ROWS, GRID.float(), "grid", ("torch.float32", "integer")),
    "bool grid": (ROWS, GRID.bool(), "grid", ("torch.bool", "integer")),
    "flat grid": (ROWS, GRID[0], "grid", ("(3,)", "(images, 3)")),
    "grid of 2": (ROWS, GRID[:, 1:], "grid", ("(1, 2)", "(images, 3)")),
    "list grid": (ROWS, [[1, 4, 6]], "grid", ("(list)", "(images, 3)")),
    "huge": (ROWS, torch.tensor([[1, 2**40, 2**40]]), "patches", (str(2**80),)),
}


@pytest.mark.parametrize("fault", BAD_PATCHES)
def test_rows_and_grids_that_disagree_are_refused_before_any_kernel(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = forget_above(-1, monkeypatch)
    rows, grid, code, words = BAD_PATCHES[fault]
    with pytest.raises(ImageError) as caught:
        tiny().encode_patches(rows, grid)  # type: ignore[arg-type]
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)
    assert sizes == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_any_floating_dtype_are_accepted(dtype: torch.dtype) -> None:
    rows = random_rows(24, seed=3).to(dtype)
    ours = tiny().encode_patches(rows, GRID.int())
    assert ours.dtype == torch.float32
    assert torch.equal(ours, tiny().encode_patches(rows.float(), GRID))


# Pixels before normalisation


def pixel_rows_of(image: Patches) -> Tensor:
    """Return (N, 1176) uint8 rows of a still image, with two equal frames."""
    pixels = image.pixels.view(len(image.pixels), 3, 1, 196)
    return pixels.expand(-1, -1, 2, -1).flatten(1)


def test_still_rows_have_the_bits_of_encode() -> None:
    images = [patchify(picture(56, 84, seed), tiny().image_config) for seed in range(3)]
    rows = torch.cat([pixel_rows_of(each) for each in images])
    grids = torch.tensor([[1, 4, 6]] * 3)
    ours = tiny().encode_pixels(rows, grids)
    assert torch.equal(ours, torch.cat([each.embeds for each in tiny().encode(images)]))
    before = rows.clone()
    tiny().encode_pixels(rows, grids)
    assert torch.equal(rows, before)


def test_rows_of_a_video_have_the_bits_of_encode_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (48, 1176), dtype=torch.uint8, generator=generator)
    grid = torch.tensor([[2, 4, 6]])
    config = tiny().image_config
    mean, std = (torch.tensor(each)[:, None] for each in (config.image_mean, config.image_std))
    floats = ((rows.view(48, 3, 392).float() / 255 - mean) / std).flatten(1)
    ours = tiny().encode_pixels(rows, grid, still=False)
    assert torch.equal(ours, tiny().encode_patches(floats, grid))
    # differs, because this call reads only the first frames
    still = tiny().encode_pixels(rows, grid)
    assert relative_error(still, ours) > 1e-3


@pytest.mark.parametrize("fault", ["float", "narrow", "few", "array"])
def test_invalid_pixel_rows_are_refused(fault: str) -> None:
    rows = ROWS.byte()
    wrong: Any = {
        "float": ROWS, "narrow": rows[:, :588], "few": rows[:20], "array": rows.numpy(),
    }[fault]  # fmt: skip
    with pytest.raises(ImageError, match="rows is") as caught:
        tiny().encode_pixels(wrong, GRID)
    assert caught.value.code == "patches"
