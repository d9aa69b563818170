"""Test the conversion of alpha, deep samples and every colour mode to RGB of 8 bits."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from qwen_vit.images.load import load_image
from tests.support.images import encode, noise, on_white, png, png_chunk, refusal


def with_png_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header, which is a valid place for tRNS of grey and RGB."""
    return data[:33] + png_chunk(kind, content) + data[33:]


# Alpha and colour modes


def half_transparent() -> np.ndarray:
    rgba = noise(8, 10, 4)
    rgba[:, :3, 3], rgba[:, 3:6, 3] = 0, 255
    return rgba


def test_alpha_is_composited_on_white_from_every_source() -> None:
    rgba = half_transparent()
    picture = Image.fromarray(rgba)
    sources: list[Any] = [
        rgba,
        rgba.transpose(2, 0, 1),
        rgba / 255,
        torch.from_numpy(rgba),
        picture,
    ]
    sources += [encode(picture, f, lossless=True) for f in ("PNG", "WEBP", "TIFF")]
    first = load_image(rgba).pixels
    assert np.abs(first - on_white(rgba)).max() <= 1  # integer compositing rounds once
    assert (first[:, :3] == 255).all()
    assert np.array_equal(first[:, 3:6], rgba[:, 3:6, :3])
    for source in sources:
        image = load_image(source)
        # WebP may change only the colour of transparent pixels.
        assert np.array_equal(image.pixels, first)
        assert "alpha composited on white" in image.notes


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA", "P"])
def test_every_alpha_mode_is_composited_on_white(mode: str) -> None:
    grey = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
    alpha = np.full((3, 4), 255, np.uint8)
    alpha[0] = 0
    picture = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if mode == "PA":
        picture = picture.convert("RGBA").convert("PA")
    elif mode == "P":
        picture = Image.fromarray(grey).convert("P")
        picture.info["transparency"] = bytes(0 if i in grey[0] else 255 for i in range(256))
    elif mode == "RGBa":
        picture = picture.convert("RGBA").convert("RGBa")
    elif mode == "La":
        picture = picture.convert("La")
    assert picture.mode == mode
    expected = grey.copy()
    expected[0] = 255
    pixels = load_image(picture).pixels
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= (8 if mode == "PA" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16", "RGB 16-bit"])
def test_a_transparent_colour_of_a_png_becomes_white(mode: str) -> None:
    """The transparent colour is the darkest colour, so a loader that ignores transparency gives
    black."""
    if mode == "RGB 16-bit":
        scanlines = b"\0" + struct.pack(">6H", 0x0102, 3, 4, 0x4002, 0x5003, 0x6004)
        data = png(1, 2, scanlines, depth=16)
        data = with_png_chunk(data, b"tRNS", struct.pack(">3H", 0x0102, 3, 4))
        expected = [[[255, 255, 255], [0x40, 0x50, 0x60]]]
    elif mode == "I;16":
        data = png(1, 2, b"\0" + struct.pack(">2H", 0x0102, 0x4002), colour=0, depth=16)
        data = with_png_chunk(data, b"tRNS", struct.pack(">H", 0x0102))
        expected = [[[255] * 3, [0x40] * 3]]
    else:
        picture = Image.new(mode, (2, 1), 0 if mode != "RGB" else (0, 0, 0))
        if mode == "P":
            picture.putpalette([0, 0, 0, 200, 200, 200])
        colours: dict[str, Any] = {"1": 1, "L": 200, "RGB": (200, 200, 200), "P": 1}
        picture.putpixel((1, 0), colours[mode])
        data = encode(picture, transparency=(0, 0, 0) if mode == "RGB" else 0)
        expected = [[[255] * 3, [255 if mode == "1" else 200] * 3]]
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.pixels.tolist() == expected
        assert "alpha composited on white" in image.notes


@pytest.mark.parametrize("kind", ["grey", "rgb", "rgba", "pil-big-endian", "tiff"])
def test_16_bit_samples_keep_their_high_byte(kind: str) -> None:
    values = (np.arange(0, 65536, 4096) + 300).astype(np.uint16).reshape(4, 4)
    grey = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
    source: Any
    if kind == "grey":
        source = encode(Image.fromarray(values))
    elif kind == "tiff":
        source = encode(Image.fromarray(values), "TIFF")
    elif kind == "pil-big-endian":
        source = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    else:
        count = {"rgb": 3, "rgba": 4}[kind]
        wide = np.repeat(values[..., None], count, 2).astype(">u2")
        if kind == "rgba":
            wide[..., 3] = 65535
        scanlines = b"".join(b"\0" + row.tobytes() for row in wide)
        source = png(4, 4, scanlines, colour={"rgb": 2, "rgba": 6}[kind], depth=16)
    image = load_image(source)
    assert np.array_equal(image.pixels, grey)
    assert "16-bit scaled to 8" in image.notes


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LAB"])
def test_colour_modes_become_rgb(mode: str) -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:8] = 255
    colour[8:, 8:] = (200, 30, 60) if mode not in ("1", "L") else 255
    picture = Image.fromarray(colour)
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
        source = ImageCms.applyTransform(picture, transform)
    else:
        source = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
    assert source is not None
    assert source.mode == mode
    image = load_image(source)
    assert np.abs(image.pixels.astype(int) - colour).max() <= 4
    assert f"{mode} to RGB" in image.notes


def test_a_cmyk_jpeg_file_is_not_inverted() -> None:
    picture = Image.new("RGB", (32, 32), (250, 20, 30))
    image = load_image(encode(picture.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.pixels.astype(int) - (250, 20, 30)).max() <= 6


# Deep samples


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixel_types_without_a_white_level_are_refused(mode: str) -> None:
    picture = Image.new(mode, (4, 4))
    for source in (picture, encode(picture, "TIFF")):
        message = refusal("mode", source, name="depth.tif")
        assert message.startswith(
            f"depth.tif: Pillow mode {mode} does not define which value is white"
        )
        assert "Scale it to 0..255" in message


def test_a_deep_pil_image_has_the_same_pixels_after_it_is_loaded() -> None:
    """After loading, only the transparent colour shows that the samples had 16 bits."""
    clear = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    lines = [b"\0" + b"\xff" * 48] * 4 + [b"\0" + clear * 8] * 4
    data = with_png_chunk(png(8, 8, b"".join(lines), depth=16), b"tRNS", clear)
    picture = Image.open(io.BytesIO(data))
    first, again = load_image(picture).pixels, load_image(picture).pixels
    assert np.array_equal(first, load_image(data).pixels)
    assert np.array_equal(again, first)
    assert (first == 255).all()  # white rows, and transparent rows on white
