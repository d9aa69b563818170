"""Define the format of feature files and export folders, and check their content.

A feature file is one safetensors file. The file contains `image_embeds` (T, D), `image_grid_thw`
(N, 3) int64 and `image_token_offsets` (N + 1,) int64. Image i has the rows offsets[i] : offsets[i +
1]. Each block k of `layers` adds `layer_k` (P, C), with a row for each patch of all images. The
metadata is a single key with sorted JSON, because the same features must give the same
bytes, and safetensors would write several keys in random order.

Every file of schema 2 has the keys of `FILE_FACTS`. The list `images` contains an object for each
image, with the keys of `ItemFacts.to_json`. A value that does not apply or is unknown is null.
`rows_sha256` contains a sha256 for each tensor of rows: the hash of the image's own stored rows.

An export folder contains `export.json`, `listing.jsonl` (one id per line) and feature files called
shards. Each shard covers `shard_size` lines of a listing, and the last shard covers the rest. A
shard also names failed images, with the reasons. Extensions of an export add listings in
`listing-0001.jsonl` and so on. The shards of a listing follow the shards of the previous listing.
An image belongs to the last listing that contains it, unless a later listing withdraws it.

Schema 1 had no layers. Only shards described images, with `size_px`, `notes`, `sha256` and
`source`. qwen_vit still reads schema 1.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, get_args

from torch import Tensor

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.safetensors_header import TensorInfo
from qwen_vit.common.store_path import AnyPath
from qwen_vit.common.strict_json import check_integer, is_integer, is_number, parse_json, read_json
from qwen_vit.errors import CheckpointError, ExportError, ImageError, UnreadableError
from qwen_vit.features import UNKNOWN_SIZE, FailedImage, FeatureOutput, ImageFeatures

__all__ = [
    "EMBEDS",
    "FILE_FACTS",
    "INTEGERS",
    "METADATA_KEY",
    "READABLE",
    "RESTORE",
    "RESUME",
    "REWRITE_SHARD",
    "SCHEMA_VERSION",
    "SHARD",
    "ItemFacts",
    "RowFacts",
    "StoredFacts",
    "check_description",
    "layer_name",
    "n_bytes_of",
    "parse_errors",
    "parse_image_facts",
    "parse_metadata",
    "parse_row_facts",
    "read_description",
    "read_listing",
    "rows_by_tensor",
    "shard_name",
]

SCHEMA_VERSION = 2
READABLE = (1, 2)  # schema versions
METADATA_KEY = "qwen_vit"
EMBEDS = "image_embeds"
INTEGERS = ("image_grid_thw", "image_token_offsets")
ROW_DTYPES = ("BF16", "F16", "F32", "F64")  # safetensors' own names
LINES_AT_ONCE = 4_096  # of a listing, parsed as one array: 1e6 lines take 0.5 s, one by one 2 s
SHARD = re.compile(r"shard-(\d{8})\.safetensors")
RESUME = "run the same `qwen-vit export` command again to write what is missing"
REWRITE_SHARD = "delete the shard, and run the same `qwen-vit export` command again"
RESTORE = (
    "run the original `qwen-vit export` command with its inputs and options, which restores "
    "export.json"
)
OTHER_SCHEMA = "read it with the version of qwen_vit that wrote it"


# The keys of a file's metadata, except `ids`, `images` and `schema_version`.
FILE_FACTS = (
    # what made the features: `VisionEncoder.metadata()`
    *("model", "commit", "weights_sha256", "config_sha256", "versions", "device", "gpu"),
    *("quantization", "image_policy"),
    # which rows they are, the dtype of the computation, and the dtype of the stored rows
    *("output", "normalize", "layers", "patches_per_row", "computed_in", "dtype"),
    # of an export
    *("n_images", "listing_sha256", "shard_size", "limits", "errors"),
)


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """Describe one image or video of a file, apart from its rows. None means unknown.

    Attributes:
        n_rows: the number of the image's rows in `image_embeds`.
        size_px: the original (height, width).
        notes: the changes that the image policy made.
        sha256: the hash of the image's or video's encoded bytes.
        source: the path or address from which an export read the image.
        exif: the loader's EXIF policy, "apply" or "ignore".
        second_per_grid_t: for a video, the seconds per time step of the grid.
        frame_seconds: for a video, the times of its frames, in seconds.
    """

    id: str
    grid_thw: tuple[int, int, int]
    n_rows: int
    size_px: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    source: str | None = None
    kind: str = "image"
    exif: str | None = None
    second_per_grid_t: float | None = None
    frame_seconds: tuple[float, ...] | None = None

    def rows_of(self, tensor: str) -> int:
        return self.n_rows if tensor == EMBEDS else math.prod(self.grid_thw)

    def to_json(self, rows_sha256: Mapping[str, str]) -> dict[str, Any]:
        """Return the image's entry in `images`, without its id, grid and row count."""
        return {
            "exif": self.exif,
            "frame_seconds": self.frame_seconds,
            "kind": self.kind,
            "notes": self.notes,
            "rows_sha256": dict(rows_sha256),
            "second_per_grid_t": self.second_per_grid_t,
            "sha256": self.sha256,
            "size_px": self.size_px,
            "source": self.source,
        }


