"""Open image and video paths only if they are regular files."""

import glob
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from qwen_vit.common.arguments import missing_remedy
from qwen_vit.errors import ImageError, Wording
from qwen_vit.images.image import ADDRESS
from qwen_vit.images.refusals import address_remedy

__all__ = ["open_regular", "unreadable"]


@contextmanager
def open_regular(path: str, name: str, *, expected: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading. `expected` is for the error about a directory."""
    if ADDRESS.match(path):
        raise ImageError(
            "an address, not a file", name=name[:80], remedy=address_remedy(path), code="url"
        )
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            files = f"{shlex.quote(path.rstrip('/'))}/*"
            remedy = Wording(
                "pass its files, or use export_features", shell=f"pass its files, such as {files}"
            )
            raise ImageError(
                "a directory", name=name, expected=expected, remedy=remedy, code="directory"
            )
        if not stat.S_ISREG(mode):  # a FIFO would block, a device might not end
            raise ImageError(
                "a FIFO, socket or device, which qwen_vit never opens",
                name=name,
                expected="a regular file",
                remedy="copy its content to a file",
                code="not-a-file",
            )
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        checked = missing_remedy(path)
        if glob.has_magic(path):
            remedy = Wording("pass the paths that glob.glob returns", shell=checked)
        else:
            remedy = Wording(checked, shell=checked)
        raise ImageError("does not exist", name=name, remedy=remedy, code="missing") from None
    except (OSError, ValueError) as error:
        raise unreadable(error, name) from None
    with file:
        yield file


def unreadable(error: OSError | ValueError, name: str) -> ImageError:
    if isinstance(error, ImageError):
        return error
    return ImageError(
        f"cannot be read ({getattr(error, 'strerror', None) or error})",
        name=name,
        remedy="check its path and permissions",
        code="unreadable",
    )
