"""Read and check the header of a safetensors file before any library opens it.

A file is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes. The
tensors' bytes must cover the rest of the file without overlaps or gaps. The safetensors library
accepts duplicate keys, and its errors about a file's content do not name the file. The errors of
this module name the file and the remedy.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.store_path import AnyPath
from qwen_vit.common.strict_json import is_integer, parse_json
from qwen_vit.errors import CheckpointError

__all__ = [
    "DTYPE_BYTES",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "START_BYTES",
    "TensorInfo",
    "build_header",
    "header_length",
    "parse_header",
    "read_header",
]

LENGTH_BYTES = 8
START_BYTES = 64  # enough for a header's length, or to recognise another kind of file
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DOWNLOAD_AGAIN = "delete the file and download it again (qwen-vit download MODEL)"

# Files that often have the name of weights: how they start, what they are, what to do.
IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull` in its folder"),
    (b"<", "an HTML or XML page", DOWNLOAD_AGAIN),
    (b"PK\x03\x04", "a zip archive or a pickle", DOWNLOAD_AGAIN),
    (b"GGUF", "a GGUF file", "use the safetensors checkpoint it was made from"),
)

MAX_DIMENSIONS = 64  # torch's limit

# The size of a tensor of any other type is not checked.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Describe one tensor of a file: its dtype in safetensors' terms, its shape, and its byte range
    after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: AnyPath) -> dict[str, TensorInfo]:
    try:
        if not path.is_file():
            raise CheckpointError(
                "not a file",
                name=str(path),
                expected="safetensors weights",
                remedy=DOWNLOAD_AGAIN,
            )
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:  # a StorePath then reads only the header
            start = file.read(START_BYTES)
            length = header_length(start, file_bytes=size, source=str(path))
            file.seek(LENGTH_BYTES)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read ({error.strerror})",
            name=str(path),
            remedy="check its permissions and the disk",
        ) from error
    return parse_header(raw, file_bytes=size, source=str(path))


def header_length(start: bytes, *, file_bytes: int, source: str) -> int:
    """Return the length of the JSON header, from the first bytes of a file of this size.

    >>> header_length((2).to_bytes(8, "little") + b"{}", file_bytes=10, source="a.safetensors")
    2
    """
    named = f"{source} ({file_bytes} bytes)"
    for signature, what, remedy in IMPOSTORS:
        # A length's low bytes may look like text, but then the header's brace follows.
        if start.lstrip().startswith(signature) and start[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise CheckpointError(what, name=named, expected="safetensors weights", remedy=remedy)
    if file_bytes < LENGTH_BYTES:
        raise CheckpointError(
            "empty" if file_bytes == 0 else "cut short inside its first 8 bytes",
            name=named,
            expected="safetensors weights",
            remedy=DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"corrupt, or not a safetensors file: it declares a header of {length} bytes",
            name=named,
            expected=f"at most {MAX_HEADER_BYTES}",
            remedy=DOWNLOAD_AGAIN,
        )
    if length > file_bytes - LENGTH_BYTES:
        raise CheckpointError(
            f"declares a header of {length} bytes, which is larger than the file",
            name=named,
            remedy=DOWNLOAD_AGAIN,
        )
    return length


def parse_header(raw: bytes, *, file_bytes: int, source: str) -> dict[str, TensorInfo]:
    """Parse the JSON header of a file of `file_bytes` bytes, and check that its tensors cover the
    data without overlaps or gaps."""
    named = f"{source} ({file_bytes} bytes)"
    try:
        header = parse_json(raw, source=f"{named}, header")
    except CheckpointError as error:
        raise CheckpointError.of(error, remedy=DOWNLOAD_AGAIN) from None
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(name, entry, named) for name, entry in header.items()}
    _check_tiling(tensors, file_bytes - LENGTH_BYTES - len(raw), named)
    return tensors


def build_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Return the start of a file with these tensors: the length and the JSON header.

    >>> build_header({"a": TensorInfo("F32", (2,), 0, 8)})[8:].decode()
    '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    entries = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.start, info.end)}
        for name, info in tensors.items()
    }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # to align the data
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _parse_entry(name: str, entry: Any, named: str) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (
        isinstance(dtype, str)
        and _are_sizes(shape)
        and _are_sizes(offsets)
        and len(offsets) == 2
        and offsets[0] <= offsets[1]
    ):
        raise CheckpointError(
            f"the header's entry {short_repr(name)} lacks a valid dtype, shape or data_offsets",
            name=named,
            remedy=DOWNLOAD_AGAIN,
        )
    if len(shape) > MAX_DIMENSIONS:  # their product alone could take hours
        raise CheckpointError(
            f"{short_repr(name)} has {len(shape)} dimensions",
            name=named,
            expected=f"at most {MAX_DIMENSIONS}",
            remedy=DOWNLOAD_AGAIN,
        )
    start, end = offsets
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise CheckpointError(
            f"{short_repr(name)} has {end - start} bytes, but its shape {short_repr(shape)} in "
            f"{dtype} takes {short_repr(math.prod(shape) * DTYPE_BYTES[dtype])}",
            name=named,
            remedy=DOWNLOAD_AGAIN,
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(is_integer(item) and 0 <= item < 2**63 for item in value)


def _check_tiling(tensors: dict[str, TensorInfo], data_bytes: int, named: str) -> None:
    position, previous = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < position:
            raise CheckpointError(
                f"the bytes of {short_repr(previous)} and {short_repr(name)} overlap",
                name=named,
                remedy=DOWNLOAD_AGAIN,
            )
        if info.start > position:
            raise CheckpointError(
                f"{info.start - position} bytes before {short_repr(name)} belong to no tensor",
                name=named,
                expected="no hole",
                remedy=DOWNLOAD_AGAIN,
            )
        position, previous = info.end, name
    if position > data_bytes:
        raise CheckpointError(
            f"truncated: the last {position - data_bytes} bytes of the tensors are missing",
            name=named,
            remedy=DOWNLOAD_AGAIN,
        )
    if position < data_bytes:
        raise CheckpointError(
            f"the last {data_bytes - position} bytes belong to no tensor",
            name=named,
            expected="no hole",
            remedy=DOWNLOAD_AGAIN,
        )
