"""Test that qwen_vit respects a TIFF's tags, or rejects the file and names its kind."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from qwen_vit.errors import ImageError
from qwen_vit.images.load import load_image
from tests.support import IMAGES

GREY = np.add.outer(np.arange(40) * 3, np.arange(60) * 2).clip(0, 255).astype(np.uint8)
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANES, FORMAT = 273, 277, 278, 279, 284, 339


def tiff(data: bytes, order: str = "<", **changes: Any) -> bytes:
    """Make a TIFF of one strip and its tags, with one or several whole numbers for each tag."""
    names = {
        "bits": BITS, "compression": COMPRESSION, "photometric": PHOTOMETRIC, "samples": SAMPLES,
        "planes": PLANES, "format": FORMAT, "inks": 332, "depth": 32997,
    }  # fmt: skip
    tags: dict[int, Any] = {
        WIDTH: 60, HEIGHT: 40, BITS: 8, COMPRESSION: 1, PHOTOMETRIC: 1, STRIPS: 8, SAMPLES: 1,
        ROWS: 40, STRIP_BYTES: len(data),
    }  # fmt: skip
    tags |= {names[name]: value for name, value in changes.items()}
    directory, extra = struct.pack(order + "H", len(tags)), b""
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        values = tags[tag] if isinstance(tags[tag], tuple) else (tags[tag],)
        kind = 4 if tag in (STRIPS, STRIP_BYTES) else 3
        packed = struct.pack(order + f"{len(values)}{'I' if kind == 4 else 'H'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", after + len(extra)), extra + packed
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(order + "I", 8 + len(data))
    return head + start + data + directory + bytes(4) + extra


def sixteen(values: np.ndarray, order: str = "<") -> bytes:
    return (values.astype(np.uint16) * 257).astype(f"{order}u2").tobytes()


def code(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(data, name="a.tif")
    assert "Convert it to PNG" in str(caught.value)
    assert "download" not in str(caught.value).lower()
    return caught.value.code


@pytest.mark.parametrize("order", ["<", ">"])
def test_8_bit_samples_with_white_as_zero_are_inverted(order: str) -> None:
    pixels = load_image(tiff(GREY.tobytes(), order, photometric=0)).pixels
    assert np.array_equal(pixels[..., 0], 255 - GREY)


@pytest.mark.parametrize("photometric", [0, 1])
def test_16_bit_samples_respect_the_photometric_tag(photometric: int) -> None:
    """Pillow inverts only 8-bit samples, so such X-rays once became negatives."""
    data = tiff(sixteen(GREY), bits=16, photometric=photometric)
    expected = 255 - GREY if photometric == 0 else GREY
    assert np.array_equal(load_image(data).pixels[..., 0], expected)
    lazy = TiffImagePlugin.TiffImageFile(io.BytesIO(data), "")
    assert np.array_equal(load_image(lazy).pixels[..., 0], expected)


def test_12_bits_fill_the_range() -> None:
    """Pillow keeps values from 0 to 4095, whose high byte is almost black."""
    values = (GREY.astype(np.uint16) * 16 + 7).reshape(-1, 2)
    first, second = values[:, 0], values[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    image = load_image(tiff(packed.astype(np.uint8).tobytes(), bits=12))
    assert np.array_equal(image.pixels[..., 0], GREY)


@pytest.mark.parametrize(
    ("tags", "data"),
    [
        pytest.param({"format": 2}, GREY.tobytes(), id="signed"),
        pytest.param(
            {"bits": (16,) * 3, "samples": 3, "planes": 2, "photometric": 2},
            sixteen(GREY) * 3,
            id="planes apart",
        ),
        pytest.param(
            {"bits": (8,) * 4, "samples": 4, "photometric": 5, "inks": 2},
            GREY.tobytes() * 4,
            id="other inks",
        ),
        pytest.param(
            {"bits": (8,) * 3, "samples": 3, "photometric": 6}, GREY.tobytes() * 3, id="raw YCbCr"
        ),
        pytest.param({"depth": 2}, GREY.tobytes() * 2, id="a volume"),
        pytest.param({"photometric": 32803}, GREY.tobytes(), id="a sensor's raw"),
        pytest.param({"photometric": 4}, GREY.tobytes(), id="a mask"),
        pytest.param({"compression": 34712}, GREY.tobytes(), id="JPEG 2000"),
        pytest.param({"compression": 60_001}, GREY.tobytes(), id="unknown compression"),
        pytest.param({"bits": 24}, GREY.tobytes() * 3, id="24 bits"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_kind_that_is_not_read_is_named(order: str, tags: dict[str, Any], data: bytes) -> None:
    """With the code "damaged", a user would download the file again without effect."""
    assert code(tiff(data, order, **tags)) == "mode"


def test_16_bits_big_endian_white_is_zero_is_named() -> None:
    assert code(tiff(sixteen(GREY, ">"), ">", bits=16, photometric=0)) == "mode"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_tiffs_of_pillow_are_read(mode: str, compression: str) -> None:

    file = io.BytesIO()
    Image.new(mode, (30, 20)).save(file, "TIFF", compression=compression)
    assert load_image(file.getvalue()).pixels.shape == (20, 30, 3)


def photograph_in_strips(mode: str, compression: str) -> tuple[bytes, int, int]:
    """Return a TIFF of the test photograph, and the offset and bytes of a strip in its middle."""
    file = io.BytesIO()
    Image.open(IMAGES / "rocket.jpg").convert(mode).save(file, "TIFF", compression=compression)
    tags = Image.open(io.BytesIO(file.getvalue())).tag_v2  # type: ignore[attr-defined]
    middle = len(tags[STRIPS]) // 2
    return file.getvalue(), tags[STRIPS][middle], tags[STRIP_BYTES][middle]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("damage", ["hole", "end", "marker"])
def test_an_incomplete_jpeg_strip_is_refused(mode: str, damage: str) -> None:
    """qwen_vit once accepted such a strip with grey blocks, because libtiff only warns."""
    data, begin, count = photograph_in_strips(mode, "jpeg")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = load_image(data)
    assert np.array_equal(image.pixels, expected)
    assert not [note for note in image.notes if "check" in note or "padding" in note]
    half, end = begin + count // 2, begin + count
    lost = {
        "hole": bytes(count // 4) + data[half + count // 4 : end],
        "end": bytes(end - half),
        "marker": b"\xff\xd9" + data[half + 2 : end],
    }[damage]
    torn = data[:half] + lost + data[end:]
    for source in (torn, Image.open(io.BytesIO(torn))):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert caught.value.code in ("truncated", "damaged")


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_a_fax_is_read_with_a_note_that_it_is_not_checked(compression: str) -> None:
    data, _, _ = photograph_in_strips("1", compression)
    assert "CCITT fax, not checked for damage" in load_image(data).notes
