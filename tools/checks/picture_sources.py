"""Read the test images in the source packages of imaging libraries.

`apt-get source --download-only NAME...` downloads the packages from Debian 12.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SOURCES", "source_pictures"]

# Debian's names of the archives, without ".orig.tar".
SOURCES = (
    "exiv2_0.27.6",
    "gdk-pixbuf_2.42.10+dfsg",
    "giflib_5.2.1",
    "graphicsmagick_1.4+really1.3.40",
    "imagemagick_6.9.11.60+dfsg",
    "jhead_3.06.0.1",
    "jpeg-xl_0.7.0",
    "libgd2_2.3.3",
    "libheif_1.15.1",
    "libjpeg-turbo_2.1.5",
    "libpng1.6_1.6.39",
    "libwebp_1.2.4",
    "netpbm-free_11.01.00",
    "openjpeg2_2.5.0",
    "pillow_9.4.0",
    "tiff_4.5.0",
    "vips_8.14.1",
)
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".heic", ".heif",
)  # fmt: skip
MAX_BYTES = 2**25


def source_pictures(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield the images in a folder's archives: the package, the image's path, its bytes."""
    for package in SOURCES:
        for archive in sorted(folder.glob(f"{package}.orig.tar.*")):
            if archive.suffix != ".asc":
                yield from _images_in(package, archive)


def _images_in(package: str, archive: Path) -> Iterator[tuple[str, str, bytes]]:
    with tarfile.open(archive, "r|*") as tar:  # reads the archive as a stream
        for member in tar:
            if (
                member.isfile()
                and member.name.lower().endswith(SUFFIXES)
                and 0 < member.size < MAX_BYTES
                and (file := tar.extractfile(member)) is not None
            ):
                yield package, member.name, file.read()
