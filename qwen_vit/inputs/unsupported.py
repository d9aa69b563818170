"""Build the errors for inputs that contain no image."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import TO_ENCODE, ExportError, Wording, display_name, with_options
from qwen_vit.inputs.lists import JSON_SUFFIX, LIST_SUFFIXES
from qwen_vit.inputs.parquet import PARQUET_SUFFIX
from qwen_vit.inputs.suffixes import suffix_of
from qwen_vit.inputs.tars import DEFAULT_SUFFIXES, TAR_SUFFIX

__all__ = ["NOT_IMAGES", "STDIN", "no_image_found", "not_images"]

STDIN = "-"  # reads a list of paths from standard input
NOT_IMAGES = {
    ".csv": "a CSV table", ".json": "a JSON file", ".pdf": "a PDF document", ".tsv": "a TSV table",
    ".xml": "an XML document", ".yaml": "a YAML file", ".yml": "a YAML file",
    ".zip": "a ZIP archive",
}  # fmt: skip


def no_image_found(inputs: Sequence[str], left_out: Counter[str]) -> ExportError:
    named = ", ".join("standard input" if each == STDIN else display_name(each) for each in inputs)
    has_parquet = left_out[PARQUET_SUFFIX] > 0
    lists = (*LIST_SUFFIXES, JSON_SUFFIX)
    if all(given == STDIN or given.lower().endswith(lists) for given in inputs):
        return ExportError(
            f"no image found in {named}",
            expected="a path or a JSON object in each line",
            remedy="check that the list is not empty",
        )
    if all(given.lower().endswith(PARQUET_SUFFIX) for given in inputs) and not left_out:
        return ExportError(
            f"no image found in {named}",
            expected="a table with rows",
            remedy="check that the table is not empty",
        )
    exports = [each for each in inputs if os.path.isfile(os.path.join(each, "export.json"))]
    if exports:
        return ExportError(
            "an export, without images",
            name=exports[0],
            expected="images",
            remedy=Wording(
                "to resume the export, call export_features with inputs=None and this folder",
                shell=f"to resume the export, run `qwen-vit export --resume "
                f"{shlex.quote(exports[0])}`",
            ),
        )
    if all(map(is_remote, inputs)) and not left_out:
        return ExportError(
            f"no object found below {named}",
            remedy="check the address",
        )
    return ExportError(
        f"no image found in {named}",
        expected=f"a file with one of these extensions: {', '.join(DEFAULT_SUFFIXES)}",
        remedy=with_options("to read Parquet files, pass {}", "column") + TO_ENCODE
        if has_parquet
        else "unpack the tars that are inside a tar"
        if left_out[TAR_SUFFIX]
        else "check the inputs",
    )


def not_images(path: str) -> ExportError:
    """Return the error for a file whose extension is in NOT_IMAGES.

    >>> print(not_images("a.zip"))
    a.zip: a ZIP archive, not an image. Expected images, folders, tars or lists. Unpack it, and \
pass the folder.
    """
    suffix = suffix_of(path)
    remedies = {
        ".zip": "unpack it, and pass the folder",
        ".pdf": "render its pages to PNG first",
    }
    a_list = (
        'pass a list as .txt with one path per line, or as .jsonl with an "id" and a "path" '
        "per line"
    )
    return ExportError(
        f"{NOT_IMAGES[suffix]}, not an image",
        name=path,
        expected="images, folders, tars or lists",
        remedy=remedies.get(suffix, a_list),
    )
