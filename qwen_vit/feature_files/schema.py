"""The feature file: what is in it, and checks of what was read from one.

A feature file is one safetensors file: `image_embeds` (T, D), `image_grid_thw` (N, 3) int64 and
`image_token_offsets` (N + 1,) int64, so that image i owns rows offsets[i] : offsets[i + 1]. Its
metadata is a single key that holds sorted JSON, because safetensors writes several keys in random
order and the same features must give the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_vit.common.safetensors_header import TensorInfo
from qwen_vit.common.strict_json import check_integer, is_integer, parse_json, read_json, short_repr
from qwen_vit.errors import CheckpointError, ExportError, ImageError
from qwen_vit.features import FailedImage

__all__ = [
    "INTEGERS",
    "METADATA_KEY",
    "RESUME",
    "SCHEMA_VERSION",
    "parse_errors",
    "parse_image_facts",
    "parse_metadata",
    "read_description",
    "read_listing",
    "shard_name",
]

SCHEMA_VERSION = 1
METADATA_KEY = "qwen_vit"
INTEGERS = ("image_grid_thw", "image_token_offsets")
RESUME = "run the same `qwen-vit export` command again, which writes what is missing"


def shard_name(index: int) -> str:
    """The file of an export folder's shard.

    >>> shard_name(7)
    'shard-00000007.safetensors'
    """
    return f"shard-{index:08}.safetensors"


def parse_errors(value: Any, path: Path, remedy: str) -> Sequence[FailedImage]:
    names = {"id", "stage", "code", "message"}
    is_right = isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() == names
        and all(isinstance(text, str) for text in entry.values())
        for entry in value
    )
    if not is_right:
        raise ExportError(
            f"its errors are {short_repr(value)}",
            name=str(path),
            expected="id, stage, code and message of each",
            remedy=remedy,
        )
    return [
        FailedImage(each["id"], ImageError(each["message"], code=each["code"]), each["stage"])
        for each in value
    ]


def parse_image_facts(
    value: Any, path: Path, remedy: str
) -> Sequence[tuple[tuple[int, int], tuple[str, ...]]]:
    """What a shard tells of each image's source: its height and width, and notes."""
    try:
        facts = [(tuple(entry["size_px"]), tuple(entry["notes"])) for entry in value]
        if all(len(size) == 2 and all(map(is_integer, size)) for size, _ in facts):
            return facts
    except (KeyError, TypeError):
        pass
    raise ExportError(
        f"{path}: its images are {short_repr(value)}, expected size_px and notes of each; {remedy}"
    )


def read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExportError(
            f"{path.parent} is a folder without {path.name}, expected a folder of `qwen-vit export`"
        )
    remedy = "export into a new folder"
    try:
        description = read_json(path)
        for name in ("n_images", "shard_size"):
            check_integer(description.get(name), f"{path}: {name}", 2**63)
    except CheckpointError as error:
        raise ExportError(_without_remedy(error, remedy)) from None
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{path} has schema {version!r}, expected {SCHEMA_VERSION}; read it with the version "
            "of qwen_vit that wrote it"
        )
    return description


def _without_remedy(error: CheckpointError, remedy: str) -> str:
    """An error of the JSON reader, which speaks of downloads, with what helps here."""
    text = str(error)
    return f"{text.rpartition(';')[0] or text}; {remedy}"


def read_listing(path: Path, n_images: int) -> list[str]:
    """The ids of every image that was to be exported, in order."""
    ids: list[str] = []
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            # many lines as one array: a million in half a second, one by one in two
            while lines := list(islice(file, 4096)):
                ids += [entry["id"] for entry in json.loads(b"[%b]" % b",".join(lines))]
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read ({error.strerror}), expected an id a line; {RESUME}"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise ExportError(
            f"{path} is damaged in lines {len(ids) + 1} to {len(ids) + len(lines)}, expected an "
            f"object with an id in each; {RESUME}"
        ) from None
    distinct = {name for name in ids if isinstance(name, str)}
    if not len(distinct) == len(ids) == n_images:
        raise ExportError(
            f"{path} is damaged: {len(ids)} lines with {len(distinct)} different ids, expected "
            f"{n_images} of each, as export.json says; {RESUME}"
        )
    return ids


def parse_metadata(
    text: str, tensors: Mapping[str, TensorInfo], path: Path, remedy: str
) -> dict[str, Any]:
    """The metadata of a feature file, or ExportError where it does not fit the tensors."""
    try:
        metadata = parse_json(text.encode(), source=str(path))
    except CheckpointError as error:
        raise ExportError(_without_remedy(error, remedy)) from None
    version, ids = metadata.get("schema_version"), metadata.get("ids")
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{path} has feature schema {version!r}, expected {SCHEMA_VERSION}; read it with the "
            "version of qwen_vit that wrote it"
        )
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ExportError(f"{path}: its ids are {short_repr(ids)}, expected names; {remedy}")
    found = {name: (tensors[name].dtype, tensors[name].shape) for name in INTEGERS}
    expected = {"image_grid_thw": (len(ids), 3), "image_token_offsets": (len(ids) + 1,)}
    if len(set(ids)) < len(ids) or len(tensors["image_embeds"].shape) != 2:
        problem = f"{len(ids)} ids, {len(set(ids))} of them different; image_embeds of shape "
        problem += str(tensors["image_embeds"].shape)
    elif found != {name: ("I64", shape) for name, shape in expected.items()}:
        problem = f"{len(ids)} ids; {found}"
    else:
        return metadata
    raise ExportError(f"{path} disagrees with itself ({problem}); {remedy}")
