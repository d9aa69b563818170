"""Test HEIC with an extra, formats on request, and the rejection of other formats."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from qwen_vit.common.installation import install_command
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.images.formats import identify
from qwen_vit.images.image import OPTIONAL_FORMATS, ImageLimits
from qwen_vit.images.load import load_image
from qwen_vit.metadata import PACKAGES
from tests.support.images import encode, heic

PIXELS = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
SMOOTH = Image.fromarray(np.add.outer(np.arange(96), np.arange(128)).clip(0, 255).astype(np.uint8))


FILES = {
    "PPM": encode(PICTURE, "PPM"),
    "ICO": encode(PICTURE.resize((32, 32)), "ICO", sizes=[(32, 32), (16, 16)]),
    "TGA": encode(PICTURE, "TGA"),
    "JPEG2000": encode(PICTURE, "JPEG2000"),
}


def refused(data: bytes, name: str = "a", *formats: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(data, name=name, limits=ImageLimits(formats=formats))
    return caught.value


# Formats on request


@pytest.mark.parametrize("file_format", OPTIONAL_FORMATS)
def test_a_format_on_request_is_named_and_then_decoded(file_format: str) -> None:
    data = FILES[file_format]
    error = refused(data, "a.tga")
    assert error.code == "format"
    assert file_format in error.fact
    assert f'formats="{file_format.lower()}"' in error.remedy
    image = load_image(data, limits=ImageLimits(formats=(file_format,)))
    assert image.format == file_format
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(image.pixels, np.asarray(expected))
    others = [name for name in OPTIONAL_FORMATS if name != file_format]
    assert refused(data, "a.tga", *others).code == "format"


def test_a_jpeg_2000_codestream_without_boxes_is_one_as_well() -> None:
    data = encode(PICTURE, "JPEG2000", no_jp2=True)
    assert data.startswith(b"\xff\x4f\xff\x51")
    image = load_image(data, limits=ImageLimits(formats=("JPEG2000",)))
    assert np.array_equal(image.pixels, PIXELS)


@pytest.mark.parametrize("file_format", [*OPTIONAL_FORMATS, "HEIF"])
def test_a_file_that_is_cut_anywhere_is_never_filled_up(file_format: str) -> None:
    complete = heic(PICTURE) if file_format == "HEIF" else FILES[file_format]
    formats = () if file_format == "HEIF" else (file_format,)
    pixels = load_image(complete, limits=ImageLimits(formats=formats)).pixels
    codes = set()
    for cut in sorted({*range(1, len(complete), max(1, len(complete) // 60)), len(complete) - 1}):
        try:
            image = load_image(complete[:cut], limits=ImageLimits(formats=formats))
        except ImageError as error:
            codes.add(error.code)
        else:  # only bytes after the image are missing, such as the footer of a TGA
            assert np.array_equal(image.pixels, pixels), cut
            assert cut > len(complete) - 50
    print(file_format, codes)
    assert codes <= {"truncated", "damaged", "not-an-image", "format", "zero-side"}
    assert "truncated" in codes


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"P5 4 4 255\n" + bytes(range(16)), None),
        (b"P2 2 2 255\n1 2 3 4\n", None),
        (b"P2 2 2 255\n1 2 3\n", "truncated"),
        (b"P1 2 2\n1 0 0 1\n", None),
        (b"P5 2 2 65535\n" + bytes(8), "mode"),
        (b"Pf 2 2\n-1.0\n" + bytes(16), "mode"),
        (b"P6 0 2 255\n", "damaged"),
        (b"P6 999999 999999 255\n", "too-many-pixels"),
        (b"P6 x y 255\n", "damaged"),
    ],
)
def test_kinds_of_netpbm(data: bytes, code: str | None) -> None:
    limits = ImageLimits(formats=("PPM",))
    if code is None:
        assert load_image(data, limits=limits).pixels.shape[2] == 3
    else:
        assert refused(data, "a.ppm", "PPM").code == code


def test_an_icon_may_not_hide_a_large_picture() -> None:
    """The icon's directory claims 32 x 32 pixels, but its PNG has 20,000 x 20,000 pixels."""
    data = bytearray(FILES["ICO"])
    at = data.rindex(b"IHDR") + 4  # the header of the larger picture
    data[at : at + 8] = (20_000).to_bytes(4, "big") * 2
    assert refused(bytes(data), "a.ico", "ICO").code == "too-many-pixels"


