"""Compare patches with transformers' Qwen2VLImageProcessorPil, and test smart_resize's errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from qwen_vit.config import Grid, ImageConfig
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import Patches, patchify, resize_image, smart_resize
from qwen_vit.images.rows import normalise
from tests.support import IMAGES
from tests.support.images import noise

PHOTOGRAPHS = sorted(path for path in IMAGES.iterdir() if path.suffix in (".png", ".jpg"))
LIMITS = [(3136, 12845056), (3136, 1003520), (784, 784), (3136, 50176), (400_000, 500_000)]
PUBLISHED: dict[str, Any] = {"factor": 28, "min_pixels": 3136, "max_pixels": 1003520}


def image_config(min_pixels: int = 3136, max_pixels: int = 1003520) -> ImageConfig:
    return ImageConfig(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        patch_px=14,
        temporal_patch_size=2,
        merge_size=2,
    )


def assert_equals_processor(rgb: np.ndarray, config: ImageConfig) -> None:
    processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    expected = processor(images=[Image.fromarray(rgb)], return_tensors="pt")
    patches = patchify(rgb, config)
    rows = patches.to_rows(config)
    assert [[g.t, g.h, g.w] for g in patches.grids] == expected["image_grid_thw"].tolist()
    assert rows.dtype == torch.float32
    assert rows.shape == expected["pixel_values"].shape
    difference = (rows - expected["pixel_values"]).abs().max().item()
    assert difference <= 1e-6, f"largest difference {difference:.3g}"


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_a_photograph_has_the_processors_rows_and_grid(path: Path, limits: tuple[int, int]) -> None:
    assert_equals_processor(load_image(path).pixels, image_config(*limits))


def test_there_are_photographs() -> None:
    assert len(PHOTOGRAPHS) >= 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(LIMITS), st.integers(0, 99))
def test_any_size_has_the_processors_rows_and_grid(
    height: int, width: int, limits: tuple[int, int], seed: int
) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    assert_equals_processor(noise(height, width, seed=seed), image_config(*limits))


@pytest.mark.parametrize(("height", "width"), [(56, 84), (28, 28), (28, 280), (280, 28)])
def test_a_size_that_fits_is_not_resampled(height: int, width: int) -> None:
    config = image_config(min_pixels=784)
    rgb = noise(height, width)
    assert resize_image(rgb, config) is rgb
    assert_equals_processor(rgb, config)


def test_every_grey_level_is_normalised_as_in_the_processor_to_the_bit() -> None:
    """256 levels x 3 channels are all possible values, so the test proves equality."""
    levels = (np.arange(28 * 28) % 256).astype(np.uint8).reshape(28, 28)
    rgb = np.stack([levels, levels + np.uint8(85), levels + np.uint8(170)], axis=2)
    assert all(len(np.unique(rgb[..., channel])) == 256 for channel in range(3))
    config = image_config(min_pixels=784)
    expected = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=config.max_pixels)(
        images=[Image.fromarray(rgb)], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(patchify(rgb, config).to_rows(config), expected)


@pytest.mark.gpu
def test_every_grey_level_is_normalised_on_a_gpu_as_on_a_cpu_to_the_bit() -> None:
    """A division by a Python number gives other bits on a GPU, and float16 operands show the
    difference."""
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(256, 3, 2)
    config = image_config()
    assert torch.equal(normalise(levels.cuda(), config).cpu(), normalise(levels, config))


def test_rows_hold_merge_unit_channel_frame_row_column_in_that_order() -> None:
    """Compute the order by hand, without einops and without transformers."""
    config = image_config(min_pixels=784)
    rgb = noise(56, 84)
    patches = patchify(rgb, config)
    assert patches.grids == (Grid(1, 4, 6),)
    index = 0
    for unit_row in range(2):
        for unit_column in range(3):
            for row in range(2):
                for column in range(2):
                    y, x = 14 * (2 * unit_row + row), 14 * (2 * unit_column + column)
                    expected = rgb[y : y + 14, x : x + 14].transpose(2, 0, 1).reshape(-1)
                    assert patches.pixels[index].tolist() == expected.tolist()
                    index += 1
    rows = patches.to_rows(config).reshape(-1, 3, 2, 196)
    assert torch.equal(rows[:, :, 0], rows[:, :, 1])


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from([1, 14, 28, 32, 56]),
    st.integers(1, 2_000_000),
    st.integers(0, 15_000_000),
)
def test_smart_resize_is_transformers(
    height: int, width: int, factor: int, min_pixels: int, extra: int
) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    limits: dict[str, Any] = {"factor": factor, "min_pixels": min_pixels}
    limits["max_pixels"] = max(min_pixels + extra, factor**2)
    ours = smart_resize(height, width, **limits)
    assert ours == reference.smart_resize(height, width, **limits)
    assert min(ours) >= factor


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 200, (112, 196)),
        (42, 70, (56, 56)),  # 1.5 and 2.5 both round to 2
        (1, 1, (56, 56)),
        (1, 200, (28, 812)),
        (3000, 4000, (840, 1148)),
    ],
)
def test_known_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    assert smart_resize(height, width, **PUBLISHED) == expected


def test_a_thin_image_never_gets_a_side_of_zero() -> None:
    limits: dict[str, Any] = {"factor": 28, "min_pixels": 784, "max_pixels": 3136}
    assert smart_resize(28, 5600, **limits) == (28, 784)


def test_a_ratio_above_200_is_refused_with_figures_and_remedy() -> None:
    with pytest.raises(
        ImageError, match=r"wide\.png: 2010x10 .*ratio of 201\. Expected at most 200\. Crop or pad"
    ):
        patchify(noise(10, 2010), image_config(), name="wide.png")
    with pytest.raises(ImageError) as caught:
        smart_resize(4000, 12, **PUBLISHED)
    assert caught.value.code == "ratio"
    assert str(caught.value).startswith("the image: 12x4000 ")
    assert smart_resize(10, 2000, **PUBLISHED) == (28, 812)  # a ratio of 200 is allowed


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (0, 0), (-1, 5)])
def test_a_side_below_1_is_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match=f"{width}x{height}.*at least 1") as caught:
        smart_resize(height, width, **PUBLISHED)
    assert caught.value.code == "zero-side"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_pixels": 783, "min_pixels": 1}, "783, too small .* 28x28 .*at least 784"),
        ({"max_pixels": 0, "min_pixels": 1}, "max_pixels is 0.*at least 784"),
        ({"min_pixels": 1003521}, "min_pixels 1003521 exceeds max_pixels 1003520. Lower"),
        ({"min_pixels": 0}, "min_pixels 0. Expected whole numbers above 0"),
        ({"factor": 0}, "factor is 0"),
    ],
)
def test_limits_that_no_size_meets_are_an_argument_error(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        smart_resize(100, 100, **(PUBLISHED | changes))


@pytest.mark.parametrize(
    "rgb",
    [np.zeros((56, 56), np.uint8), np.zeros((56, 56, 4), np.uint8), np.zeros((56, 56, 3))],
    ids=["grey", "rgba", "float64"],
)
def test_anything_but_rgb_uint8_is_refused(rgb: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"x.png: .*Expected uint8 .*load_image") as caught:
        patchify(rgb, image_config(), name="x.png")
    assert caught.value.code == "patches"


def test_patches_keep_the_name_of_their_image() -> None:
    config, rgb = image_config(), noise(56, 56)
    named, unnamed = patchify(rgb, config, name="a\tb.png"), patchify(rgb, config)
    assert (named.name, unnamed.name, Patches.cat([named]).name) == ("a\tb.png", None, None)
    with pytest.raises(ImageError) as caught:
        patchify(noise(10, 2010), config, name="a\tb.png")
    assert caught.value.name == "a\tb.png"
    assert str(caught.value).startswith(r"'a\tb.png': 2010x10 ")


def test_patches_own_their_pixels() -> None:
    rgb = noise(56, 56)
    patches = patchify(rgb, image_config())
    before = patches.pixels.clone()
    rgb[:] = 0
    assert torch.equal(patches.pixels, before)


def test_a_read_only_image_is_cut_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    rgb = noise(56, 56)
    rgb.flags.writeable = False
    patchify(rgb, image_config())
    assert not recwarn.list


def test_joined_patches_keep_images_in_order() -> None:
    config = image_config()
    parts = [patchify(noise(h, w, seed=h), config) for h, w in [(56, 84), (112, 56), (56, 56)]]
    joined = Patches.cat(iter(parts))
    assert joined.grids == (Grid(1, 4, 6), Grid(1, 8, 4), Grid(1, 4, 4))
    assert torch.equal(joined.pixels[24:56], parts[1].pixels)
    assert torch.equal(joined.to_rows(config), torch.cat([part.to_rows(config) for part in parts]))


def test_patches_are_joined_in_pinned_memory_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any strides work. This machine may be unable to pin memory."""
    parts = [
        patchify(noise(h, w, seed=h), image_config()) for h, w in [(56, 84), (112, 56), (56, 56)]
    ]
    parts[1] = Patches(parts[1].pixels.T.contiguous().T, parts[1].grids)
    empty, asked = torch.empty, []

    def pageable(size: Any, **options: Any) -> torch.Tensor:
        asked.append((size, options.pop("pin_memory")))
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", pageable)
    joined = Patches.cat(parts, pinned_rows=100)
    assert asked == [((100, 588), True)]
    assert torch.equal(joined.pixels, torch.cat([part.pixels for part in parts]))


