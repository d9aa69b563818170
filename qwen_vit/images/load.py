"""Load an image from any supported source as RGB uint8.

The format depends only on the content. An encoded animation gives its first frame. By default, the
loader applies EXIF orientation. It composites transparency on white, keeps the high byte of 16-bit
samples, and converts other colour modes to RGB. It ignores embedded ICC profiles, as the reference
processor does.
"""

import io
import os
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from qwen_vit.common.arguments import check_choice, short_repr
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.images.arrays import from_array, tensor_to_array
from qwen_vit.images.decode import decode_bytes, decode_pil
from qwen_vit.images.image import (
    ArrayLayout,
    ExifPolicy,
    ImageLimits,
    ImagePage,
    ImageSource,
    RgbImage,
    check_file_bytes,
)
from qwen_vit.images.pages import page_id
from qwen_vit.images.regular_file import open_regular, unreadable

__all__ = ["load_image", "read_image_file", "unwrap"]

# Types that users pass by mistake, and the next step.
NOT_ONE_IMAGE: dict[type | tuple[type, ...], str] = {
    (list, tuple): "give its items one by one",
    io.IOBase: "give its path, or the bytes that its read() returns",
    np.ma.MaskedArray: "replace its masked values with filled()",
}


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    layout: ArrayLayout = "auto",
    limits: ImageLimits | None = None,
    exif: ExifPolicy = "apply",
    is_lent: bool = False,
) -> RgbImage:
    """Turn a path, encoded bytes, a PIL image, an array, a tensor or a row into RGB pixels.

    >>> image = load_image(np.zeros((20, 30), np.uint8))
    >>> image.pixels.shape, image.notes
    ((20, 30, 3), ('grey to RGB',))

    Arrays and tensors are uint8, or floating point in [0, 1]. The function multiplies floating
    point by 255 and rounds half to even. The shape of an array is (H, W), or has a channel axis of
    1, 3 or 4. `layout` states whether the channel axis is the last ("HWC") or the first ("CHW").
    "auto" raises an error if the axis is ambiguous. A PIL image gives its current frame. The loader
    may trigger Pillow's lazy loading, but does not change the image otherwise. Pass exif="ignore"
    for images that are already upright, because Pillow's `transpose` keeps the tag. With `is_lent`,
    the result may share the pixels of a PIL image, so do not change the image afterwards. Many
    threads may call the function at the same time.
    """
    limits = ImageLimits() if limits is None else limits
    if layout not in ("auto", "HWC", "CHW"):
        raise ArgumentError(f"layout is {short_repr(layout)}", expected='"auto", "HWC" or "CHW"')
    check_choice("exif", exif, get_args(ExifPolicy))
    if isinstance(source, Mapping):
        source = unwrap(source, name or "image")
    if isinstance(source, ImagePage):
        name = page_id("image bytes", source.page) if name is None else name
        check_file_bytes(len(source.data), name, limits)
        return decode_bytes(source.data, name, limits, exif, source.page)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        name = path if name is None else name
        return decode_bytes(read_image_file(path, name, limits), name, limits, exif)
    if isinstance(source, bytes | bytearray | memoryview):
        name = "image bytes" if name is None else name
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        check_file_bytes(size, name, limits)
        return decode_bytes(bytes(source), name, limits, exif)
    if isinstance(source, Image.Image):
        if name is None:
            name = os.fsdecode(getattr(source, "filename", "") or "PIL image")
        return decode_pil(source, name, limits, exif, is_lent=is_lent)
    if isinstance(source, torch.Tensor):
        name = "tensor" if name is None else name
        return from_array(tensor_to_array(source, name), "tensor", name, layout, limits)
    if isinstance(source, np.ndarray) and not isinstance(source, np.ma.MaskedArray):
        name = "array" if name is None else name
        return from_array(np.asarray(source), "array", name, layout, limits)
    raise ImageError(
        f"of type {type(source).__name__}, not one image",
        name=name or "image",
        expected="a path, encoded bytes, a PIL image, a numpy array or a torch tensor",
        remedy=next(
            (remedy for kind, remedy in NOT_ONE_IMAGE.items() if isinstance(source, kind)),
            "convert it to one of them",
        ),
        code="source-type",
    )


def unwrap(source: Mapping[str, Any], name: str) -> ImageSource:
    """Return the image of a struct {bytes, path}, or of a dataset row with one image column.

    >>> unwrap({"image": {"bytes": None, "path": "a.png"}, "label": 3}, "image 0")
    'a.png'

    Parquet files and `datasets` use these structs.
    """
    if _is_struct(source):
        for part in (source.get("bytes"), source.get("path")):
            if part is not None:
                return part  # type: ignore[no-any-return]
        raise ImageError(
            "a struct {bytes, path} in which both values are None",
            name=name,
            remedy="omit this struct",
            code="source-type",
        )
    keys = [
        key
        for key, value in source.items()
        if isinstance(value, Image.Image) or (isinstance(value, Mapping) and _is_struct(value))
    ]
    if len(keys) == 1:
        value = source[keys[0]]
        return unwrap(value, name) if isinstance(value, Mapping) else value
    if not keys and isinstance(path := source.get("image"), str):
        raise ImageError(
            f"a dict whose 'image' is the text {short_repr(path)}",
            name=name,
            expected="{bytes, path}, or a row with one image",
            remedy='pass row["image"] if it is a path, or cast the column to datasets.Image()',
            code="source-type",
        )
    lists = [key for key, value in source.items() if _is_image_list(value)]
    if not keys and len(lists) == 1:
        raise ImageError(
            f"a dict whose {short_repr(lists[0])} is a list of images",
            name=name,
            expected="{bytes, path}, or a row with one image",
            remedy=f"pass the list alone, such as rows[{short_repr(lists[0])}]",
            code="source-type",
        )
    raise ImageError(
        f"a dict with {len(keys)} images; its keys are {', '.join(map(repr, source)) or 'none'}"[
            :300
        ],
        name=name,
        expected="{bytes, path}, or a row with one image",
        remedy='pass the image alone, such as row["image"] or row["bytes"]',
        code="source-type",
    )


def _is_image_list(value: object) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, Image.Image) or (isinstance(first, Mapping) and _is_struct(first))


def _is_struct(value: Mapping[str, Any]) -> bool:
    """Return whether `value` is a struct of an image's bytes and path. Either part may be missing
    or None."""
    return (
        not value.keys() - {"bytes", "path"}
        and bool(value)
        and isinstance(value.get("bytes"), bytes | None)
        and isinstance(value.get("path"), str | None)
    )


def read_image_file(path: str, name: str, limits: ImageLimits) -> bytes:
    name = name or repr(path)  # an empty path is shown in quotes
    with open_regular(path, name, expected="an image file") as file:
        try:
            check_file_bytes(os.fstat(file.fileno()).st_size, name, limits)
            data = file.read(limits.max_file_bytes + 1)
        except (OSError, ValueError) as error:
            raise unreadable(error, name) from None
    check_file_bytes(len(data), name, limits)
    return data
