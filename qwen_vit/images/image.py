"""Define the RGB image, the limits on images, and the types that a caller may pass as an image."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen_vit.common.arguments import short_repr
from qwen_vit.errors import ArgumentError, ImageError, display_name, with_options

if TYPE_CHECKING:
    import torch

__all__ = [
    "ADDRESS",
    "EXIF_IGNORED",
    "OPTIONAL_FORMATS",
    "ArrayLayout",
    "ExifPolicy",
    "ImageLimits",
    "ImagePage",
    "ImageSource",
    "RgbImage",
    "check_file_bytes",
    "check_formats",
    "check_pixels",
    "check_ratio",
]

ArrayLayout: TypeAlias = Literal["auto", "HWC", "CHW"]
ExifPolicy: TypeAlias = Literal["apply", "ignore"]

EXIF_IGNORED = "EXIF orientation ignored"  # every encoded or PIL image with exif="ignore" gets it

ADDRESS = re.compile(r"(?:https?|ftp|s3a?|gs|gcs|az|abfs|hf|file):/|data:", re.IGNORECASE)

HOST = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)+(:\d{1,5})?", re.IGNORECASE)
HTTPS_PORT = 443
OPTIONAL_FORMATS = ("ICO", "JPEG2000", "PPM", "TGA")
MAX_RATIO = 200  # long side / short side, as in the reference processor


@dataclass(frozen=True, slots=True)
class ImagePage:
    """Select one page of an encoded image, or one frame of an animation, counted from 1.

    >>> ImagePage(b"II*...", 2).page
    2
    """

    data: bytes
    page: int


# Union, because a quoted type name does not support `|`
ImageSource: TypeAlias = Union[
    str,
    os.PathLike[str],
    os.PathLike[bytes],
    bytes,
    bytearray,
    memoryview,
    Image.Image,
    NDArray[Any],
    "torch.Tensor",
    Mapping[str, Any],
    ImagePage,
]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Set limits on one image. qwen_vit applies all limits except `max_seconds` before it decodes
    pixels.

    >>> ImageLimits(max_pixels=50_000_000).max_file_bytes
    536870912

    If a file's header shows that a slow core might exceed `max_seconds`, a child process decodes
    the file. qwen_vit kills the child process at that limit. The calling process itself decodes
    every PIL image.

    The limits apply to one call. qwen_vit neither reads nor sets Pillow's process-wide
    MAX_IMAGE_PIXELS, but some of Pillow's plug-ins, for example for WebP and GIF, do read it.

    Attributes:
        max_pixels: the maximum height x width in the file's header.
        max_file_bytes: the maximum number of encoded bytes.
        max_seconds: the maximum time for decoding, in seconds.
        formats: formats of OPTIONAL_FORMATS to decode in addition to the default formats.
        allow_urls: hosts, such as "images.example.org" or "*.example.org:8443". qwen_vit fetches
            images from the web only at https:// addresses of these hosts.

    Raises:
        ArgumentError: `max_pixels` or `max_file_bytes` is not a whole number above 0, or
            `max_seconds` is not a number above 0. `formats` contains an unknown format, or
            `allow_urls` contains a value that is not the name of a host.
    """

    max_pixels: int = 178_956_970
    max_file_bytes: int = 512 * 2**20
    max_seconds: float = 60.0
    formats: tuple[str, ...] = ()
    allow_urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow_urls", check_hosts(self.allow_urls))
        object.__setattr__(self, "formats", check_formats(self.formats))
        for field in ("max_pixels", "max_file_bytes"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(
                    f"{field} is {short_repr(value)}", expected="a whole number above 0"
                )
        seconds = self.max_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise ArgumentError(
                f"max_seconds is {short_repr(seconds)}", expected="a number above 0"
            )


@dataclass(frozen=True, slots=True, eq=False)
class RgbImage:
    """Hold a loaded image. `picture` is a decoded PIL image of mode RGB. It shares no memory with
    the source, unless the caller passed `is_lent=True`.

    `format` is the format of the content ("JPEG", ..., "PIL", "array", "tensor"). `name` identifies
    the image in messages. `notes` lists remarks, such as "EXIF orientation 6 applied".
    """

    picture: Image.Image
    format: str
    name: str
    notes: tuple[str, ...]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Return a C-contiguous copy of the pixels, uint8 (height, width, 3)."""
        return np.array(self.picture)

    @property
    def height(self) -> int:
        return self.picture.height

    @property
    def width(self) -> int:
        return self.picture.width


def check_hosts(hosts: object) -> tuple[str, ...]:
    """Check host names, and return them in lower case.

    >>> check_hosts(["Images.example.org", "*.example.org:8443"])
    ('images.example.org', '*.example.org:8443')
    """
    given: Sequence[Any] = hosts if isinstance(hosts, list | tuple) else [hosts]
    for each in given:
        if not isinstance(each, str) or not HOST.fullmatch(each):
            raise ArgumentError(
                with_options("{} contains {each}", "allow_urls", each=short_repr(each)),
                expected='names of hosts, such as "images.example.org" or "*.example.org", without '
                "https:// and paths",
                remedy="download images of other hosts first, because qwen_vit reads only from "
                "public addresses",
            )
    return tuple(each.lower() for each in given)


def is_allowed_host(host: str, port: int, allowed: Sequence[str]) -> bool:
    """Return whether the allowed hosts include this host and port.

    >>> is_allowed_host("a.example.org", 443, ["*.example.org"])
    True
    >>> is_allowed_host("a.example.org", 8443, ["*.example.org"])
    False
    """
    for each in allowed:
        name, _, number = each.partition(":")
        is_name = host.endswith(name[1:]) if name.startswith("*.") else host == name
        if is_name and port == int(number or HTTPS_PORT):
            return True
    return False


def check_formats(formats: object) -> tuple[str, ...]:
    """Check names of optional formats, and return them sorted and in upper case.

    >>> check_formats(["tga", "PPM"])
    ('PPM', 'TGA')
    """
    given = [formats] if isinstance(formats, str) else formats
    try:
        names = {str(name).upper() for name in given}  # type: ignore[attr-defined]
    except TypeError:
        names = {short_repr(formats)}
    unknown = sorted(names.difference(OPTIONAL_FORMATS))
    if unknown:
        raise ArgumentError(
            with_options("{} has {names}", "formats", names=display_name(", ".join(unknown))),
            expected=f"some of {', '.join(OPTIONAL_FORMATS)}",
        )
    return tuple(sorted(names))


def check_file_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_file_bytes:
        raise ImageError(
            f"{size} bytes",
            name=name,
            expected=f"at most {limits.max_file_bytes}",
            remedy="make the image smaller, or raise ImageLimits.max_file_bytes in Python",
            code="file-too-large",
        )


def check_pixels(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(
            f"the size is {width}x{height} (width x height)",
            name=name,
            expected="sides above 0",
            remedy="omit the image",
            code="zero-side",
        )
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{width}x{height} = {width * height} pixels",
            name=name,
            expected=f"at most {limits.max_pixels}",
            remedy="make the image smaller, or raise ImageLimits.max_pixels in Python",
            code="too-many-pixels",
        )


def check_ratio(width: int, height: int, name: str) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_RATIO:
        raise ImageError(
            f"{width}x{height} (width x height), a ratio of {ratio:.6g}",
            name=name,
            expected=f"at most {MAX_RATIO}",
            remedy="crop or pad the image",
            code="ratio",
        )