def test_no_patches_are_an_empty_set_of_the_right_shape() -> None:
    empty = Patches.cat([])
    assert empty.pixels.shape == (0, 588)
    assert empty.grids == ()
    assert empty.to_rows(image_config()).shape == (0, 1176)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(15, 588, dtype=torch.uint8), "15 patches, and the grids have 16"),
        (torch.zeros(16, 588), "torch.float32"),
        (torch.zeros(16 * 588, dtype=torch.uint8), r"\(9408,\)"),
    ],
)
def test_pixels_and_grids_that_disagree_are_refused(pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        Patches(pixels, (Grid(1, 4, 4),))
    assert caught.value.code == "patches"


def test_patches_of_another_size_are_refused() -> None:
    small = Patches(torch.zeros(4, 192, dtype=torch.uint8), (Grid(1, 2, 2),))
    with pytest.raises(ImageError, match=r"\[192, 588\] values"):
        Patches.cat([patchify(noise(56, 56), image_config()), small])
    with pytest.raises(ImageError, match="have 192 values, but the configuration has 588"):
        small.to_rows(image_config())


def test_running_out_of_memory_while_resizing_is_an_image_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.Image.Image.resize", fail)
    with pytest.raises(ImageError, match=r"cat.png: does not fit into memory") as caught:
        patchify(np.zeros((50, 60, 3), np.uint8), image_config(), name="cat.png")
    assert caught.value.code == "memory"


def test_patches_of_two_devices_are_joined_where_the_first_are() -> None:
    on_host = patchify(np.zeros((56, 84, 3), np.uint8), image_config())
    on_meta = Patches(on_host.pixels.to("meta"), on_host.grids)
    assert Patches.cat([on_meta, on_host]).pixels.device.type == "meta"
    assert len(Patches.cat([on_meta, on_host], pinned_rows=64).pixels) == 48
