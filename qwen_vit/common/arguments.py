"""Check the types of arguments, and describe wrong values in errors."""

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from qwen_vit.errors import ArgumentError

__all__ = [
    "check_choice", "check_local_path", "check_ordered", "check_path", "check_paths",
    "is_address", "missing_remedy", "short_repr", "typed_repr",
]  # fmt: skip

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def check_path(name: str, value: str | os.PathLike[str], expected: str) -> str:
    """Return a path as text, or raise ArgumentError for another value or an empty text.

    >>> check_path("path", None, "a file to write")
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: path is None. Expected a file to write.
    """
    if not isinstance(value, (str, os.PathLike)) or value == "":
        raise ArgumentError(f"{name} is {typed_repr(value)}", expected=expected)
    return os.fspath(value)


def check_local_path(name: str, value: str | os.PathLike[str], expected: str) -> Path:
    """Return a path on this machine. Raise ArgumentError for an address or any other value.

    >>> check_local_path("path", "s3://bucket/table.parquet", "the file to write")
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: s3://bucket/table.parquet: path is an address. Expected the \
file to write, on this machine.
    """
    path = check_path(name, value, expected)
    if is_address(path):
        raise ArgumentError(
            f"{name} is an address", name=path, expected=f"{expected}, on this machine"
        )
    return Path(path)


def is_address(path: str) -> bool:
    """Return whether a text begins with a scheme, such as "s3://" or "https://".

    >>> is_address("s3://bucket/a.jpg"), is_address("folder/a.jpg")
    (True, False)
    """
    return ADDRESS.match(path) is not None


def check_paths(
    name: str, value: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
) -> list[str]:
    """Return paths as text. Raise ArgumentError for any other value.

    >>> check_paths("images", "a.jpg"), check_paths("images", ["a.jpg", "b.jpg"])
    (['a.jpg'], ['a.jpg', 'b.jpg'])
    """
    check_ordered(name, value)
    if isinstance(value, (str, os.PathLike)):
        value = [value]
    if not isinstance(value, Iterable):
        raise ArgumentError(f"{name} is {typed_repr(value)}", expected="paths")
    return [check_path(f"an item of {name}", path, "a path") for path in value]


def check_ordered(name: str, value: object) -> None:
    """Raise ArgumentError for a set, whose order is arbitrary, or a table, whose items are names.

    >>> check_ordered("images", {"a.jpg"})
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: images is a set, whose order is arbitrary. Expected a list.
    """
    if isinstance(value, set | frozenset):
        raise ArgumentError(f"{name} is a set, whose order is arbitrary", expected="a list")
    if type(value).__name__ == "DataFrame":
        raise ArgumentError(f"{name} is a DataFrame", expected="a list", remedy="pass one column")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ArgumentError for a value outside the choices.

    >>> check_choice("output", "tokens", ("merged", "patch"))
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: output is 'tokens'. Expected 'merged' or 'patch'.
    """
    if not isinstance(value, Hashable) or value not in choices:  # NumPy compares an array's items
        *most, last = map(repr, choices)
        raise ArgumentError(
            f"{name} is {short_repr(value)}",
            expected=f"{', '.join(most)} or {last}" if most else last,
        )


def missing_remedy(path: str | os.PathLike[str], remedy: str = "check the path") -> str:
    """Return `remedy` for a path that does not exist, or how to write a path that begins with ~.

    >>> missing_remedy("a.jpg")
    'check the path'
    >>> missing_remedy("~root/a.jpg")
    'write the path without ~: /root/a.jpg'
    """
    full = os.path.expanduser(path)
    return remedy if full == os.fspath(path) else f"write the path without ~: {full}"


def typed_repr(value: object) -> str:
    """Return a value and its type for an error.

    >>> typed_repr(3), typed_repr("3"), typed_repr(None)
    ('3 (int)', "'3'", 'None')
    """
    text = short_repr(value)
    return text if value is None or isinstance(value, str) else f"{text} ({type(value).__name__})"


def short_repr(value: object) -> str:
    """Return a value as text of at most 60 characters.

    >>> short_repr([0] * 100)
    '[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python cannot print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
