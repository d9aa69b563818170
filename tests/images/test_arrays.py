"""Test arrays and tensors as images: channel axes, types, values, memory order."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.errors import ArgumentError
from qwen_vit.images.load import load_image
from tests.support.images import noise, on_white, refusal

# Arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("first", [False, True])
def test_a_channel_axis_is_found_in_any_position(
    shape: tuple[int, ...], kind: str, first: bool
) -> None:
    array = noise(5, 7, 4, seed=3)
    array = array[..., 0] if len(shape) == 2 else array[..., : shape[2]]
    given_array = np.moveaxis(array, 2, 0) if first and array.ndim == 3 else array
    source: Any = torch.from_numpy(given_array.copy()) if kind == "torch" else given_array
    image = load_image(source)
    rgb = array[..., None].repeat(3, 2) if array.ndim == 2 else array
    rgb = rgb.repeat(3, 2) if rgb.shape[2] == 1 else rgb
    expected = on_white(rgb) if rgb.shape[2] == 4 else rgb
    assert np.abs(image.pixels - expected).max() <= (1 if rgb.shape[2] == 4 else 0)
    assert image.format == ("tensor" if kind == "torch" else "array")


@pytest.mark.parametrize("shape", [(3, 5, 3), (1, 5, 3), (4, 5, 1), (3, 3, 3)])
def test_an_ambiguous_channel_order_asks_for_layout(shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    message = refusal("array-layout", array, name="frame 7")
    assert message.startswith(f"frame 7: its shape {shape} has an ambiguous channel axis")
    assert 'layout="HWC"' in message
    hwc, chw = load_image(array, layout="HWC").pixels, load_image(array, layout="CHW").pixels
    assert hwc.shape[:2] == shape[:2]
    assert chw.shape[:2] == shape[1:]
    if shape == (3, 3, 3):
        assert np.array_equal(hwc, array)
        assert np.array_equal(chw, array.transpose(1, 2, 0))


def test_a_wrong_layout_argument_is_refused() -> None:
    assert "last axis" in refusal("array-channels", noise(3, 20, 30), layout="HWC")
    assert "first axis" in refusal("array-channels", noise(20, 30, 3), layout="CHW")
    with pytest.raises(ArgumentError, match=r'layout is \'BGR\'\. Expected "auto", "HWC" or "CHW"'):
        load_image(noise(4, 5), layout="BGR")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(20, 30, 2), (2, 20, 30), (20, 30, 5)])
def test_other_channel_counts_are_refused(shape: tuple[int, ...]) -> None:
    message = refusal("array-channels", np.zeros(shape, np.uint8))
    assert f"{shape}. Expected 1, 3 or 4 channels on the last or first axis." in message
    assert "Select or convert" in message


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((2, 8, 8, 3), "one by one, as a list"), ((8,), "(H, W, 3)"), ((), "(H, W, 3)")],
)
def test_a_batch_or_a_vector_is_refused(shape: tuple[int, ...], remedy: str) -> None:
    message = refusal("array-shape", np.zeros(shape, np.uint8))
    assert f"shape is {shape}. Expected 2 or 3 axes" in message
    assert remedy in message


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 0, 3), (3, 0, 8), (0, 0), (0, 5)])
def test_an_array_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    assert "Expected sides above 0" in refusal("zero-side", np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (np.uint16, "Scale to 0..255"),
        (bool, "Multiply by 255"),
        (np.int64, "Cast to uint8"),
        (np.int8, "Cast to uint8"),
        (np.complex64, "Cast to uint8"),
    ],
)
def test_other_dtypes_are_refused_by_name(dtype: Any, remedy: str) -> None:
    message = refusal("array-dtype", np.zeros((8, 8, 3), dtype), name="frame 7")
    assert message.startswith("frame 7: ")
    assert f"dtype is {np.dtype(dtype)}" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.array(["a.png", "b.png"]), "text"),
        (np.array(["a.png"], object), "Python objects"),
        (np.zeros((8, 8, 3), object), "Python objects"),
    ],
)
def test_an_array_of_paths_is_no_image(array: Any, kind: str) -> None:
    """The error once asked for other axes. A column of pandas gives such an array."""
    message = refusal("array-dtype", array, name="image 0")
    assert message.startswith(f"image 0: an array of {kind}, not of pixels.")
    assert "pass array.tolist()" in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint16, torch.complex64])
def test_other_tensor_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    message = refusal("array-dtype", torch.zeros(8, 8, 3, dtype=dtype))
    assert str(dtype).removeprefix("torch.") in message


def test_a_tensor_without_plain_values_is_refused() -> None:
    assert "device meta" in refusal("array-dtype", torch.zeros(8, 8, 3, device="meta"))
    assert "sparse" in refusal("array-dtype", torch.zeros(8, 8).to_sparse())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_tensors_with_gradients_are_scaled(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 0.5], [0.25, 1.0]], dtype=dtype, requires_grad=True)
    assert load_image(tensor).pixels[..., 0].tolist() == [[0, 128], [64, 255]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_level_survives_division_by_255(dtype: Any) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = load_image((levels / 255).astype(dtype)).pixels
    assert np.array_equal(pixels[..., 0], levels)


def test_halves_round_to_even() -> None:
    values = np.array([[0.5, 1.5, 2.5]]) / 255
    assert load_image(values).pixels[0, :, 0].tolist() == [0, 2, 2]


def test_nan_and_infinity_are_counted() -> None:
    array = np.zeros((8, 8, 3), np.float32)
    array[0, 0], array[1, 0, 0] = np.nan, np.inf
    message = refusal("array-not-finite", array)
    assert "3 NaN and 1 infinite values, of 192" in message
    assert "nan_to_num" in message


def test_values_out_of_range_are_counted_with_their_extremes() -> None:
    array = np.full((8, 8, 3), 0.5)
    array[0, 0], array[1, 0, 0] = 1.25, -2
    message = refusal("array-range", array)
    assert "4 of 192 values are outside [0, 1] (smallest -2, largest 1.25)" in message
    assert "uint8" in message


@pytest.mark.parametrize("view", ["negative", "step", "transposed", "read-only", "fortran"])
def test_any_memory_order_works(view: str) -> None:
    array = noise(12, 10)
    views: dict[str, Callable[[Any], Any]] = {
        "negative": lambda a: a[::-1, ::-1],
        "step": lambda a: a[::2, ::3],
        "transposed": lambda a: a.transpose(1, 0, 2),
        "read-only": lambda a: a,
        "fortran": np.asfortranarray,
    }
    array.flags.writeable = view != "read-only"
    source = views[view](array)
    assert np.array_equal(load_image(source).pixels, source)


# Subclasses and views


def test_a_subclass_of_an_array_is_accepted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        grey = np.matrix(noise(4, 5, 1)[:, :, 0])
    assert np.array_equal(load_image(grey).pixels, load_image(np.asarray(grey)).pixels)


def test_a_negated_view_of_a_tensor_has_its_values() -> None:
    values = torch.complex(torch.zeros(4, 5), torch.linspace(-1, 0, 20).view(4, 5)).conj().imag
    assert values.is_neg()
    assert np.array_equal(load_image(values).pixels, load_image(values.resolve_neg()).pixels)
