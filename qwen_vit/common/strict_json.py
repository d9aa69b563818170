"""Read JSON strictly."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import CheckpointError

__all__ = [
    "MAX_JSON_BYTES",
    "check_integer",
    "child_object",
    "is_integer",
    "is_number",
    "parse_json",
    "read_json",
]

DOWNLOAD_AGAIN = "download the file again"
MAX_JSON_BYTES = 64 * 2**20  # the index of the largest published model is under 1 MB


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read one JSON object from a file of at most 64 MiB."""
    try:
        if not _is_file(path):
            raise CheckpointError(
                "not a file", name=str(path), remedy="pass a folder that contains this file"
            )
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path.stat().st_size} bytes",
                name=str(path),
                expected=f"at most {MAX_JSON_BYTES}",
                remedy="download the file again",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read ({error.strerror})", name=str(path), remedy="check its permissions"
        ) from error
    return parse_json(raw, source=str(path))


def _is_file(path: AnyPath) -> bool:
    """Return whether the path is a file. Wait briefly for a file in a snapshot of the Hub's cache.

    On a disk without locks, huggingface_hub removes a link just before it creates it again.
    """
    for _ in range(5 if "snapshots" in str(path) else 0):
        if path.is_file():
            break
        time.sleep(0.02)
    return path.is_file()


def parse_json(raw: bytes, *, source: str) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, and only finite numbers.

    >>> parse_json(b'{"depth": 4}', source="config.json")
    {'depth': 4}
    """

    def refuse_constant(name: str) -> None:
        raise CheckpointError(
            f"contains {name}, which is not JSON", name=source, remedy="correct this value"
        )

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise CheckpointError(
                f"contains {short_repr(digits)}, which is too large for a float",
                name=source,
                remedy="correct this value",
            )
        return value

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(
                    f"the key {short_repr(key)} appears twice",
                    name=source,
                    expected="each key once",
                    remedy=DOWNLOAD_AGAIN,
                )
            result[key] = value
        return result

    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite
        )
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"not UTF-8 at byte {error.start} of {len(raw)}", name=source, remedy=DOWNLOAD_AGAIN
        ) from None
    except (ValueError, RecursionError) as error:
        # Python also raises ValueError for an integer of more than 4,300 digits.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"not JSON ({reason}; {len(raw)} bytes)", name=source, remedy=DOWNLOAD_AGAIN
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"the JSON is {short_repr(value)}",
            name=source,
            expected="an object",
            remedy=DOWNLOAD_AGAIN,
        )
    return value


def child_object(config: Mapping[str, Any], key: str, source: str) -> tuple[Mapping[str, Any], str]:
    """Return the object under `key`, and its name for messages."""
    value = config[key]
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{key} is {short_repr(value)}",
            name=source,
            expected="an object",
            remedy=DOWNLOAD_AGAIN,
        )
    return value, f"{source}, {key}"


def check_integer(value: object, name: str, maximum: int) -> None:
    if not is_integer(value):
        raise CheckpointError(f"{name} is {short_repr(value)}", expected="an integer")
    if not 1 <= value <= maximum:
        raise CheckpointError(f"{name} is {short_repr(value)}", expected=f"1 to {maximum}")


def is_integer(value: object) -> TypeGuard[int]:
    """True and 1.0 are not integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is an integer or a float, from -1e12 to 1e12. True is not a number."""
    return (isinstance(value, float) or is_integer(value)) and -1e12 <= value <= 1e12
