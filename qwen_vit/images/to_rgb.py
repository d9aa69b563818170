"""Convert a decoded PIL image of any mode to upright RGB without transparency."""

from collections.abc import Callable

import numpy as np
from PIL import Image, TiffImagePlugin

from qwen_vit.errors import ImageError
from qwen_vit.images.image import EXIF_IGNORED, ExifPolicy
from qwen_vit.images.tiff import check_directory, grey_depth

__all__ = ["is_deep", "on_white", "tiff_orientation", "to_rgb", "turn_back"]

ORIENTATIONS = {  # EXIF tag 274 -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

INVERSE = {  # every other operation is its own inverse
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}

ORIENTATION_TAG = 274

WHITE = (255, 255, 255)
BAND_PIXELS = 2**20  # pixels to convert at a time


def to_rgb(
    image: Image.Image, name: str, deep: bool, exif: ExifPolicy = "apply"
) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a decoded image as upright RGB, and notes on its conversion.

    The input does not change, and may itself be the result. `deep` is what `is_deep` returned
    before decoding. With exif="ignore", the function does not rotate the image.
    """
    notes: list[str] = []
    try:
        check_exif(image)
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 - damaged metadata raises anything; the pixels are fine
        orientation = None
        notes.append("unreadable EXIF ignored")
    if exif == "ignore":
        orientation = None
        notes.append(EXIF_IGNORED)
    upright = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    try:
        picture = _to_eight_bit_rgb(image, name, deep, notes)
        if upright is not None:
            picture = picture.transpose(upright)
            notes.append(f"EXIF orientation {orientation} applied")
        return picture, tuple(notes)
    except (ValueError, OSError, KeyError) as error:
        if isinstance(error, ImageError):
            raise
        raise _mode_error(name, f"Pillow cannot convert its mode, {image.mode}") from None


def check_exif(image: Image.Image) -> None:
    """Raise ValueError if the Exif data would take too much memory.

    Pillow copies the bytes that each entry refers to, and many entries can share the same bytes.
    """
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:
        exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    if isinstance(exif, bytes):
        check_directory(exif.removeprefix(b"Exif\0\0"))


def is_deep(image: Image.Image) -> bool:
    """Return whether the file has 16-bit samples.

    Call this before Pillow loads the image, because Pillow reduces 16-bit colours.
    """
    tiles = getattr(image, "tile", ())
    raw_modes = (t[3][0] if isinstance(t[3], tuple) and t[3] else t[3] for t in tiles)
    return any(isinstance(mode, str) and ";16" in mode for mode in raw_modes)


def tiff_orientation(image: Image.Image) -> int | None:
    """Return the orientation that decoding will apply to a TIFF and then drop, or None."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.tile:
        return None
    orientation = image.tag_v2.get(ORIENTATION_TAG)
    return orientation if orientation in ORIENTATIONS else None


def turn_back(picture: Image.Image, orientation: int) -> Image.Image:
    upright = ORIENTATIONS[orientation]
    return picture.transpose(INVERSE.get(upright, upright))


def on_white(image: Image.Image) -> Image.Image:
    return _in_bands(image, _band_on_white)


def _band_on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _in_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB in bands of rows, because intermediate copies take memory."""
    rows = max(1, BAND_PIXELS // image.width)
    if image.height <= rows:
        return convert(image)
    picture = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        picture.paste(convert(band), (0, top))
    return picture


def _to_eight_bit_rgb(image: Image.Image, name: str, deep: bool, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_sixteen_bit(image, notes)
    if image.mode in ("F", "I"):
        raise _mode_error(name, f"Pillow mode {image.mode} does not define which value is white")
    if deep:
        notes.append("16-bit scaled to 8")
    if image.has_transparency_data:
        notes.append("alpha composited on white")
        return _in_bands(image, lambda band: _band_on_white(_with_alpha(band, deep)))
    if image.mode == "RGB":
        return image
    notes.append(f"{image.mode} to RGB")
    return image.convert("RGB")


def _from_sixteen_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    """Convert deep grey to RGB by its highest 8 bits, as Pillow does for 16-bit colour."""
    notes.append("16-bit scaled to 8")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        notes.append("alpha composited on white")
    bits, is_negative = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, is_negative = grey_depth(image)

    def convert(band: Image.Image) -> Image.Image:
        values = np.asarray(band)
        grey = (values >> (bits - 8)).astype(np.uint8)
        if is_negative:
            grey = 255 - grey
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")

    return _in_bands(image, convert)


def _with_alpha(image: Image.Image, deep: bool) -> Image.Image:
    if image.mode in ("La", "PA"):
        return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    clear = image.info.get("transparency")
    # The pixels kept their high bytes, so this colour also keeps the high byte. Once an image is
    # loaded, only this colour shows that the samples had 16 bits.
    if isinstance(clear, tuple) and (deep or max(clear) > 255):
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode not in ("1", "L", "RGB", "P", "LA", "RGBA", "RGBa"):
        return image.convert("RGB").convert("RGBA")  # a leftover entry that this mode cannot use
    return image.convert("RGBA")


def _mode_error(name: str, fact: str) -> ImageError:
    remedy = "scale it to 0..255 and save it as RGB or L"
    return ImageError(fact, name=name, remedy=remedy, code="mode")
