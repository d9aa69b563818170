"""Make files and tars as inputs of tests, and list their ids."""

import io
import os
import tarfile
from typing import Any

import pytest

from qwen_vit.errors import ImageError
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item

LIMITS = ImageLimits()


def touch(*names: str | bytes) -> None:
    for name in names:
        path = os.fsencode(name)
        os.makedirs(os.path.dirname(path) or b".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"bytes of " + path)


def ids(*inputs: str) -> list[str]:
    return [item.id for item in find_items(inputs)]


def write_tar(path: str, members: dict[str, bytes], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def failure(item: Item) -> ImageError:
    """Return the error of an unreadable item."""
    with pytest.raises(ImageError) as caught:
        read_item(item, LIMITS)
    return caught.value
