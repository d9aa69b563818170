"""Checks of an output file before any work."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from qwen_vit.common.atomic_file import cannot_write, check_utf8, refuse_link
from qwen_vit.errors import ExportError

__all__ = ["check_output"]


def check_output(out: Path, overwrite: bool, images: Sequence[str], option: str = "--out") -> None:
    """Raise ExportError for an output that could not be written, or would replace something else.

    >>> check_output(Path("no-such-folder/f.safetensors"), False, ["a.png"])
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no-such-folder: not a folder. Create it first.
    """
    name, remedy = str(out), f"pass another {option}"
    check_utf8(out)
    try:
        existing, parent = _status(out), _status(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from None
    refuse_link(out)
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise ExportError("a folder", name=name, expected="a file to write", remedy=remedy)
    if parent is None or not stat.S_ISDIR(parent.st_mode):
        raise ExportError("not a folder", name=str(out.parent), remedy="create it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise ExportError("not writable", name=str(out.parent), remedy="check its permissions")
    if existing is not None and not stat.S_ISREG(existing.st_mode):
        raise ExportError("not a regular file", name=name, expected="a file", remedy=remedy)
    if existing is not None and not overwrite:
        raise ExportError(
            "already exists",
            name=name,
            remedy=f"pass --overwrite to replace it, or another {option}",
        )
    if existing is not None and any(_is_same(image, existing) for image in images):
        raise ExportError("one of the images", name=name, remedy=remedy)
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise ExportError(
            "given twice", name=twice, expected="each image once", remedy="leave one out"
        )


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_same(image: str, existing: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(image), existing)
    except OSError:  # reading it reports why
        return False
