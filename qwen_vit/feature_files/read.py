"""Feature files and export folders, read lazily; nothing in them is trusted, every damage is named.

A feature file is memory-mapped: its rows are fetched from the disk when they are used. An export
folder holds `export.json`, `listing.jsonl` (an id a line) and a feature file, a shard, for every
`shard_size` lines of the listing, which also names those images that failed, with the reason.
"""

import json
import logging
import operator
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vit.common.safetensors_header import read_header
from qwen_vit.common.strict_json import check_integer, is_integer, parse_json, read_json, short_repr
from qwen_vit.errors import ArgumentError, CheckpointError, ExportError, ImageError, plural
from qwen_vit.features import (
    METADATA_KEY,
    SCHEMA_VERSION,
    UNKNOWN_SIZE,
    FailedImage,
    ImageFeatures,
)
from qwen_vit.integrations import hf as downstream

__all__ = [
    "FailedImage",
    "FeatureFile",
    "FeatureFolder",
    "Features",
    "load_features",
    "open_shard",
    "shard_name",
]

logger = logging.getLogger("qwen_vit")

INTEGERS = ("image_grid_thw", "image_token_offsets")
SHARDS_OPEN = 64  # at a time; each is one mapping, of which Linux allows a process 65,530
WRITE_AGAIN = "write it again with `qwen-vit encode`"
RESUME = "run the same `qwen-vit export` command again, which writes what is missing"


Many: TypeAlias = slice | range | list[int] | list[str] | tuple[int, ...] | NDArray[Any] | Tensor


def shard_name(index: int) -> str:
    """The file of an export folder's shard.

    >>> shard_name(7)
    'shard-00000007.safetensors'
    """
    return f"shard-{index:08}.safetensors"


class Features(ABC):
    """Images' features in order, read when they are asked for.

    Indexed by position or id; a slice, a list, tuple, range, array or tensor of positions and ids,
    or a mask of one truth value for each image gives a choice of them, which is lazy, too. The rows
    are views of the file in memory: clone what you want to write to.
    """

    metadata: dict[str, Any]

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The images' ids, in order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _find(self, key: int | str) -> Any:
        """Where an image lies, without reading its rows; KeyError or IndexError if it does not."""

    @abstractmethod
    def _read(self, place: Any) -> ImageFeatures:
        """The image at a place that `_find` gave."""

    @overload
    def __getitem__(self, key: int | str) -> ImageFeatures: ...
    @overload
    def __getitem__(self, key: Many) -> "Features": ...
    def __getitem__(self, key: int | str | Many) -> "ImageFeatures | Features":
        if isinstance(key, slice):
            return FeatureSubset(self, range(*key.indices(len(self))))
        one_or_many: Any = key.tolist() if isinstance(key, (np.ndarray, Tensor)) else key
        if isinstance(one_or_many, (list, tuple, range)):
            return FeatureSubset(self, self._keys(one_or_many))
        return self._read(self._find(one_or_many))

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, name: object) -> bool:
        """Whether an image of this id is there."""
        try:
            return isinstance(name, str) and self._find(name) is not None
        except KeyError:
            return False

    def to_hf(
        self, input_ids: Tensor | None = None, *, image_token_id: int = downstream.IMAGE_TOKEN_ID
    ) -> dict[str, Any]:
        """Arguments of transformers' generate and forward: see `downstream.to_hf`."""
        return downstream.to_hf(self, input_ids, image_token_id=image_token_id)

    def to_vllm(self) -> dict[str, Any]:
        """vLLM's `multi_modal_data`: see `downstream.to_vllm`."""
        return downstream.to_vllm(self)

    def to_vllm_chat_part(self) -> list[dict[str, Any]]:
        """One part of a chat message to a vLLM server per image: see `downstream`."""
        return downstream.to_vllm_chat_part(self)

    def to_sglang(self) -> list[dict[str, Any]]:
        """SGLang's `image_data`: see `downstream.to_sglang`."""
        return downstream.to_sglang(self)

    def _keys(self, keys: Sequence[int] | Sequence[str]) -> Sequence[int | str]:
        if keys and all(isinstance(key, bool) for key in keys):
            if len(keys) != len(self):
                raise IndexError(f"a mask of {len(keys)} for {self}, which holds {len(self)}")
            return [index for index, is_chosen in enumerate(keys) if is_chosen]
        for key in keys:
            self._find(key)
        return list(keys)

    def _at(self, key: int | str) -> int:
        """A position counted from the front, or IndexError."""
        count = len(self)
        try:
            index = operator.index(key)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"{key!r} chooses no image of {self}, expected a position or an id, a slice, or a "
                "list or array of them"
            ) from None
        if not -count <= index < count:
            raise IndexError(f"image {index} of {self}, which holds {count}")
        return index % count