def layer_name(block: int) -> str:
    """Return the name of the tensor with a block's rows.

    >>> layer_name(7)
    'layer_7'
    """
    return f"layer_{block}"


def rows_by_tensor(features: ImageFeatures) -> dict[str, Tensor]:
    """Return an image's rows by tensor name, with the layers in the order of their names.

    >>> import torch
    >>> embeds, rows = torch.ones(1, 8), torch.ones(4, 6)
    >>> list(rows_by_tensor(ImageFeatures("a", embeds, (1, 2, 2), layers={7: rows, 15: rows})))
    ['image_embeds', 'layer_15', 'layer_7']
    """
    layers = {layer_name(block): rows for block, rows in features.layers.items()}
    return {EMBEDS: features.embeds, **{name: layers[name] for name in sorted(layers)}}


def n_bytes_of(features: ImageFeatures) -> int:
    """Return the number of bytes of an image's rows in all tensors."""
    return sum(rows.nbytes for rows in rows_by_tensor(features).values())


def shard_name(index: int) -> str:
    """Return the file name of an export folder's shard.

    >>> shard_name(7)
    'shard-00000007.safetensors'
    """
    return f"shard-{index:08}.safetensors"


def parse_metadata(
    text: str, tensors: Mapping[str, TensorInfo], path: AnyPath, remedy: str
) -> dict[str, Any]:
    """Parse the text of a file's metadata, and check it against the file's `tensors`."""
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
    rows = {EMBEDS, *map(layer_name, parse_row_facts(metadata, path, remedy).layers)}
    if rows != tensors.keys() - {*INTEGERS}:
        problem = f"its tensors of rows are {', '.join(sorted(tensors.keys() - {*INTEGERS}))}; "
        problem += f"its layers are {metadata.get('layers')}"
    elif len(set(ids)) < len(ids) or any(len(tensors[name].shape) != 2 for name in rows):
        problem = f"{len(ids)} ids, {len(set(ids))} of them different; "
        problem += ", ".join(f"{name} of shape {tensors[name].shape}" for name in sorted(rows))
    elif odd := sorted(name for name in rows if tensors[name].dtype not in ROW_DTYPES):
        problem = f"{odd[0]} has the dtype {tensors[odd[0]].dtype}"
    elif found != {name: ("I64", shape) for name, shape in expected.items()}:
        problem = f"{len(ids)} ids; {found}"
    else:
        return metadata
    raise ExportError(f"corrupt ({problem})", name=str(path), remedy=remedy)


class RowFacts(NamedTuple):
    output: FeatureOutput
    normalized: bool
    layers: tuple[int, ...]


def parse_row_facts(metadata: Mapping[str, Any], path: AnyPath, remedy: str) -> RowFacts:
    """Return the description of the rows of a file of either schema."""
    per_row = metadata.get("patches_per_row")
    of_schema_1 = "mean" if per_row is None else "patch" if per_row == 1 else "merged"
    output = metadata.get("output", of_schema_1)
    normalize, layers = metadata.get("normalize") or False, metadata.get("layers") or []
    is_right = output in get_args(FeatureOutput) and isinstance(normalize, bool)
    if is_right and isinstance(layers, list) and all(is_integer(k) and k >= 0 for k in layers):
        return RowFacts(output, normalize, tuple(layers))
    raise ExportError(
        f"its output is {short_repr(output)}, its normalize is {short_repr(normalize)}, and its "
        f"layers are {short_repr(layers)}",
        name=str(path),
        expected="output 'merged', 'patch' or 'mean'; normalize true or false; layers a list of "
        "block indices",
        remedy=remedy,
    )


