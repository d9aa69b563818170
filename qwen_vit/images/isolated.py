"""Decode an image in a child process, because Python can kill a process but cannot interrupt C
code.

The child process is `python -m qwen_vit.images.decode_child`.
"""

import os
from dataclasses import asdict

from PIL import Image

from qwen_vit.common.child_process import ask_child
from qwen_vit.errors import ImageError
from qwen_vit.images.image import ExifPolicy, ImageLimits, RgbImage
from qwen_vit.images.refusals import too_much_memory

__all__ = ["decode_in_child"]


def decode_in_child(
    data: bytes,
    name: str,
    limits: ImageLimits,
    exif: ExifPolicy = "apply",
    page: int | None = None,
) -> RgbImage:
    """Decode a file in a child process, and kill the child after `limits.max_seconds`."""
    late = ImageError(
        f"not decoded after {limits.max_seconds:g} s",
        name=name,
        expected="at most ImageLimits.max_seconds",
        remedy="make the image smaller, or raise ImageLimits.max_seconds in Python",
        code="slow",
    )
    request = {"name": name, "limits": asdict(limits), "exif": exif, "page": page}
    pixels = os.memfd_create("qwen-vit-pixels")
    try:
        size, file_format, notes = ask_child(
            "qwen_vit.images.decode_child", request, data,
            timeout_s=limits.max_seconds, late=late, arguments=[str(pixels)], pass_fds=[pixels],
        )  # fmt: skip
        with open(pixels, "rb", closefd=False) as file:
            file.seek(0)
            picture = Image.frombytes("RGB", tuple(size), file.read())
    except MemoryError:
        raise too_much_memory(name) from None
    finally:
        os.close(pixels)
    return RgbImage(picture, file_format, name, tuple(notes))
