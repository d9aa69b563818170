"""Read a feature file, one image at a time, and check its header, metadata and offsets.

A local file is mapped into memory, so rows are read from the disk at their first use. `schema`
describes the format.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from qwen_vit.common.missing_name import missing_name
from qwen_vit.common.store_path import AnyPath, StorePath, as_path
from qwen_vit.errors import ExportError, UnreadableError, plural
from qwen_vit.feature_files.collection import Features, as_id
from qwen_vit.feature_files.head import WRITE_AGAIN, cannot_read, open_tensors
from qwen_vit.feature_files.schema import (
    EMBEDS,
    RESUME,
    REWRITE_SHARD,
    StoredFacts,
    layer_name,
    parse_errors,
    parse_image_facts,
    parse_row_facts,
)
from qwen_vit.feature_files.writer import rows_sha256
from qwen_vit.features import ImageFeatures, VideoFeatures

__all__ = ["FeatureFile", "file_content", "open_shard"]


class FeatureFile(Features):
    """Read a feature file, or one shard of an export folder.

    >>> features = load_features("features.safetensors")  # doctest: +SKIP
    >>> features["cats/one.jpg"].embeds.shape, features[0].grid_thw  # doctest: +SKIP
    (torch.Size([256, 3584]), (1, 32, 32))

    `load_features` opens a feature file.

    Args:
        path: the file, or its address in object storage.
        remedy: the advice in the error for a damaged file.
        verify: as in `load_features`.

    Attributes:
        path: the file.
        metadata: the values of `VisionEncoder.metadata()`, the other `schema.FILE_FACTS`, `ids`,
            `images` and `schema_version`. A file of schema 1 may lack some of these values.
        errors: a shard's failed images, each with the reason. Other files have none.
        image_grid_thw: (N, 3) int64, each image's grid in patches.

    Raises:
        UnreadableError: The file cannot be read, is not a feature file or has an unknown schema.
            This error is an ExportError.
        ExportError: The file is damaged, for example truncated.
    """

    def __init__(
        self, path: str | AnyPath, remedy: str = WRITE_AGAIN, *, verify: bool = False
    ) -> None:
        self.path = path = as_path(path)
        self._remedy, self._verify = remedy, verify
        try:
            self.metadata, self._file = open_tensors(path, remedy)
            self.image_grid_thw: Tensor = self._file.get_tensor("image_grid_thw")
            self._offsets: list[int] = self._file.get_tensor("image_token_offsets").tolist()
        except (OSError, SafetensorError) as error:
            kind = UnreadableError if isinstance(error, OSError) else ExportError
            raise kind(f"cannot be read ({error})", name=str(path), remedy=remedy) from None
        self._ids: list[str] = self.metadata["ids"]
        self._index = {name: index for index, name in enumerate(self._ids)}
        self.errors = parse_errors(self.metadata.get("errors"), path, remedy)
        self._facts = parse_image_facts(self.metadata.get("images"), path, remedy)
        self._rows = parse_row_facts(self.metadata, path, remedy)
        self._check(remedy)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"FeatureFile({str(self.path)!r}: {plural(len(self), 'image')})"

    def __reduce__(self) -> Any:  # a data loader's workers open the file again
        return partial(FeatureFile, verify=self._verify), (self.path,)

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    @property
    def is_complete(self) -> bool:
        """Return True, because the writer writes a feature file completely or not at all."""
        return True

    @property
    def row_counts(self) -> Sequence[int]:
        """Return the number of rows of each image, in order."""
        return [end - begin for begin, end in pairwise(self._offsets)]

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: object) -> bool:
        name = as_id(name)
        return isinstance(name, str) and name in self._index

    def locate(self, key: int | str) -> int:
        if not isinstance(key, str):
            return self.position(key)
        if key not in self._index:
            reasons = {failed.id: f"{failed.code}: {failed.message}" for failed in self.errors}
            if key in reasons:
                raise KeyError(f"{key!r} has no features in {self}: {reasons[key]}")
            raise KeyError(missing_name(key, self, self._ids))
        return self._index[key]

    def content(self) -> Any:
        return file_content(self.path)

    def read_at(self, place: int) -> ImageFeatures:
        t, h, w = self.image_grid_thw[place].tolist()
        output, normalized, blocks = self._rows
        facts = self._facts[place] if self._facts else StoredFacts()
        embeds = self._read_rows(EMBEDS, self._offsets, place)
        layers = {k: self._read_rows(layer_name(k), self._patches, place) for k in blocks}
        found = (
            self._ids[place], embeds, (t, h, w), facts.size_px, facts.notes, layers, output,
            normalized,
        )  # fmt: skip
        if facts.second_per_grid_t is None:
            return ImageFeatures(*found, sha256=facts.sha256)
        return VideoFeatures(
            *found, facts.second_per_grid_t, facts.frame_seconds, sha256=facts.sha256
        )

    @cached_property
    def _patches(self) -> list[int]:
        """Return the index of each image's first row in a layer, and then the number of all
        rows."""
        return [0, *self.image_grid_thw.prod(1).cumsum(0).tolist()]

    def _read_rows(self, tensor: str, offsets: Sequence[int], place: int) -> Tensor:
        try:
            with torch.device("cpu"):  # for any default device of the caller
                rows: Tensor = self._file.get_slice(tensor)[offsets[place] : offsets[place + 1]]
        except OSError as error:  # of a store
            raise cannot_read(self.path, error) from None
        if self._verify:
            self._check_digest(tensor, rows, place)
        return rows

    def _check_digest(self, tensor: str, rows: Tensor, place: int) -> None:
        digests = (self.metadata.get("images") or [{}])[place].get("rows_sha256") or {}
        name, what = str(self.path), f"{tensor} of {self._ids[place]!r}"
        if tensor not in digests:
            raise ExportError(
                f"has no digest of {what}",
                name=name,
                expected="a file of schema 2",
                remedy="read the file without verify",
            )
        if digests[tensor] != rows_sha256(rows):
            raise ExportError(
                f"{what} changed after it was written",
                name=name,
                remedy=REWRITE_SHARD if self._remedy == RESUME else self._remedy,
            )

    def _check(self, remedy: str) -> None:
        rows = self._file.get_slice(EMBEDS).get_shape()[0]
        for name in map(layer_name, self._rows.layers):
            n_rows, places = self._file.get_slice(name).get_shape()[0], self._patches
            if places[-1] != n_rows or not all(a <= b for a, b in pairwise(places)):
                raise ExportError(
                    f"corrupt ({name} has {n_rows} rows for {places[-1]} patches)",
                    name=str(self.path),
                    remedy=remedy,
                )
        may_lack_facts = self.metadata["schema_version"] == 1  # files of `encode` lacked them
        if len(self._facts) != len(self) and (self._facts or not may_lack_facts):
            raise ExportError(
                f"corrupt ({len(self._facts)} images and {len(self)} ids)",
                name=str(self.path),
                remedy=remedy,
            )
        offsets = self._offsets
        rising = all(a <= b for a, b in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != rows or not rising:
            raise ExportError(
                f"corrupt (offsets from {offsets[0]} to {offsets[-1]} over {rows} rows)",
                name=str(self.path),
                remedy=remedy,
            )


def file_content(path: AnyPath) -> tuple[str, int, Any]:
    try:
        if isinstance(path, StorePath):
            return path.content()
        status = path.stat()
    except OSError as error:
        raise cannot_read(path, error) from None
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def open_shard(path: AnyPath, *, verify: bool = False) -> FeatureFile:
    """Open a shard. For a damaged shard, the error's remedy is to run the export's command
    again."""
    return FeatureFile(path, RESUME, verify=verify)