class FeatureSubset(Features):
    """Some images of a file or folder, in an order of their own."""

    def __init__(self, source: Features, keys: Sequence[int | str]) -> None:
        self.source = source
        self.keys = keys
        self.metadata = source.metadata

    def __str__(self) -> str:
        return f"a choice of {self.source}"

    def __repr__(self) -> str:
        return f"<{plural(len(self), 'image')} of {self.source!r}>"

    @cached_property
    def ids(self) -> Sequence[str]:
        return [key if isinstance(key, str) else self.source.ids[key] for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def _find(self, key: int | str) -> Any:
        if not isinstance(key, str):
            return self.source._find(self.keys[self._at(key)])
        if key not in self.ids:
            raise KeyError(f"{key!r} is not in {self}, which holds {len(self)} images")
        return self.source._find(key)

    def _read(self, place: Any) -> ImageFeatures:
        return self.source._read(place)


class FeatureFile(Features):
    """A feature file, or one shard of an export folder.

    >>> features = load_features("features.safetensors")  # doctest: +SKIP
    >>> features["cats/one.jpg"].embeds.shape, features[0].grid_thw  # doctest: +SKIP
    (torch.Size([256, 3584]), (1, 32, 32))

    `metadata` is what the encoder said of itself; `errors` are the images that a shard should hold
    and does not, each with its reason.
    """

    def __init__(self, path: Path, remedy: str = WRITE_AGAIN) -> None:
        self.path = path
        self.metadata = _read_metadata(path, remedy)
        self._ids: list[str] = self.metadata["ids"]
        self.errors = _parse_errors(self.metadata.get("errors", []), path, remedy)
        self._file = safe_open(path, framework="pt", device="cpu")
        self.image_grid_thw: Tensor = self._file.get_tensor("image_grid_thw")
        self._offsets: list[int] = self._file.get_tensor("image_token_offsets").tolist()
        self._index = {name: index for index, name in enumerate(self.ids)}
        self._facts = _parse_facts(self.metadata.get("images", []), path, remedy)
        self._check(remedy)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"FeatureFile({str(self.path)!r}: {plural(len(self), 'image')})"

    def __reduce__(self) -> Any:  # a data loader's workers open it for themselves
        return load_features, (self.path,)

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    @property
    def is_complete(self) -> bool:
        """True: a feature file is written whole or not at all."""
        return True

    def __len__(self) -> int:
        return len(self._ids)

    def _find(self, key: int | str) -> int:
        if not isinstance(key, str):
            return self._at(key)
        if key not in self._index:
            reasons = {failed.id: f"{failed.code}: {failed.message}" for failed in self.errors}
            if key in reasons:
                raise KeyError(f"{key!r} has no features in {self}: {reasons[key]}")
            raise KeyError(f"{key!r} is not in {self}, which holds {len(self)} images")
        return self._index[key]

    def _read(self, place: int) -> ImageFeatures:
        rows = slice(self._offsets[place], self._offsets[place + 1])
        t, h, w = self.image_grid_thw[place].tolist()
        with torch.device("cpu"):  # whatever the caller's default device is
            embeds = self._file.get_slice("image_embeds")[rows]
        size_px, notes = self._facts[place] if self._facts else (UNKNOWN_SIZE, ())
        return ImageFeatures(self._ids[place], embeds, (t, h, w), size_px, notes)

    def _check(self, remedy: str) -> None:
        rows = self._file.get_slice("image_embeds").get_shape()[0]
        if len(self._facts) not in (0, len(self)):
            raise ExportError(
                f"{self.path} disagrees with itself ({len(self._facts)} images and {len(self)} "
                f"ids); {remedy}"
            )
        offsets = self._offsets
        rising = all(a <= b for a, b in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != rows or not rising:
            raise ExportError(
                f"{self.path} disagrees with itself (offsets from {offsets[0]} to {offsets[-1]} "
                f"over {rows} rows); {remedy}"
            )


class FeatureFolder(Features):
    """A folder that `qwen-vit export` wrote, or is still writing.

    >>> features = load_features("export")  # doctest: +SKIP
    >>> features.is_complete, len(features), len(features.errors)  # doctest: +SKIP
    (True, 999_998, 2)

    It holds the images that were exported well, in the listing's order. Shards are opened when they
    are needed, at most 64 at a time. Those that are not there yet are left out (`is_complete` is
    then False): what is there is found out once, when the folder is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = _read_description(path / "export.json")
        self._shard_size: int = self.metadata["shard_size"]
        self.listing = _read_listing(path / "listing.jsonl", self.metadata["n_images"])
        found = {entry.name for entry in os.scandir(path)}
        self._shard_count: int = -(-len(self.listing) // self._shard_size)
        self._present = [i for i in range(self._shard_count) if shard_name(i) in found]
        self._shard = lru_cache(SHARDS_OPEN)(self._open)
        if not self.is_complete:
            logger.warning(
                "%s is not complete: %d of %d shards are there, and only their images are read",
                path, len(self._present), self._shard_count,
            )  # fmt: skip

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        listed = plural(len(self.listing), "image")
        shards = f"{len(self._present):,} of {plural(self._shard_count, 'shard')}"
        return f"FeatureFolder({str(self.path)!r}: {listed} listed, {shards})"

    def __reduce__(self) -> Any:  # a worker has the same images, whatever was written meanwhile
        return _same_folder, (self.path, tuple(self._present))

    @property
    def is_complete(self) -> bool:
        """Whether every shard was there when the folder was opened."""
        return len(self._present) == self._shard_count

    @cached_property
    def errors(self) -> Sequence[FailedImage]:
        """The images that failed, in the listing's order; reads the header of every shard."""
        return [failed for index in self._present for failed in self._shard(index).errors]

    @cached_property
    def ids(self) -> Sequence[str]:
        """The ids of the images that are there, in order; reads the header of every shard."""
        return [name for index in self._present for name in self._shard(index).ids]

    @cached_property
    def _line(self) -> dict[str, int]:
        return {name: line for line, name in enumerate(self.listing)}

    @cached_property
    def _ends(self) -> list[int]:
        """How many images the shards hold up to each, from their headers' shapes alone."""
        return list(accumulate(self._count(index) for index in self._present))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (features for index in self._present for features in self._shard(index))

    def __contains__(self, name: object) -> bool:
        line = self._line.get(name) if isinstance(name, str) else None
        is_present = line is not None and line // self._shard_size in self._present
        return is_present and super().__contains__(name)

    def _find(self, key: int | str) -> tuple[int, int]:
        if isinstance(key, str):
            if key not in self._line:
                like = f", as {self.listing[0]!r}" if self.listing else ""
                raise KeyError(
                    f"{key!r} is not in {self}, which lists {len(self._line)} images{like}"
                )
            index = self._line[key] // self._shard_size
            return index, self._shard(index)._find(key)
        position = self._at(key)
        at = bisect_right(self._ends, position)
        index = self._present[at]
        return index, position - (self._ends[at - 1] if at else 0)

    def _read(self, place: tuple[int, int]) -> ImageFeatures:
        index, position = place
        return self._shard(index)._read(position)

    def _count(self, index: int) -> int:
        try:
            count: int = read_header(self.path / shard_name(index))["image_grid_thw"].shape[0]
        except (CheckpointError, KeyError, IndexError):
            return len(self._open(index))  # which says what is wrong with it
        return count

    def _open(self, index: int) -> FeatureFile:
        path = self.path / shard_name(index)
        if not path.is_file():
            raise ExportError(
                f"{path} is not there ({len(self._present)} of {self._shard_count} shards are); "
                f"{RESUME}"
            )
        file = open_shard(path)
        start = index * self._shard_size
        listed = self.listing[start : start + self._shard_size]
        failed = {each.id for each in file.errors}
        is_same = all(file.metadata.get(name) == value for name, value in self.metadata.items())
        is_all = len(file.ids) + len(failed) == len(listed)
        if not is_same or not is_all or file.ids != [n for n in listed if n not in failed]:
            raise ExportError(
                f"{path} is of another export, expected the settings of export.json and the images "
                f"of lines {start + 1} to {start + len(listed)} of listing.jsonl, or their errors; "
                f"move it away and {RESUME}"
            )
        return file


def load_features(path: str | Path) -> FeatureFile | FeatureFolder:
    """Open a feature file, or a folder that `qwen-vit export` wrote.

    >>> load_features("no-such-file.safetensors")
    Traceback (most recent call last):
    qwen_vit.errors.ExportError: no-such-file.safetensors is not there, expected a feature file of \
`qwen-vit encode` or a folder of `qwen-vit export`

    Raises ExportError, naming the file, for one that is missing, torn or of another schema.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"path is a {type(path).__name__}, expected that of a file or folder")
    path = Path(path)
    try:
        if path.is_dir():
            return FeatureFolder(path)
        if path.is_file():
            return _open_file(path, WRITE_AGAIN)
        what = "is no regular file" if path.exists() else "is not there"
    except OSError as error:
        raise _cannot_read(path, error) from None
    raise ExportError(
        f"{path} {what}, expected a feature file of `qwen-vit encode` or a folder of "
        "`qwen-vit export`"
    )


def _same_folder(path: Path, present: Sequence[int]) -> FeatureFolder:
    folder = FeatureFolder(path)
    folder._present = list(present)
    return folder


def open_shard(path: Path) -> FeatureFile:
    """Open one shard of an export. Raises ExportError, with how to resume, for a damaged one."""
    return _open_file(path, RESUME)


def _open_file(path: Path, remedy: str) -> FeatureFile:
    try:
        return FeatureFile(path, remedy)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} could not be read ({error}); {remedy}") from None


def _cannot_read(path: Path, error: OSError) -> ExportError:
    return ExportError(f"{path} cannot be read ({error.strerror}); check its permissions and disk")


def _without_remedy(error: CheckpointError, remedy: str) -> str:
    """An error of the JSON reader, which speaks of downloads, with what helps here."""
    text = str(error)
    return f"{text.rpartition(';')[0] or text}; {remedy}"


def _parse_errors(value: Any, path: Path, remedy: str) -> Sequence[FailedImage]:
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


def _parse_facts(
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


def _read_description(path: Path) -> dict[str, Any]:
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


def _read_listing(path: Path, n_images: int) -> list[str]:
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


def _read_metadata(path: Path, remedy: str) -> dict[str, Any]:
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise _cannot_read(path, error.__cause__) from None
        raise ExportError(
            f"{path} ({path.stat().st_size} bytes) is torn, or no safetensors file, expected a "
            f"feature file; {remedy}"
        ) from None
    missing = {"image_embeds", *INTEGERS} - set(tensors)
    with safe_open(path, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if missing or text is None:
        raise ExportError(
            f"{path} is a safetensors file but no feature file: expected image_embeds, "
            f"image_grid_thw, image_token_offsets and their metadata; {remedy}"
        )
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
