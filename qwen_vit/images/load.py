"""Anything a user calls an image -> RGB uint8: one policy, and one error for each thing amiss.

The policy, the same for a path, bytes, a PIL image and an array: the content decides the format,
never the name; the first frame of an animation is taken; EXIF orientation is applied;
transparency is composited on white; 16-bit samples keep their high byte; all colour modes become
RGB. Embedded ICC profiles are ignored, as the reference processor ignores them.
"""

import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from qwen_vit.errors import ArgumentError, ImageError, display_name
from qwen_vit.images.truncation import ends_early, is_filled_up, promised_bytes

__all__ = [
    "ADDRESS",
    "DECODERS",
    "ArrayLayout",
    "ImageLimits",
    "ImageSource",
    "RgbImage",
    "load_image",
    "read_image_file",
]

ImageSource: TypeAlias = (
    str
    | os.PathLike[str]
    | os.PathLike[bytes]
    | bytes
    | bytearray
    | memoryview
    | Image.Image
    | NDArray[Any]
    | torch.Tensor
)
ArrayLayout: TypeAlias = Literal["auto", "HWC", "CHW"]

# The plug-ins are called directly: Image.open would apply its process-wide pixel limit and warn.
# JpegImageFile rather than its factory, so that a multi-picture file is its first picture.
DECODERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
ALLOWED = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

# What people pass by mistake: how it starts (lower case, white space stripped), code, next step.
LOOKALIKES = (
    (rb"version https://git-lfs", "not-an-image", "a git-lfs pointer: run `git lfs pull`"),
    (rb"<svg|<\?xml.*<svg", "not-an-image", "SVG is a drawing: render it to PNG first"),
    (rb"<!doctype html|<html|<\?xml", "not-an-image", "a web page: download the image itself"),
    (rb"....ftyp(?:hei|hev|mif|msf)", "format", "HEIC: convert it to JPEG or PNG"),
    (rb"....jxl |\xff\x0a", "format", "JPEG XL: convert it to PNG"),
    (rb"....jp  |\xff\x4f\xff\x51", "format", "JPEG 2000: convert it to PNG"),
    (rb"%pdf|%!ps", "format", "a document: render the page to PNG first"),
    (rb"8bps", "format", "Photoshop: export it as PNG"),
    (rb"\x00\x00[\x01\x02]\x00[\x01-\x20]\x00", "format", "an icon: convert it to PNG"),
    (rb"p[1-7]\s", "format", "a Netpbm image: convert it to PNG"),
    (rb"\x93numpy", "format", "a numpy file: pass numpy.load(...) instead"),
    (rb"pk\x03\x04|\x1f\x8b", "format", "an archive: unpack it first"),
)

# Types that are passed by mistake, and the next step.
NOT_ONE_IMAGE: dict[type | tuple[type, ...], str] = {
    (list, tuple): "give its items one by one",
    io.IOBase: "give its path, or what its read() gives",
    np.ma.MaskedArray: "say what is under the mask, with its filled()",
}

ADDRESS = re.compile(r"(?:https?|ftp|s3|gs|hf|file):/|data:", re.IGNORECASE)

