"""Make images and files for tests, and get the error that a loader must raise."""

import io
import re
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.errors import IMAGE_CODES, ImageError
from qwen_vit.images.load import load_image
from tests.support import IMAGES

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "AVIF": {"quality": 90},
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chelsea() -> Image.Image:
    return Image.open(IMAGES / "chelsea.png").convert("RGB")


def refusal(code: str, source: Any, **options: Any) -> str:
    """Return the message of the ImageError with this code that the loader must raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError) as caught:
            load_image(source, **options)
    message = str(caught.value)
    assert caught.value.code == code, message
    assert code in IMAGE_CODES
    assert not re.search(r"0x[0-9a-f]{6}", message)
    assert "\n" not in message
    return message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, scanlines: bytes, *, colour: int = 2, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(scanlines))
        + png_chunk(b"IEND", b"")
    )


def on_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return colour * alpha + 255 * (1 - alpha)


def heic(*images: Image.Image, exif: bytes | None = None) -> bytes:
    import pillow_heif

    file, container = io.BytesIO(), pillow_heif.HeifFile()
    for image in images:
        container.add_from_pillow(image)
    if exif is not None:
        container[0].info["exif"] = exif
    container.save(file, quality=-1, chroma=444)
    return file.getvalue()
