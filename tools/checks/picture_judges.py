"""Open pictures with Pillow, libvips and their format's own tools, and collect the warnings."""

import io
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pillow_heif
from PIL import Image

__all__ = ["judge"]

OWN_TOOLS = {  # the tools of each format's library
    "JPEG": ["djpeg", "-strict", "-outfile", "/dev/null"],
    "MPO": ["djpeg", "-strict", "-outfile", "/dev/null"],
    "PNG": ["pngcheck", "-q"],
    "WEBP": ["webpinfo", "-quiet", "-diag"],
    "GIF": ["giftext"],
    "BMP": ["bmptopnm", "-quiet"],
    "TIFF": ["tiffinfo", "-D"],
    "AVIF": ["avifdec", "--info"],
    "HEIF": ["heif-info"],
}
# warnings about data outside the pixels
ASIDE = re.compile(
    r"ignoring nclx profile|iCCP: |tEXt text contains|nknown field with tag"
    r"|incorrect count for field|Wrong data type \d+ for .*tag ignored|tags are not sorted"
)
LIMITED = ["prlimit", "--cpu=20", f"--as={2**32}"]  # limits for hostile images
CANNOT_READ = re.compile(  # a limitation of libvips or tiffinfo
    r"is not a known file format|images not supported|Cannot display data"
)


def judge(data: bytes) -> str:
    """Return the first warning of a judge, after the judge's name, or "" without a warning. The
    judges are Pillow, libvips and the installed tools of the format's own library.
    """
    file_format, warning = _by_pillow(data)
    if warning:
        return f"Pillow: {warning}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"picture.{file_format.lower()}")
        path.write_bytes(data)
        for command in _commands(file_format, path, folder):
            if shutil.which(command[0]) and (warning := _warning_of(command)):
                return f"{command[0]}: {warning.replace(str(path), 'it')[:200]}"
    return ""


def _warning_of(command: list[str]) -> str:
    done = subprocess.run([*LIMITED, *command], capture_output=True, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    if any(map(CANNOT_READ.search, lines)):
        return ""
    if done.returncode and not lines:
        lines = done.stdout.decode(errors="replace").splitlines() or [f"exit {done.returncode}"]
    return " ".join(line for line in lines if not ASIDE.search(line)).strip()


def _by_pillow(data: bytes) -> tuple[str, str]:
    file_format = ""
    pillow_heif.register_heif_opener()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = Image.open(io.BytesIO(data))
            file_format = image.format or ""
            image.load()
        except Exception as error:  # noqa: BLE001 - plug-ins raise anything
            return file_format, f"{type(error).__name__}: {error}"[:200]
    texts = (str(each.message)[:200] for each in caught)
    ignored = re.compile("^$" if file_format == "TIFF" else "Skipping tag")  # an Exif warning
    return file_format, next((text for text in texts if not ignored.search(text)), "")


def _commands(file_format: str, path: Path, folder: str) -> Iterator[list[str]]:
    yield ["vips", "avg", f"{path}[fail_on=warning]"]
    if file_format in OWN_TOOLS:
        yield [*OWN_TOOLS[file_format], str(path)]
    if file_format == "WEBP":
        yield ["dwebp", "-quiet", str(path), "-o", "/dev/null"]
    if file_format == "TIFF":
        yield ["tiffcp", "-c", "none", str(path), f"{folder}/out.tiff"]
