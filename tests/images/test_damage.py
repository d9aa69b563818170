"""Test that qwen_vit rejects incomplete image files of every kind."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qwen_vit.errors import IMAGE_CODES, ImageError
from qwen_vit.images.image import RgbImage
from qwen_vit.images.load import load_image
from qwen_vit.images.truncation import ends_early, promised_bytes
from tests.support.images import FORMATS, chelsea, encode, noise, png, png_chunk, refusal

TIFF_COMPRESSIONS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"]

# Arbitrary bytes

WHOLE_FILES = [encode(chelsea().resize((9, 7)), f, **options) for f, options in FORMATS.items()]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *WHOLE_FILES]), st.integers(0, 400))
def test_arbitrary_damage_is_an_image_or_an_image_error(
    damage: bytes, data: bytes, at: int
) -> None:
    """For any bytes, no library's own error, size warning or memory address may appear."""
    outcome: RgbImage | ImageError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcome = load_image(data[:at] + damage + data[at + len(damage) :])
    except ImageError as error:
        outcome = error
    if isinstance(outcome, ImageError):
        assert outcome.code in IMAGE_CODES
        assert "object at" not in str(outcome)
    else:
        assert isinstance(outcome, RgbImage)


# Incomplete files


def cut_cases() -> list[Any]:
    cases = [(f, o) for f, o in FORMATS.items() if f != "TIFF"]
    cases += [("JPEG", {"progressive": True}), ("WEBP", {"quality": 80})]
    cases += [("TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS]
    return [pytest.param(f, o, id=f"{f}-{'-'.join(map(str, o.values()))}") for f, o in cases]


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF", "ignore:Tag data")
@pytest.mark.parametrize("someone_set_the_flag", [False, True])
@pytest.mark.parametrize(("file_format", "options"), cut_cases())
def test_a_truncated_file_is_refused_and_never_filled_up(
    file_format: str,
    options: dict[str, Any],
    someone_set_the_flag: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LOAD_TRUNCATED_IMAGES, which other libraries set, must have no effect and remain set."""
    data = encode(chelsea(), file_format, **options)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", someone_set_the_flag)
    for part in (0.001, 0.01, 0.1, 0.5, 0.9):
        cut = data[: max(16, int(len(data) * part))]
        message = refusal("truncated", cut, name="holiday")
        assert message.startswith(f"holiday: a truncated {file_format}: it ends early")
        assert f" {len(cut)} bytes. Download the file again." in message
        assert someone_set_the_flag is ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_a_truncated_lazy_pil_image_is_refused(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(chelsea(), file_format)
    picture = Image.open(io.BytesIO(data[: len(data) // 2]))
    assert "Download the file again" in refusal("truncated", picture)


@pytest.mark.parametrize("rows", [0, 1, 10, 19])
def test_a_png_with_missing_rows_is_refused(rows: int) -> None:
    """Pillow decodes these without an error and leaves the rest black."""
    line = b"\0" + bytes(range(60))
    data = png(20, 20, line * rows)
    refusal("truncated", data)
    refusal("truncated", Image.open(io.BytesIO(data)))
    assert load_image(png(20, 20, line * 20)).pixels.min() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 17)])
def test_a_whole_png_of_any_kind_is_accepted(mode: str, size: tuple[int, int]) -> None:
    assert load_image(encode(Image.new(mode, size))).pixels.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("missing", [0, 1])
def test_an_interlaced_png_is_whole_only_with_all_seven_passes(missing: int) -> None:
    """The image of 5 x 3 grey pixels has passes of 1x1, 1x1, -, 1x1, 3x1, 2x2 and 5x1 (width x
    height)."""
    passes = [(1, 1), (1, 1), (1, 1), (3, 1), (2, 2), (5, 1)]
    lines = b"".join((b"\0" + b"\7" * width) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1)
    data = png(3, 5, lines[: len(lines) - missing], colour=0)
    data = data[:8] + png_chunk(b"IHDR", header) + data[33:]
    if missing:
        refusal("truncated", data)
    else:
        assert (load_image(data).pixels == 7).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_really_ends_in_mid_grey_is_accepted(progressive: bool) -> None:
    picture = chelsea()
    picture.paste((128, 128, 128), (0, 150, 451, 300))
    data = encode(picture, "JPEG", progressive=progressive)
    pixels = load_image(data).pixels
    assert pixels[-1, -1].tolist() == [128, 128, 128]
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_a_tiff_with_unlisted_strips_is_refused() -> None:
    """The file lists one strip of 400 rows, and the test changes the header to 100 rows in a
    strip."""
    data = bytearray(encode(Image.fromarray(noise(400, 400)), "TIFF"))
    load_image(bytes(data))
    directory = struct.unpack_from("<I", data, 4)[0]
    rows_per_strip = data.index(struct.pack("<HHI", 278, 4, 1), directory)
    struct.pack_into("<I", data, rows_per_strip + 8, 100)
    refusal("truncated", bytes(data))


@pytest.mark.parametrize(
    ("data", "code", "hint"),
    [
        (b"", "empty-file", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "not-an-image", "an HTML page"),
        (b"\xef\xbb\xbf \n<HTML>", "not-an-image", "an HTML page"),
        (b'<?xml version="1.0"?>\n<!-- -->\n<svg/>', "not-an-image", "SVG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not-an-image", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not-an-image", "git lfs pull"),
        (b'<?xml version="1.0"?>\n<Error/>', "not-an-image", "an XML document"),
        (b"just some text", "not-an-image", "a text file, not an image: it starts with 'just"),
        ("naïve \u20ac".encode() + b"x" * 2000, "not-an-image", "a text file"),
        ("\u20ac".encode() * 1000, "not-an-image", "a text file"),  # byte 1024 splits a character
        (b"\xef\xbb\xbf" + "\u20ac".encode() * 1000, "not-an-image", "a text file"),
        (b"\xff\xfe" + "\U0001f600".encode("utf-16-le") * 300, "not-an-image", "a text file"),
        ("404".encode("utf-16"), "not-an-image", "starts with '404'"),
        (b' {"error": "no access"}', "not-an-image", "a JSON file"),
        (b"text\x1b[2J", "not-an-image", "starts with b'text"),
        (b"\0" * 100, "not-an-image", "Expected JPEG, PNG"),
        (b"\x89PN", "not-an-image", "Expected JPEG, PNG"),
        (b"%PDF-1.7", "format", "a PDF document, not an image"),
        (b"%!PS-Adobe-3.0", "format", "a PostScript document"),
        (b"8BPS\0\1", "format", "Photoshop"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "format", "JPEG XL"),
        (b"\x93NUMPY\1\0", "format", "numpy.load"),
        (b"PK\3\4", "format", "a zip archive"),
        (b"\x1f\x8b\x08", "format", "a gzip archive"),
        (b"ID3\4\0", "format", "an audio file"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_the_error_names_the_kind_of_a_file_without_an_image(
    data: bytes, code: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(data)
    message = refusal(code, path)
    assert message.startswith(str(path))
    assert hint in message
    assert "b'" not in message or f"starts with {data[:16]!r}" in message


@pytest.mark.parametrize("file_format", ["ICO", "PPM", "JPEG2000", "EPS", "TGA", "PCX"])
def test_formats_outside_the_allow_list_are_refused(file_format: str) -> None:
    data = encode(chelsea(), file_format)
    assert "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF" in refusal("format", data)


def test_a_damaged_file_is_distinguished_from_a_truncated_file() -> None:
    data = bytearray(encode(chelsea()))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    message = refusal("damaged", bytes(data), name="x.png")
    assert message.startswith("x.png: a damaged PNG (")


@pytest.mark.parametrize("error", [struct.error, SyntaxError, OverflowError, KeyError, ValueError])
def test_a_plug_in_error_of_any_class_becomes_an_image_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error("<_io.BytesIO object at 0x7f00deadbeef>")

    data = encode(chelsea())
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    assert error.__name__ in refusal("damaged", data)


def test_running_out_of_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    clear = encode(Image.new("RGBA", (5, 4)))
    for place, data in (
        ("PIL.PngImagePlugin.PngImageFile.load_prepare", encode(chelsea())),
        ("PIL.Image.alpha_composite", clear),  # runs after decoding
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            assert "Make the image smaller" in refusal("memory", data)


# Lengths in headers


def test_a_large_flat_png_holds_all_of_its_rows() -> None:
    """One compressed chunk inflates to more bytes than one step checks."""
    picture = Image.new("RGB", (1500, 1000), (9, 8, 7))
    assert (load_image(encode(picture)).pixels == (9, 8, 7)).all()


BIG_TIFF = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1) + bytes(20)
AVIF_BOXES = struct.pack(">I4sI", 12, b"ftyp", 0)
PROMISED = {
    "BigTIFF": ("TIFF", BIG_TIFF, 16 + 20),
    "BigTIFF, large-endian": ("TIFF", b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, 3), 16 + 60),
    "BigTIFF without entries": ("TIFF", b"II+\0\x08\0\0\0" + struct.pack("<Q", 900), 902),
    "AVIF": ("AVIF", AVIF_BOXES + struct.pack(">I4s", 400, b"mdat"), 412),
    "AVIF, 64 bits": ("AVIF", AVIF_BOXES + struct.pack(">I4sQ", 1, b"mdat", 500), 512),
    "AVIF, to the end": ("AVIF", AVIF_BOXES + struct.pack(">I4s", 0, b"mdat"), 0),
    "WEBP": ("WEBP", b"RIFF" + struct.pack("<I", 92) + b"WEBP", 100),
    "GIF": ("GIF", b"GIF89a", 0),
}


@pytest.mark.parametrize("what", PROMISED)
def test_the_length_in_a_container_header_is_read(what: str) -> None:
    file_format, data, length = PROMISED[what]
    assert promised_bytes(data, file_format) == length
    assert ends_early(data, file_format) == (length > len(data))
