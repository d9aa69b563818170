"""Identify a file's format, and list the supported and optional formats."""

import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from qwen_vit.common.installation import install_remedy
from qwen_vit.errors import TO_ENCODE, ImageError, with_options
from qwen_vit.images.gif import GifFile
from qwen_vit.images.image import ImageLimits, check_pixels
from qwen_vit.images.lookalikes import JSON_SUFFIX, LIST_SUFFIXES, find_lookalike

__all__ = ["DECODERS", "IDENTIFY_BYTES", "decoder", "identify"]

IDENTIFY_BYTES = 1024  # bytes from the start of a file

Decoder = Callable[[Any, str], ImageFile.ImageFile]

# qwen_vit calls the plug-ins directly: Image.open would apply a process-wide pixel limit and warn.
# JpegImageFile, not its factory, reads the first image of a multi-picture file.
DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
ON_REQUEST: dict[str, type[ImageFile.ImageFile]] = {  # image.OPTIONAL_FORMATS
    "PPM": PpmImagePlugin.PpmImageFile,
    "ICO": IcoImagePlugin.IcoImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
HEIF = "HEIF"  # pillow-heif decodes it

HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AV1_BRANDS = {b"avif", b"avis"}
CONTAINER_BRANDS = {b"mif1", b"mif2", b"msf1"}
TGA_KINDS, TGA_DEPTHS = (1, 2, 3, 9, 10, 11), (8, 15, 16, 24, 32)
TGA_FOOTER = b"TRUEVISION-XFILE.\0"

ALLOWED = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"


def identify(data: bytes, name: str, formats: Sequence[str] = ()) -> str:
    """Return a file's format by its content. A format that is off by default, such as PPM, must be
    in `formats`.

    >>> identify(b"P6 1 1 255 abc", "a.ppm", ("PPM",))
    'PPM'
    """
    if not data:
        raise ImageError(
            "not an image: it is empty",
            name=name,
            expected=ALLOWED,
            remedy="download the file again",
            code="empty-file",
        )
    if _is_hevc(data):
        return HEIF
    for file_format in DECODERS:
        accepts = Image.OPEN[file_format][1]
        answer = accepts is None or accepts(data[:16])
        if isinstance(answer, str):
            raise ImageError(
                f"a {file_format}, which this Pillow cannot decode",
                name=name,
                remedy="reinstall Pillow",
                code="format",
            )
        if answer:
            return file_format
    found = _on_request(data, name, formats)
    if found in formats:
        return found
    raise _refused(data, name, found)


def decoder(file_format: str, name: str, limits: ImageLimits) -> Decoder:
    if file_format == "GIF":
        return partial(GifFile, check=partial(check_pixels, name=name, limits=limits))
    if file_format != HEIF:
        return (DECODERS | ON_REQUEST)[file_format]
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError(
            "HEIC, which needs pillow-heif",
            name=name,
            remedy=install_remedy("heif") + ", or convert it to JPEG or PNG",
            code="format",
        ) from None
    opened: Decoder = HeifImageFile
    return opened


def _is_hevc(data: bytes) -> bool:
    """Return whether a HEIF container contains HEVC images, not AV1 images."""
    if data[4:8] != b"ftyp":
        return False
    size = min(struct.unpack_from(">I", data)[0], IDENTIFY_BYTES, len(data))
    brands = {data[at : at + 4] for at in (8, *range(16, size - 3, 4))}
    major = data[8:12]
    is_container = major in CONTAINER_BRANDS and not brands & AV1_BRANDS
    return major in HEVC_BRANDS or (is_container and bool(brands & HEVC_BRANDS))


def _on_request(data: bytes, name: str, formats: Sequence[str]) -> str:
    if re.match(rb"P[1-6fy]", data) and data[2:3].isspace():
        return "PPM"
    if data.startswith(b"\0\0\1\0"):
        return "ICO"
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG2000"
    # a TGA has no signature at its start, and only newer files have one at the end
    is_named = "TGA" in formats or name.lower().endswith(".tga")
    if data.endswith(TGA_FOOTER) or (is_named and _may_be_tga(data)):
        return "TGA"
    return ""


def _may_be_tga(data: bytes) -> bool:
    if len(data) < 18:
        return False
    width, height = struct.unpack_from("<HH", data, 12)
    is_kind = data[1] in (0, 1) and data[2] in TGA_KINDS and data[16] in TGA_DEPTHS
    return is_kind and width > 0 and height > 0


def _refused(data: bytes, name: str, on_request: str) -> ImageError:
    code, fact, remedy = "not-an-image", f"not an image: it starts with {data[:16]!r}", ""
    known = find_lookalike(data)
    if on_request:
        code, fact = "format", f"of a format that is read only on request ({on_request})"
        remedy = with_options("convert it to PNG, or pass {}", ("formats", on_request.lower()))
        remedy += TO_ENCODE
    elif known is not None and not known.start:
        code, fact, remedy = known.code, known.fact("an image"), known.remedy
    elif kind := _known_to_pillow(data):
        code, fact, remedy = "format", f"of an unsupported format ({kind})", "convert it to PNG"
    elif known is not None:  # after Pillow's formats, because some of them are text
        code, fact, remedy = (
            known.code,
            known.fact("an image"),
            "pass an image, or fetch the file again",
        )
        if name.lower().endswith((*LIST_SUFFIXES, JSON_SUFFIX)):
            remedy = "pass the files that the list names; only encode, export and show read lists"
    return ImageError(fact, name=name, expected=ALLOWED, remedy=remedy, code=code)


def _known_to_pillow(data: bytes) -> str:
    """Return the name of the format whose signature Pillow finds, or an empty string."""
    Image.init()
    for file_format in sorted(set(Image.ID) - {*DECODERS, "CUR"}):  # a TGA may begin like a cursor
        factory, accepts = Image.OPEN[file_format]
        with suppress(struct.error):  # too few bytes for a signature
            if accepts is not None and accepts(data[:16]) is True:
                return str(getattr(factory, "format_description", file_format))
    return ""
