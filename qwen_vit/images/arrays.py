"""Convert arrays and tensors to RGB uint8, after finding the channel axis."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.image import ArrayLayout, ImageLimits, RgbImage, check_pixels
from qwen_vit.images.to_rgb import on_white

__all__ = ["from_array", "tensor_to_array"]


def tensor_to_array(tensor: torch.Tensor, name: str) -> NDArray[Any]:
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16
            tensor = tensor.float()
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError):
        raise ImageError(
            f"a {tensor.dtype} tensor ({tensor.layout}, device {tensor.device}) that NumPy cannot "
            "represent",
            name=name,
            expected="a dense uint8 or floating-point tensor",
            remedy="convert it",
            code="array-dtype",
        ) from None


def from_array(
    array: NDArray[Any], kind: str, name: str, layout: ArrayLayout, limits: ImageLimits
) -> RgbImage:
    """Convert an array of one image to RGB. `kind` is the `format` of the result."""
    array = _channels_last(array, name, layout)
    height, width, channels = array.shape
    check_pixels(width, height, name, limits)
    notes: list[str] = []
    if array.dtype != np.uint8:
        array = _float_to_uint8(array, name)
        notes.append("[0, 1] scaled to 0..255")
    if channels == 1:
        array = array.repeat(3, axis=2)
        notes.append("grey to RGB")
    elif channels == 4:
        notes.append("alpha composited on white")
        return RgbImage(on_white(_picture("RGBA", array)), kind, name, tuple(notes))
    return RgbImage(_picture("RGB", array), kind, name, tuple(notes))


def _channels_last(array: NDArray[Any], name: str, layout: ArrayLayout) -> NDArray[Any]:
    shape = array.shape
    if array.dtype.kind in "OSU":
        kind = "Python objects" if array.dtype.kind == "O" else "text"
        raise ImageError(
            f"an array of {kind}, not of pixels",
            name=name,
            expected="an array of numbers",
            remedy="for a list of images, pass array.tolist()",
            code="array-dtype",
        )
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        remedy = "give its images one by one, as a list" if array.ndim > 3 else "give (H, W, 3)"
        raise ImageError(
            f"its shape is {shape}",
            name=name,
            expected="2 or 3 axes",
            remedy=remedy,
            code="array-shape",
        )
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if layout == "auto" and first and last:
        raise ImageError(
            f"its shape {shape} has an ambiguous channel axis, the first or the last",
            name=name,
            remedy='pass layout="HWC" or layout="CHW"',
            code="array-layout",
        )
    chosen = layout if layout != "auto" else "CHW" if first else "HWC"
    if not (first if chosen == "CHW" else last):
        axis = {"auto": "last or first", "CHW": "first", "HWC": "last"}[layout]
        raise ImageError(
            f"its shape is {shape}",
            name=name,
            expected=f"1, 3 or 4 channels on the {axis} axis",
            remedy="select or convert the channels",
            code="array-channels",
        )
    return array if chosen == "HWC" else np.moveaxis(array, 0, 2)


def _float_to_uint8(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if not np.issubdtype(array.dtype, np.floating):
        remedy = {
            "b": "multiply by 255 and cast to uint8",
            "u": "scale to 0..255 and cast to uint8",
        }
        raise ImageError(
            f"its dtype is {array.dtype}",
            name=name,
            expected="uint8 in 0..255 or floating point in [0, 1]",
            remedy=remedy.get(array.dtype.kind, "cast to uint8 if its values are 0..255"),
            code="array-dtype",
        )
    finite = np.isfinite(array)
    if not finite.all():
        nan = int(np.isnan(array).sum())
        infinite = int(array.size - finite.sum()) - nan
        raise ImageError(
            f"contains {nan} NaN and {infinite} infinite values, of {array.size}",
            name=name,
            remedy="replace these values, for example with numpy.nan_to_num",
            code="array-not-finite",
        )
    outside = int(((array < 0) | (array > 1)).sum())
    if outside:
        raise ImageError(
            f"{outside} of {array.size} values are outside [0, 1] (smallest "
            f"{float(array.min()):g}, largest {float(array.max()):g})",
            name=name,
            remedy="clip the values, or cast 0..255 to uint8",
            code="array-range",
        )
    # in float64, k / 255 converts back to k from every floating-point type
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _picture(mode: str, array: NDArray[np.uint8]) -> Image.Image:
    """Return a PIL image of a copy, because `Image.fromarray` shares the memory of some arrays."""
    height, width, _ = array.shape
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(array).tobytes())