def test_unknown_bytes_are_a_tga_only_on_request() -> None:
    noise = bytes([0, 0, 2]) + bytes(9) + bytes([84, 0, 56, 0, 24, 0]) + bytes(56 * 84 * 3)
    assert refused(noise, "a.jpg").code == "not-an-image"
    assert refused(noise, "a.tga").code == "format"
    assert refused(b"plain text, and more of it", "a.tga", "TGA").code == "not-an-image"


def test_names_of_formats_are_checked() -> None:
    assert ImageLimits(formats=("tga", "ppm", "PPM")).formats == ("PPM", "TGA")
    for wrong in (("PSD",), "EPS", 3, None):
        with pytest.raises(ArgumentError, match="ICO, JPEG2000, PPM, TGA"):
            ImageLimits(formats=wrong)  # type: ignore[arg-type]


def test_encode_takes_formats() -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    [expected] = (each.embeds for each in encoder.encode([PIXELS]))
    with pytest.raises(ImageError, match='formats="ppm"'):
        encoder.encode(FILES["PPM"])
    assert encoder.encode(FILES["PPM"], formats=["ppm"]).embeds.equal(expected)
    limits = ImageLimits(formats=("TGA",))
    both = encoder.encode([FILES["TGA"], FILES["PPM"]], formats=("PPM",), limits=limits)
    assert [each.grid_thw for each in both] == [(1, 4, 6)] * 2


# HEIC


def test_heic_is_decoded_and_turned() -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright, turned = (
        load_image(heic(SMOOTH.convert("RGB"))),
        load_image(heic(SMOOTH.convert("RGB"), exif=exif.tobytes())),
    )
    assert upright.format == "HEIF"
    expected = np.asarray(SMOOTH.convert("RGB")).astype(int)
    assert np.abs(upright.pixels - expected).max() <= 2  # its colours are lossy
    assert turned.picture.size == (96, 128)
    assert np.array_equal(turned.pixels, np.rot90(upright.pixels, -1))


def test_heic_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(PICTURE)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refused(data, "a.heic")
    assert error.code == "format"
    assert "HEIC" in error.fact
    assert error.remedy.startswith(
        "Install the extra heif: pip install -e '.[heif]' in a checkout, or"
    )
    assert f"Run {install_command('heif')}, or convert it" in error.text(in_shell=True)


def test_brands_distinguish_heic_from_avif() -> None:
    def container(major: bytes, *others: bytes) -> bytes:
        brands = major + bytes(4) + b"".join(others)
        return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(40)

    assert identify(container(b"heic", b"mif1"), "a") == "HEIF"
    assert identify(container(b"mif1", b"mif1", b"heic"), "a") == "HEIF"
    assert identify(container(b"mif1", b"mif1", b"avif"), "a") == "AVIF"
    assert identify(container(b"avif", b"mif1"), "a") == "AVIF"
    assert identify(container(b"mif1"), "a") == "AVIF"


def test_a_heic_above_the_limit_is_refused_by_its_header() -> None:
    with pytest.raises(ImageError) as caught:
        load_image(heic(PICTURE), limits=ImageLimits(max_pixels=1_000))
    assert caught.value.code == "too-many-pixels"


def test_features_record_the_decoder_of_heic() -> None:
    assert "pillow-heif" in PACKAGES


@pytest.mark.parametrize("file_format", ["DIB", "PCX", "DDS", "EPS", "ICNS", "MSP", "QOI", "SGI"])
def test_a_format_that_only_pillow_reads_is_named(file_format: str) -> None:
    """The error once was "not an image"."""
    file = io.BytesIO()
    Image.new("1" if file_format == "MSP" else "RGB", (20, 30)).save(file, file_format)
    with pytest.raises(ImageError) as caught:
        load_image(file.getvalue())
    assert caught.value.code == "format"
    assert "of an unsupported format (" in caught.value.fact
    assert caught.value.remedy


@pytest.mark.parametrize("junk", [b"a", b"some words", bytes(40), b"\xff" * 40, b'{"a": 1}'])
def test_bytes_without_a_signature_are_not_an_image(junk: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(junk)
    assert caught.value.code == "not-an-image"