def parse_errors(value: Any, path: AnyPath, remedy: str) -> Sequence[FailedImage]:
    """Return a shard's failed images, or an empty list if `value` is None."""
    value = [] if value is None else value
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
            expected="id, stage, code and message of each error",
            remedy=remedy,
        )
    return [
        FailedImage(each["id"], ImageError(each["message"], code=each["code"]), each["stage"])
        for each in value
    ]


class StoredFacts(NamedTuple):
    """Describe an image or video in a file, without its rows and grid."""

    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    second_per_grid_t: float | None = None  # only for a video
    frame_seconds: tuple[float, ...] = ()
    sha256: str | None = None


def parse_image_facts(value: Any, path: AnyPath, remedy: str) -> Sequence[StoredFacts]:
    """Return the facts of each image, or an empty list if `value` is None, as in some files of
    schema 1."""
    value = [] if value is None else value
    try:
        facts = [
            StoredFacts(
                tuple(entry["size_px"] or UNKNOWN_SIZE), tuple(entry["notes"]),
                entry.get("second_per_grid_t"), tuple(entry.get("frame_seconds") or ()),
                digest if isinstance(digest := entry.get("sha256"), str) else None,
            )
            for entry in value
        ]  # fmt: skip
        if all(map(_is_right, facts)):
            return facts
    except (KeyError, TypeError):
        pass
    raise ExportError(
        f"its images are {short_repr(value)}",
        name=str(path),
        expected="size_px and notes of each image",
        remedy=remedy,
    )


def _is_right(facts: StoredFacts) -> bool:
    seconds = facts.second_per_grid_t
    return (
        len(facts.size_px) == 2
        and all(map(is_integer, facts.size_px))
        and (seconds is None or (is_number(seconds) and seconds > 0))
        and all(map(is_number, facts.frame_seconds))
    )


def read_description(path: AnyPath, names: Iterable[str] = ()) -> dict[str, Any]:
    """Read an export's description. If the file is missing, `names`, the names in its folder, show
    whether shards exist."""
    if not path.is_file():
        has_shards = any(map(SHARD.fullmatch, names))
        raise (ExportError if has_shards else UnreadableError)(
            f"a folder {'of shards ' * has_shards}without {path.name}",
            name=str(path.parent),
            expected="a folder of `qwen-vit export`",
            remedy=RESTORE if has_shards else "check the path",
        )
    try:
        description = read_json(path)
        check_description(description)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise UnreadableError.of(error) from None
        # its own remedy is to download a checkpoint's file again
        raise ExportError.of(error, name=str(path), remedy=RESTORE) from None
    _check_schema_version(description, path)
    return description


def check_description(description: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a value has the wrong type or is out of range."""
    for name in ("n_images", "shard_size"):
        check_integer(description.get(name), name, 2**63)
    objects = {name: description.get(name, {}) for name in ("inputs", "image_policy", "versions")}
    accepted = description.get("accepted", [])
    for number, value in enumerate(accepted if isinstance(accepted, list) else [accepted]):
        objects[f"accepted[{number}]"] = value
    if isinstance(objects["inputs"], dict):
        paths = objects["inputs"].get("paths") or []
        is_right = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        objects["inputs.paths"] = {} if is_right else paths
    for name, value in objects.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"its {name} is {short_repr(value)}", expected="an object")


def read_listing(path: AnyPath, n_images: int) -> list[str]:
    """Return the ids of a listing, which must have `n_images` different ids."""
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
            expected="an object with an id in each line",
            remedy=RESUME,
        ) from None
    distinct = {name for name in ids if isinstance(name, str)}
    if not len(distinct) == len(ids) == n_images:
        raise ExportError(
            f"corrupt: {len(ids)} lines with {len(distinct)} different ids",
            name=str(path),
            expected=f"{n_images} of each, as in export.json",
            remedy=RESUME,
        )
    return ids


def _check_schema_version(facts: Mapping[str, Any], path: AnyPath) -> None:
    version = facts.get("schema_version")
    if version not in READABLE:
        raise UnreadableError(
            f"its schema version is {version!r}",
            name=str(path),
            expected=" or ".join(map(str, READABLE)),
            remedy=OTHER_SCHEMA,
        )
