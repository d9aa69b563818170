"""The feature file and the export folder: what they hold, and checks of what was read from them.

A feature file is one safetensors file: `image_embeds` (T, D), `image_grid_thw` (N, 3) int64 and
`image_token_offsets` (N + 1,) int64, so that image i owns rows offsets[i] : offsets[i + 1]. Its
metadata is a single key that holds sorted JSON, because safetensors writes several keys in random
order and the same features must give the same bytes.

An export folder holds `export.json`, `listing.jsonl` (one id per line) and a feature file, called a
shard, for every `shard_size` lines of the listing. A shard also names the images that failed, with
the reason.
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
LINES_AT_ONCE = 4_096  # of a listing, parsed as one array: 1e6 lines take 0.5 s, one by one 2 s
EXPORT_ELSEWHERE = "export into a new folder"
RESUME = "run the same `qwen-vit export` command again to write what is missing"
OTHER_SCHEMA = "read it with the version of qwen_vit that wrote it"


def shard_name(index: int) -> str:
    """The file of an export folder's shard.

    >>> shard_name(7)
    'shard-00000007.safetensors'
    """
    return f"shard-{index:08}.safetensors"


def parse_metadata(
    text: str, tensors: Mapping[str, TensorInfo], path: Path, remedy: str
) -> dict[str, Any]:
    """The metadata of a feature file that holds `tensors`.

    Raises ExportError, with the remedy, for a text that is not JSON or does not fit the tensors.
    """
    try:
        metadata = parse_json(text.encode(), source=str(path))
    except CheckpointError as error:  # its own remedy is to download a checkpoint's file again
        raise ExportError.of(error, name=str(path), remedy=remedy) from None
    ids = metadata.get("ids")
    _check_schema_version(metadata, path)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ExportError(
            f"its ids are {short_repr(ids)}",
            name=str(path),
            expected="a list of names",
            remedy=remedy,
        )
    found = {name: (tensors[name].dtype, tensors[name].shape) for name in INTEGERS}
    expected = {"image_grid_thw": (len(ids), 3), "image_token_offsets": (len(ids) + 1,)}
    if len(set(ids)) < len(ids) or len(tensors["image_embeds"].shape) != 2:
        problem = f"{len(ids)} ids, {len(set(ids))} of them different; image_embeds of shape "
        problem += str(tensors["image_embeds"].shape)
    elif found != {name: ("I64", shape) for name, shape in expected.items()}:
        problem = f"{len(ids)} ids; {found}"
    else:
        return metadata
    raise ExportError(f"corrupt ({problem})", name=str(path), remedy=remedy)


def parse_errors(value: Any, path: Path, remedy: str) -> Sequence[FailedImage]:
    """A shard's failed images. Raises ExportError, with the remedy, for anything else."""
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
    """The original size and the notes of each image of a shard.

    Raises ExportError, with the remedy, for anything else.
    """
    try:
        facts = [(tuple(entry["size_px"]), tuple(entry["notes"])) for entry in value]
        if all(len(size) == 2 and all(map(is_integer, size)) for size, _ in facts):
            return facts
    except (KeyError, TypeError):
        pass
    raise ExportError(
        f"its images are {short_repr(value)}",
        name=str(path),
        expected="size_px and notes of each",
        remedy=remedy,
    )


def read_description(path: Path) -> dict[str, Any]:
    """An export's settings, from its `export.json`.

    Raises ExportError, naming the file, for one that is missing, corrupt or of another schema.
    """
    if not path.is_file():
        raise ExportError(
            f"a folder without {path.name}",
            name=str(path.parent),
            expected="a folder of `qwen-vit export`",
        )
    try:
        description = read_json(path)
        for name in ("n_images", "shard_size"):
            check_integer(description.get(name), name, 2**63)
    except CheckpointError as error:  # its own remedy is to download a checkpoint's file again
        raise ExportError.of(error, name=str(path), remedy=EXPORT_ELSEWHERE) from None
    _check_schema_version(description, path)
    return description


def read_listing(path: Path, n_images: int) -> list[str]:
    """The ids of every image of an export, in order, from its `listing.jsonl`.

    Raises ExportError, naming the lines, unless it holds `n_images` different ids.
    """
    ids: list[str] = []
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            while lines := list(islice(file, LINES_AT_ONCE)):
                ids += [entry["id"] for entry in json.loads(b"[%b]" % b",".join(lines))]
    except OSError as error:
        raise ExportError(
            f"cannot be read ({error.strerror})",
            name=str(path),
            expected="one id per line",
            remedy=RESUME,
        ) from None
    except (ValueError, TypeError, KeyError):
        raise ExportError(
            f"corrupt in lines {len(ids) + 1} to {len(ids) + len(lines)}",
            name=str(path),
            expected="an object with an id in each",
            remedy=RESUME,
        ) from None
    distinct = {name for name in ids if isinstance(name, str)}
    if not len(distinct) == len(ids) == n_images:
        raise ExportError(
            f"corrupt: {len(ids)} lines with {len(distinct)} different ids",
            name=str(path),
            expected=f"{n_images} of each, as export.json says",
            remedy=RESUME,
        )
    return ids


def _check_schema_version(facts: Mapping[str, Any], path: Path) -> None:
    version = facts.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"its schema version is {version!r}",
            name=str(path),
            expected=str(SCHEMA_VERSION),
            remedy=OTHER_SCHEMA,
        )
