"""Check inputs and output files before any work."""

import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_vit.common.atomic_file import cannot_write, check_parent, check_utf8, refuse_protected
from qwen_vit.errors import ArgumentError, ExportError, plural

if TYPE_CHECKING:
    from qwen_vit.inputs.listing import Item

__all__ = [
    "check_distinct", "check_model_or_features", "check_not_input", "check_not_weights",
    "check_one_picture", "check_output", "check_paths",
]  # fmt: skip

MAX_SPACES = 8  # in a path that the shell may have split
NUMBERS = re.compile(r"\d+(,\d+)*")
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf")


def check_output(
    out: Path, overwrite: bool, option: str = "--out", suffix: str = ".safetensors"
) -> None:
    """Raise ExportError if the output cannot be written, or exists and `overwrite` is False.

    >>> check_output(Path("no-such-folder/f.safetensors"), False)
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no-such-folder: does not exist. Create the folder first.

    A name without a suffix is valid. A suffix other than `suffix` is an error, because it names a
    different format.
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
        existing = _status(out)
        check_parent(out)
    except OSError as error:
        raise cannot_write(out, error) from None
    refuse_protected(out)
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise ExportError("a folder", name=name, expected="a file to write", remedy=remedy)
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


def check_not_input(out: Path, inputs: Iterable[str]) -> None:
    """Raise ExportError if an output would replace one of the inputs."""
    if any(_is_same(each, out) for each in inputs):
        raise ExportError("one of the input images", name=str(out), remedy="pass another --out")


def check_not_weights(out: Path, model: str | None, option: str = "--out") -> None:
    """Raise ExportError if an output would replace a file in the folder of the model."""
    if model is not None and out.exists() and _is_same(model, out.absolute().parent):
        raise ExportError(
            "a file in the folder of the model", name=str(out), remedy=f"pass another {option}"
        )


def _is_same(path: str, out: Path) -> bool:
    try:
        return os.path.samefile(path, out)
    except (OSError, ValueError):  # one of them does not exist
        return False


def check_one_picture(out: Path, n_images: int) -> None:
    """Raise ArgumentError if an output is one picture, and there are several images.

    >>> check_one_picture(Path("cats.png"), 2)
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: --out cats.png names one picture, but there are 2 images. \
Expected a page (.html) or a folder. Pass --out cats.html.
    """
    if n_images > 1 and out.suffix.lower() == ".png" and not out.is_dir():
        raise ArgumentError(
            f"--out {out} names one picture, but there are {plural(n_images, 'image')}",
            expected="a page (.html) or a folder",
            remedy=f"pass --out {out.with_suffix('.html')}",
        )


def check_distinct(images: Sequence[str], items: "Sequence[Item]" = ()) -> None:
    """Raise ExportError if the inputs name an image twice.

    >>> check_distinct(["a.png", "b.png", "a.png"])
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: a.png: given twice. Expected each image once. Omit one of the two.

    With the images' `items`, the error also names the source of each duplicate, such as the line of
    a list or the row of a table.
    """
    from qwen_vit.inputs.listing import same_id

    for name, count in Counter(images).most_common(1):
        if count == 1:
            return
        same = [item for item in items if item.id == name][:2]
        files = {os.path.realpath(item.source) for item in same}
        is_found = any(item.listed_at or not item.is_file for item in same)  # in a list or tar
        if is_found or len(files) > 1:
            raise same_id(same[1], same[0])
        raise ExportError(
            "given twice", name=name, expected="each image once", remedy="omit one of the two"
        )


def check_paths(inputs: Sequence[str], *, must_exist: bool = False) -> None:
    """Raise ArgumentError if the shell split a path, or the numbers of --layers, at spaces.

    With `must_exist`, also raise ExportError if no input exists.

    >>> check_paths(["no/such/a.png"], must_exist=True)
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no/such/a.png: does not exist. Check the path.
    """
    from qwen_vit.images.image import ADDRESS
    from qwen_vit.inputs.find import check_inputs, is_missing

    for given in inputs:
        _refuse_ec_cache(given)
    missing = [
        index
        for index, given in enumerate(inputs)
        if is_missing(given) and not ADDRESS.match(given)
    ]
    for index, before, after in product(missing, range(MAX_SPACES), range(MAX_SPACES)):
        path = " ".join(inputs[max(0, index - before) : index + after + 1])
        if path != inputs[index] and os.path.lexists(path):
            raise ArgumentError(
                "the shell split this path at its spaces",
                name=path,
                remedy=f"put the path in quotes: {shlex.quote(path)}",
            )
    numbers = [inputs[index] for index in missing if NUMBERS.fullmatch(inputs[index])]
    if numbers and _has_layers():
        raise ArgumentError(
            "does not exist",
            name=numbers[0],
            remedy="check the path, or separate the blocks of --layers with commas: --layers 1,3",
        )
    if must_exist and missing and len(missing) == len(inputs):
        check_inputs(inputs[:1])


def check_model_or_features(path: str, subfolder: str | None = None) -> None:
    """Raise ArgumentError for a file or a folder that cannot be a checkpoint or features.

    >>> check_model_or_features("tests/photographs")
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: tests/photographs: a folder with neither a checkpoint nor an \
export. Expected config.json and model.safetensors, or export.json of `qwen-vit export`. Pass \
another folder.
    """
    from qwen_vit.inputs.tars import MEDIA_SUFFIXES

    _refuse_ec_cache(path)
    folder = Path(path, subfolder or "")
    with suppress(OSError):  # the caller's functions report these errors
        if os.path.isfile(path) and not path.lower().endswith(MODEL_SUFFIXES):
            raise ArgumentError(
                "a file, but not a feature file",
                name=path,
                expected="a checkpoint, a feature file (.safetensors) or an export's folder",
                remedy=f"to count an image's tokens, run `qwen-vit info MODEL --image "
                f"{shlex.quote(path)}`"
                if path.lower().endswith(MEDIA_SUFFIXES)
                else "pass another path",
            )
        if folder.is_dir() and not any(
            each.name.endswith(MODEL_SUFFIXES)
            for pattern in ("*", "*/config.json")
            for each in folder.glob(pattern)
        ):
            raise ArgumentError(
                "a folder with neither a checkpoint nor an export",
                name=str(folder),
                expected="config.json and model.safetensors, or export.json of `qwen-vit export`",
                remedy="pass another folder",
            )


def _has_layers() -> bool:
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.params.get("layers"))


def _refuse_ec_cache(path: str) -> None:
    if os.path.isdir(os.path.join(path, "index")):
        from qwen_vit.export.ec_cache import is_ec_cache

        if is_ec_cache(path):
            raise ArgumentError(
                "an encoder cache of vLLM",
                name=path,
                expected="images, features or a checkpoint",
                remedy="open it in Python with read_ec_cache",
            )


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
