"""Read lists of images: .txt or .lst with one path per line, or .jsonl with one object per line."""

import codecs
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from errno import ENAMETOOLONG, ENOENT, ENOTDIR
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.storage import is_remote
from qwen_vit.common.strict_json import is_integer, parse_json
from qwen_vit.errors import IMAGE_CODES, CheckpointError, ExportError, ImageError, display_name
from qwen_vit.images.image import ADDRESS
from qwen_vit.images.lookalikes import JSON_SUFFIX, LIST_SUFFIXES
from qwen_vit.inputs.listing import MAX_NAME_BYTES, Item
from qwen_vit.inputs.remote import below, open_input, refuse

__all__ = ["JSON_SUFFIX", "LIST_SUFFIXES", "json_list_items", "stdin_items", "text_list_items"]

logger = logging.getLogger("qwen_vit")

MAX_FILE = 2**63 - 1  # bytes
CORRECT = "correct that line"


def text_list_items(path: str) -> Iterator[Item]:
    """Yield the images of a list. Warn if no image exists, because the file may be another text."""
    is_empty, exists = True, False
    for number, line in _lines(path):
        name = _path_in(line, path, number)
        item = _listed(path, name, name)
        is_empty = False
        exists = exists or bool(ADDRESS.match(item.source)) or not _is_absent(item.source)
        yield item
    if not (is_empty or exists):
        logger.warning(
            "%s: read as a list of paths, but no line names an existing file; if it is not a list, "
            "omit it",
            display_name(path),
        )


def _is_absent(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:  # a file in a folder without permission may exist
        return error.errno in (ENOENT, ENOTDIR, ENAMETOOLONG)
    return False


def stdin_items() -> Iterator[Item]:
    """Yield the images of a list on standard input. Paths are relative to the current folder."""
    if sys.stdin is None:  # the caller started this process without one
        raise ExportError("closed", name="standard input", remedy="pipe a list of paths into it")
    for number, line in _bounded_lines(sys.stdin.buffer, "standard input"):
        if line.strip():
            path = _path_in(line.rstrip(b"\r\n"), "standard input", number)
            yield Item(path, path if ADDRESS.match(path) else str(Path(path).absolute()))


def _path_in(line: bytes, name: str, number: int) -> str:
    if b"\0" in line:
        raise ExportError(
            f"line {number} contains a NUL byte",
            name=name,
            expected="one path in each line",
            remedy="write the list without NUL bytes, for example with find -print",
        )
    return os.fsdecode(line)


def json_list_items(path: str) -> Iterator[Item]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            facts = parse_json(line, source=where)
        except CheckpointError as error:
            raise ExportError.of(error, remedy=CORRECT) from None
        name, source = _name_and_source(facts, where)
        offset, size = facts.get("offset"), facts.get("size")
        if offset is not None and not (
            is_integer(offset)
            and is_integer(size)
            and min(offset, size) >= 0
            and offset + size <= MAX_FILE
        ):
            raise ExportError(
                f"offset is {short_repr(offset)} and size {short_repr(size)}",
                name=where,
                expected="an offset and a size in a tar, in bytes",
                remedy=CORRECT,
            )
        row, column = facts.get("row"), facts.get("column")
        if row is not None and not (
            is_integer(row) and 0 <= row <= MAX_FILE and _is_name(column) and offset is None
        ):
            raise ExportError(
                f"row is {short_repr(row)} and column {short_repr(column)}",
                name=where,
                expected="a row of a Parquet file, counted from 0, and the name of a column",
                remedy=CORRECT,
            )
        page = facts.get("page")
        if page is not None and not (is_integer(page) and page >= 1):
            raise ExportError(
                f"page is {short_repr(page)}",
                name=where,
                expected="a page of an image, counted from 1",
                remedy=CORRECT,
            )
        item = _listed(path, name, source, offset, size, _failure(facts.get("error")))
        version, header = facts.get("version"), facts.get("header")
        yield replace(
            item,
            row=row,
            column=None if row is None else column,
            page=page,
            version=version if isinstance(version, str) else None,
            header=header if isinstance(header, str) and offset is not None else None,
            listed_at=where,
        )


def _name_and_source(facts: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Return a line's id and path. Without an id in the line, the id is the path."""
    source = facts.get("path", facts.get("source"))
    name = facts.get("id", source)
    if source is None:
        has = ", ".join(map(short_repr, facts)) or "no key"
        raise ExportError(
            f'"path" is missing, and the line has {has}',
            name=where,
            expected='for example {"id": "cat", "path": "images/cat.jpg"}',
            remedy=CORRECT,
        )
    if _is_name(source) and _is_name(name):
        return name, source
    given = {"path" if "path" in facts else "source": source, "id": name}
    wrong, value = next((key, value) for key, value in given.items() if not _is_name(value))
    raise ExportError(
        f"{wrong} is {short_repr(value)}",
        name=where,
        expected='text in quotes, as in {"id": "cat", "path": "images/cat.jpg"}',
        remedy=CORRECT,
    )


def _is_name(value: object) -> TypeGuard[str]:
    """Return whether a value is a string that can be a file name. Surrogate escapes may stand for
    bytes that are not UTF-8."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, each with its number from 1, without a byte order
    mark."""
    try:
        with open_input(path, path, "a list") as file:
            for number, line in _bounded_lines(file, path):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ExportError(
                            "is UTF-16", name=path, expected="UTF-8", remedy="save it as UTF-8"
                        )
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except ImageError as error:
        raise ExportError.of(error) from None
    except OSError as error:
        if is_remote(path):
            raise refuse(path, error) from None
        raise ExportError(
            f"cannot be read ({error.strerror})", name=path, remedy="check its permissions"
        ) from None


def _bounded_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines, each with its number from 1. Raises ExportError for a line of more than
    MAX_NAME_BYTES."""
    for number in count(1):
        line = file.readline(MAX_NAME_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_NAME_BYTES:
            raise ExportError(
                f"line {number} has more than {MAX_NAME_BYTES} bytes",
                name=name,
                expected="a path or a JSON object in each line",
                remedy="check that the file is a list",
            )
        yield number, line


def _listed(
    path: str,
    name: str,
    source: str,
    offset: int | None = None,
    size: int | None = None,
    error: tuple[str, str] | None = None,
) -> Item:
    if is_remote(path) and not ADDRESS.match(source):
        source = below(path, source)
    elif not ADDRESS.match(source):  # reading an address reports the problem
        source = str(Path(path).parent / source)
    return Item(name, source, offset, size, error)


def _failure(error: object) -> tuple[str, str] | None:
    """Return the error that a listing of an export recorded. Return None if the value is not a pair
    of a code in IMAGE_CODES and a message."""
    if not isinstance(error, list) or len(error) != 2:
        return None
    code, message = error
    is_ours = isinstance(code, str) and code in IMAGE_CODES and isinstance(message, str)
    return (code, message) if is_ours else None
