"""Check an output file before any work."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qwen_vit.common.atomic_file import cannot_write, check_utf8, refuse_link
from qwen_vit.errors import ExportError

__all__ = ["check_distinct", "check_output"]


def check_output(
    out: Path, overwrite: bool, option: str = "--out", suffix: str = ".safetensors"
) -> None:
    """Raise ExportError if the output cannot be written or would replace another file.

    >>> check_output(Path("no-such-folder/f.safetensors"), False)
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no-such-folder: not a folder. Create the folder first.

    The function accepts a name without a suffix, because only another suffix names another format.
    """
    name, remedy = str(out), f"pass another {option}"
    check_utf8(out)
    if out.suffix.lower() not in ("", suffix):
        raise ExportError(
            f"its suffix is {out.suffix}",
            name=name,
            expected=f"{suffix}",
            remedy=f"pass {option} {out.with_suffix(suffix)}",
        )
    try:
        existing, parent = _status(out), _status(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from None
    refuse_link(out)
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise ExportError("a folder", name=name, expected="a file to write", remedy=remedy)
    if parent is None or not stat.S_ISDIR(parent.st_mode):
        raise ExportError("not a folder", name=str(out.parent), remedy="create the folder first")
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


def check_distinct(images: Sequence[str]) -> None:
    """Raise ExportError if the inputs name an image twice.

    >>> check_distinct(["a.png", "b.png", "a.png"])
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: a.png: given twice. Expected each image once. Omit one of the two.
    """
    for name, count in Counter(images).most_common(1):
        if count > 1:
            raise ExportError(
                "given twice", name=name, expected="each image once", remedy="omit one of the two"
            )


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