ORIENTATIONS = {  # EXIF tag 274 -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG = 274

WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may cost, checked before its pixels are decoded.

    >>> ImageLimits(max_pixels=50_000_000).max_file_bytes
    536870912

    The limits hold for one call; Pillow's process-wide MAX_IMAGE_PIXELS is neither read nor set
    (its WebP and GIF plug-ins read it themselves). Raises ArgumentError for a limit below 1.
    """

    max_pixels: int = 178_956_970
    max_file_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        for field in ("max_pixels", "max_file_bytes"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{field} is {value!r}, expected a whole number above 0")


@dataclass(frozen=True, slots=True, eq=False)
class RgbImage:
    """An image after the policy: `picture` is decoded, of mode RGB, and nobody else's.

    `format` is what the content was ("JPEG", ..., "PIL", "array", "tensor"), `name` what messages
    call it, and `notes` what the policy did, such as "EXIF orientation 6 applied".
    """

    picture: Image.Image
    format: str
    name: str
    notes: tuple[str, ...]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """A copy as uint8 (height, width, 3), C-contiguous."""
        return np.array(self.picture)

    @property
    def height(self) -> int:
        """Rows."""
        return self.picture.height

    @property
    def width(self) -> int:
        """Columns."""
        return self.picture.width


def load_image(
    source: ImageSource,
    *,
    name: str | None = None,
    layout: ArrayLayout = "auto",
    limits: ImageLimits = ImageLimits(),
) -> RgbImage:
    """Turn a path, encoded bytes, a PIL image, an array or a tensor into RGB pixels.

    >>> image = load_image(np.zeros((20, 30), np.uint8))
    >>> image.pixels.shape, image.notes
    ((20, 30, 3), ('grey to RGB',))

    Arrays and tensors are uint8, or floating point in [0, 1] (times 255, rounded half to even);
    (H, W), or with a channel axis of 1, 3 or 4 that `layout` places ("auto" refuses to guess).
    A PIL image counts with the frame it stands on; beyond Pillow's lazy loading it is unchanged.
    `name` is what messages say. Safe to call from many threads. Raises ImageError, whose `code`
    is a key of errors.IMAGE_CODES, and ArgumentError for an unknown `layout`.
    """
    if layout not in ("auto", "HWC", "CHW"):
        raise ArgumentError(f'layout is {layout!r}, expected "auto", "HWC" or "CHW"')
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        name = path if name is None else name
        return _from_bytes(read_image_file(path, name, limits), name, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        name = "image bytes" if name is None else name
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        _check_file_bytes(size, name, limits)
        return _from_bytes(bytes(source), name, limits)
    if isinstance(source, Image.Image):
        if name is None:
            name = os.fsdecode(getattr(source, "filename", "") or "PIL image")
        return _from_pil(source, name, limits)
    if isinstance(source, torch.Tensor):
        name = "tensor" if name is None else name
        return _from_array(_tensor_to_array(source, name), "tensor", name, layout, limits)
    if isinstance(source, np.ndarray) and not isinstance(source, np.ma.MaskedArray):
        name = "array" if name is None else name
        return _from_array(np.asarray(source), "array", name, layout, limits)
    remedy = "give a path, encoded bytes, a PIL image, a numpy array or a torch tensor"
    for kind, better in NOT_ONE_IMAGE.items():
        if isinstance(source, kind):
            remedy = better
    what = type(source).__name__
    raise _error("source-type", name or "image", f"is of type {what}, not one image; {remedy}")


def _error(code: str, name: str, text: str) -> ImageError:
    """The error of one of IMAGE_CODES."""
    return ImageError(f"{display_name(name)} {text}", code=code)


# Files


def read_image_file(path: str, name: str, limits: ImageLimits) -> bytes:
    """A file's bytes as they are, or an ImageError; what is no regular file is never opened."""
    if ADDRESS.match(path):
        raise _error("url", name[:80], "is an address, not a file; download it first")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise _error(
                "directory", name, "is a directory; give its files, or `qwen-vit export` it"
            )
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block, a device might not end
            raise _error(
                "not-a-file",
                name,
                "is a FIFO, socket or device, which are never opened; copy its content to a file",
            )
        _check_file_bytes(status.st_size, name, limits)
        with open(path, "rb") as file:
            data = file.read(limits.max_file_bytes + 1)
    except FileNotFoundError:
        raise _error("missing", name, "does not exist; check the path") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(
            "unreadable", name, f"cannot be read: {reason}; check its path and permissions"
        ) from None
    _check_file_bytes(len(data), name, limits)
    return data


def _check_file_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_file_bytes:
        raise _error(
            "file-too-large",
            name,
            f"has {size} bytes, at most {limits.max_file_bytes} are read; "
            "make it smaller, or raise ImageLimits.max_file_bytes in Python",
        )


def _check_pixels(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise _error(
            "zero-side", name, f"is {width}x{height} (width x height), expected sides above 0"
        )
    if width * height > limits.max_pixels:
        raise _error(
            "too-many-pixels",
            name,
            f"is {width}x{height} = {width * height} pixels, at most {limits.max_pixels} are "
            "decoded; make it smaller, or raise ImageLimits.max_pixels in Python",
        )


# Encoded images


def _from_bytes(data: bytes, name: str, limits: ImageLimits) -> RgbImage:
    file_format = _identify(data, name)
    reader = _Reader(data)
    with _decoding(data, file_format, name, header=reader):
        if file_format in ("WEBP", "TIFF") and promised_bytes(data, file_format) > len(data):
            raise EOFError  # before Pillow warns about what it misses
        image = DECODERS[file_format](reader, "")
    deep, early_notes = _is_deep(image), _tiff_notes(image)
    with _decoding(data, file_format, name):
        _load(image, name, limits)
        if is_filled_up(data, file_format, image):
            raise EOFError
        picture, notes = _to_rgb(image, name, deep)
        if picture is image:  # which holds its file, and goes through it when frames are counted
            picture = image._new(image.im)
    return RgbImage(picture, file_format, name, (*early_notes, *notes, *_frame_notes(image)))


class _Reader(io.BytesIO):
    """Bytes that remember whether more of them were asked for than there are."""

    ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.ran_out |= size is not None and len(data) < size
        return data


def _identify(data: bytes, name: str) -> str:
    if not data:
        raise _error("empty-file", name, "is not an image: it is empty; fetch it again")
    for file_format in DECODERS:
        accepts = Image.OPEN[file_format][1]
        answer = accepts is None or accepts(data[:16])
        if isinstance(answer, str):
            raise _error(
                "format", name, f"is {file_format}, which this Pillow cannot decode; reinstall it"
            )
        if answer:
            return file_format
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    code, hint = "not-an-image", f"expected {ALLOWED}"
    for pattern, found_code, found_hint in LOOKALIKES:
        if re.match(pattern, start if found_code == "not-an-image" else data.lower(), re.DOTALL):
            code, hint = found_code, found_hint
            break
    what = "not an image" if code == "not-an-image" else f"not {ALLOWED}"
    raise _error(code, name, f"is {what}: it starts with {data[:16]!r}; {hint}")


@contextmanager
def _decoding(
    data: bytes | None, file_format: str, name: str, *, header: _Reader | None = None
) -> Iterator[None]:
    """Run Pillow strictly, and turn whatever a plug-in raises into an ImageError.

    Headers are read in exact pieces, so there (`header`) running out of bytes means truncation.
    """
    try:
        with _strictly():
            yield
    except ImageError:
        raise
    except MemoryError:
        raise _error(
            "memory", name, "does not fit into memory when decoded; make it smaller"
        ) from None
    except Image.DecompressionBombError:
        raise _error(
            "too-many-pixels",
            name,
            "has more pixels than Pillow decodes (Image.MAX_IMAGE_PIXELS); make it smaller",
        ) from None
    except Exception as error:  # noqa: BLE001 - plug-ins raise SyntaxError, struct.error, ...
        text = str(error)
        if (
            isinstance(error, EOFError)
            or "truncat" in text.lower()
            or (header is not None and header.ran_out)
            or (data is not None and ends_early(data, file_format))
        ):
            size = "" if data is None else f" after {len(data)} bytes"
            raise _error(
                "truncated",
                name,
                f"is a truncated {file_format}: it ends early{size}; fetch it again",
            ) from None
        reason = type(error).__name__ if re.search(r"0x[0-9a-fA-F]{4}", text) else text
        raise _error(
            "damaged",
            name,
            f"is a damaged {file_format} ({reason or type(error).__name__}); "
            "fetch it again, or open and save it in an image editor",
        ) from None


class _Strictness:
    """How many threads decode now, and what LOAD_TRUNCATED_IMAGES was before the first."""

    lock = threading.Lock()
    threads = 0
    found = False


@contextmanager
def _strictly() -> Iterator[None]:
    """Decode as if nobody had set Pillow's LOAD_TRUNCATED_IMAGES, and leave it as it was found.

    The flag is Pillow's only switch for it, and libraries do set it; so it is held at False from
    the first thread that decodes here to the last, and then put back.
    """
    with _Strictness.lock:
        if _Strictness.threads == 0:
            _Strictness.found = ImageFile.LOAD_TRUNCATED_IMAGES
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            _Strictness.found = True
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _Strictness.threads += 1
    try:
        yield
    finally:
        with _Strictness.lock:
            _Strictness.threads -= 1
            if _Strictness.threads == 0 and _Strictness.found:
                ImageFile.LOAD_TRUNCATED_IMAGES = True


def _load(image: Image.Image, name: str, limits: ImageLimits) -> None:
    """Check what the header says, then decode."""
    _check_pixels(image.width, image.height, name, limits)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile:
        _prepare_tiff(image, name, limits)
    image.load()


def _prepare_tiff(image: TiffImagePlugin.TiffImageFile, name: str, limits: ImageLimits) -> None:
    """Check the strips, and allocate the picture before Pillow does, which warns above its limit.

    Strips that the file does not list would stay black.
    """
    width, height = image._tile_size
    _check_pixels(width, height, name, limits)
    extents = {tile.extents for tile in image.tile if tile.extents is not None}
    if sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in extents) < width * height:
        raise EOFError
    if image._im is None:
        image.im = Image.new(image.mode, (width, height)).im


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    """Counted last: counting moves through the file. A damaged later frame does not matter."""
    try:
        with _strictly():
            frames = int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 - plug-ins raise anything
        return ("first of several frames",)
    return (f"first of {frames} frames",) if frames > 1 else ()


# PIL images

# Pillow does not lock its lazy loading; threads that were given one image take turns.
LOAD_LOCKS = tuple(threading.Lock() for _ in range(61))


def _from_pil(image: Image.Image, name: str, limits: ImageLimits) -> RgbImage:
    file_format = str(image.format or "PIL image")
    with LOAD_LOCKS[id(image) // 16 % len(LOAD_LOCKS)]:
        if getattr(image, "tile", None) and getattr(image, "fp", image) is None:
            raise _error(
                "unreadable",
                name,
                "is a PIL image whose file was closed before it was loaded; call its load() first, "
                "or pass the path",
            )
        deep, early_notes = _is_deep(image), _tiff_notes(image)
        data = _lazy_bytes(image, limits)
        with _decoding(data, file_format, name):
            _load(image, name, limits)
            if data is not None and is_filled_up(data, file_format, image):
                raise EOFError
            picture, notes = _to_rgb(image, name, deep)
            if picture is image:  # which its owner may change
                picture = image.copy()
    return RgbImage(picture, "PIL", name, (*early_notes, *notes))


def _lazy_bytes(image: Image.Image, limits: ImageLimits) -> bytes | None:
    """The file behind a PNG or JPEG that is not decoded yet, for the checks that need it."""
    if not isinstance(image, PngImagePlugin.PngImageFile | JpegImagePlugin.JpegImageFile):
        return None
    if not image.tile or image.fp is None or image.decoderconfig:  # draft mode
        return None
    try:
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read(limits.max_file_bytes)
        image.fp.seek(position)
    except (OSError, ValueError):  # closed, or not seekable: decoding says so
        return None
    return data


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow will reduce 16-bit samples while it decodes."""
    tiles = getattr(image, "tile", ())
    raw_modes = (t[3][0] if isinstance(t[3], tuple) and t[3] else t[3] for t in tiles)
    return any(isinstance(mode, str) and ";16" in mode for mode in raw_modes)


def _tiff_notes(image: Image.Image) -> tuple[str, ...]:
    """Pillow itself turns a TIFF upright while it decodes, and then forgets the tag."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or not image.tile:
        return ()
    orientation = image.tag_v2.get(ORIENTATION_TAG)
    return (f"EXIF orientation {orientation} applied",) if orientation in ORIENTATIONS else ()


def _to_rgb(image: Image.Image, name: str, deep: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """Apply the policy to a decoded image, which stays as it is."""
    notes: list[str] = []
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 - damaged metadata raises anything; the picture is whole
        orientation = None
        notes.append("unreadable EXIF ignored")
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
        raise _mode_error(name, image.mode, "Pillow cannot convert it") from None


def _mode_error(name: str, mode: str, why: str) -> ImageError:
    return _error(
        "mode", name, f"has Pillow mode {mode}: {why}; scale it to 0..255 and save it as RGB or L"
    )


def _to_eight_bit_rgb(image: Image.Image, name: str, deep: bool, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_sixteen_bit(image, notes)
    if image.mode in ("F", "I"):
        raise _mode_error(name, image.mode, "it does not say which value is white")
    if deep:
        notes.append("16-bit scaled to 8")
    if image.has_transparency_data:
        notes.append("alpha composited on white")
        return _on_white(_with_alpha(image, deep))
    if image.mode == "RGB":
        return image
    notes.append(f"{image.mode} to RGB")
    return image.convert("RGB")


def _from_sixteen_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    """The high byte, which is also what Pillow keeps of 16-bit colour."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    notes.append("16-bit scaled to 8")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
        notes.append("alpha composited on white")
    return Image.fromarray(grey).convert("RGB")


def _with_alpha(image: Image.Image, deep: bool) -> Image.Image:
    if image.mode in ("La", "PA"):
        return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    clear = image.info.get("transparency")
    # The pixels kept their high bytes: so does the colour. Of an image that is loaded already, the
    # colour alone can tell that they were of 16 bits.
    if isinstance(clear, tuple) and (deep or max(clear) > 255):
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode not in ("1", "L", "RGB", "P", "LA", "RGBA", "RGBa"):
        return image.convert("RGB").convert("RGBA")  # a leftover entry that this mode cannot use
    return image.convert("RGBA")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(white, image).convert("RGB")


# Arrays


def _tensor_to_array(tensor: torch.Tensor, name: str) -> NDArray[Any]:
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:  # numpy has none
            tensor = tensor.float()
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError):
        raise _error(
            "array-dtype",
            name,
            f"is a {tensor.dtype} tensor ({tensor.layout}, device {tensor.device}) that has no "
            "plain values; give a dense uint8 or floating-point tensor",
        ) from None


def _from_array(
    array: NDArray[Any], kind: str, name: str, layout: ArrayLayout, limits: ImageLimits
) -> RgbImage:
    array = _channels_last(array, name, layout)
    height, width, channels = array.shape
    _check_pixels(width, height, name, limits)
    notes: list[str] = []
    if array.dtype != np.uint8:
        array = _float_to_uint8(array, name)
        notes.append("[0, 1] scaled to 0..255")
    if channels == 1:
        array = array.repeat(3, axis=2)
        notes.append("grey to RGB")
    elif channels == 4:
        notes.append("alpha composited on white")
        return RgbImage(_on_white(_picture("RGBA", array)), kind, name, tuple(notes))
    return RgbImage(_picture("RGB", array), kind, name, tuple(notes))


def _picture(mode: str, array: NDArray[np.uint8]) -> Image.Image:
    """A copy; `Image.fromarray` would share the memory of some arrays."""
    height, width, _ = array.shape
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(array).tobytes())


def _channels_last(array: NDArray[Any], name: str, layout: ArrayLayout) -> NDArray[Any]:
    shape = array.shape
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        remedy = "give its images one by one, as a list" if array.ndim > 3 else "give (H, W, 3)"
        raise _error("array-shape", name, f"has shape {shape}, expected 2 or 3 axes; {remedy}")
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if layout == "auto" and first and last:
        raise _error(
            "array-layout",
            name,
            f"has shape {shape}, whose first and last axis could both be channels; "
            'give layout="HWC" or layout="CHW"',
        )
    chosen = layout if layout != "auto" else "CHW" if first else "HWC"
    if not (first if chosen == "CHW" else last):
        raise _error(
            "array-channels",
            name,
            f"has shape {shape}, expected 1, 3 or 4 channels on the "
            f"{'last or first' if layout == 'auto' else 'first' if layout == 'CHW' else 'last'} "
            "axis; select or convert the channels",
        )
    return array if chosen == "HWC" else np.moveaxis(array, 0, 2)


def _float_to_uint8(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if not np.issubdtype(array.dtype, np.floating):
        remedy = {"b": "multiply by 255 and cast to uint8", "u": "scale to 0..255, cast to uint8"}
        raise _error(
            "array-dtype",
            name,
            f"has dtype {array.dtype}, expected uint8 in 0..255 or floating point in [0, 1]; "
            + remedy.get(array.dtype.kind, "cast to uint8 if its values are 0..255"),
        )
    finite = np.isfinite(array)
    if not finite.all():
        nan = int(np.isnan(array).sum())
        infinite = int(array.size - finite.sum()) - nan
        raise _error(
            "array-not-finite",
            name,
            f"holds {nan} NaN and {infinite} infinite of {array.size} values; "
            "mend them, for example with numpy.nan_to_num",
        )
    outside = int(((array < 0) | (array > 1)).sum())
    if outside:
        raise _error(
            "array-range",
            name,
            f"holds {outside} of {array.size} values outside [0, 1] (smallest "
            f"{float(array.min()):g}, largest {float(array.max()):g}); clip it, or cast 0..255 "
            "to uint8",
        )
    # float64, so that k / 255 comes back as k from every floating-point type
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
