"""Read export folders on demand, and open any stored features.

A local file is mapped into memory, so rows are read from the disk at their first use. `schema`
describes the format of files and folders.
"""

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from typing import Any

from qwen_vit.common.arguments import missing_remedy
from qwen_vit.common.missing_name import missing_name
from qwen_vit.common.safetensors_header import read_header
from qwen_vit.common.store_cache import cache_folder
from qwen_vit.common.store_path import AnyPath, StorePath, as_path
from qwen_vit.errors import CheckpointError, ExportError, UnreadableError, plural
from qwen_vit.feature_files.collection import Features, as_id
from qwen_vit.feature_files.file import FeatureFile, file_content, open_shard
from qwen_vit.feature_files.head import cannot_read
from qwen_vit.feature_files.listed import ListedImages
from qwen_vit.feature_files.schema import (
    RESUME,
    read_description,
    shard_name,
)
from qwen_vit.feature_files.segments import open_segments, segments_among
from qwen_vit.features import FailedImage, ImageFeatures

__all__ = ["FeatureFolder", "load_features", "open_features"]

logger = logging.getLogger("qwen_vit")

SHARDS_OPEN = 64  # at a time; each is one mapping, and Linux allows a process 65,530 mappings


class FeatureFolder(Features):
    """Read a folder that `qwen-vit export` wrote or is still writing.

    >>> features = load_features("export")  # doctest: +SKIP
    >>> features.is_complete, len(features), len(features.errors)  # doctest: +SKIP
    (True, 999_998, 2)

    The object contains the images that the export encoded without an error, in the order of the
    shards. If a later listing replaced an image, the object reads only the image's newest features.
    The object opens shards on demand, and keeps at most 64 open. At opening, it lists the folder
    once. If a shard does not exist at that time, the object omits the shard's images, and
    `is_complete` is False.

    `load_features` returns this object for an export folder.

    Args:
        path: the folder, or its address in object storage.
        verify: as in `load_features`.

    Attributes:
        path: the folder.
        metadata: the export's settings, including `shard_size` and `n_images`.
        listing: the ids of all images of the export, in order, including failed and missing images.

    Raises:
        UnreadableError: The folder cannot be read, or the schema is unknown. This error is an
            ExportError.
        ExportError: `export.json` or a listing is missing or damaged. A damaged shard raises this
            error at its first use.
    """

    def __init__(self, path: str | AnyPath, *, verify: bool = False) -> None:
        self.path, self._verify = (path := as_path(path)), verify
        found = _names_in(path)
        self.metadata = read_description(path / "export.json", found)
        self._listed = ListedImages(path, self.metadata)
        self.listing = self._listed.ids
        self._shard_count = self._listed.n_shards
        self._present = [i for i in range(self._shard_count) if shard_name(i) in found]
        self._first_saved = segments_among(found)
        self._shard = lru_cache(SHARDS_OPEN)(self._open)
        if not self.is_complete:
            logger.warning(
                "%s is not complete: it has %d of %d shards; `load_features` reads only the "
                "images in these shards",
                path, len(self._present), self._shard_count,
            )  # fmt: skip

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        listed = plural(len(self.listing), "image")
        shards = f"{len(self._present):,} of {plural(self._shard_count, 'shard')}"
        return f"FeatureFolder({str(self.path)!r}: {listed} listed, {shards})"

    def __reduce__(self) -> Any:  # a worker has the same images, even if the export added shards
        return _same_folder, (self.path, tuple(self._present), self._verify)

    @property
    def is_complete(self) -> bool:
        """Return whether every shard existed when this object opened the folder."""
        return len(self._present) == self._shard_count

    @property
    def shards(self) -> Sequence[int]:
        """Return the shards that existed when this object opened the folder."""
        return self._present

    @cached_property
    def segments(self) -> Mapping[int, Sequence[FeatureFile]]:
        """Return the saved parts of each unfinished shard.

        The next run of the export can reuse them. The features of this object omit them.
        """
        found = {
            shard: open_segments(
                self.path.__truediv__, shard, firsts, self._listed.of(shard),
                partial(self._listed.has_settings, shard),
            )
            for shard, firsts in sorted(self._first_saved.items())
            if shard not in self._present and shard < self._shard_count
        }  # fmt: skip
        return {shard: [each.file for each in kept] for shard, kept in found.items() if kept}

    @cached_property
    def errors(self) -> Sequence[FailedImage]:
        """Return the failed images, in order. The property reads the header of every shard."""
        return [
            failed
            for index in self._present
            for failed in self._shard(index).errors
            if self._listed.is_current(index, failed.id)
        ]

    @cached_property
    def ids(self) -> Sequence[str]:
        """Return the ids of the images with features, in order. The property reads every shard's
        header."""
        return [self._shard(i).ids[place] for i in self._present for place in self._places(i)]

    @cached_property
    def _ends(self) -> list[int]:
        """Return the cumulative count of current images after each shard."""
        return list(accumulate(self._count(index) for index in self._present))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[ImageFeatures]:
        return (self.read_at((i, place)) for i in self._present for place in self._places(i))

    def __contains__(self, name: object) -> bool:
        name = as_id(name)
        index = self._listed.shard_of.get(name) if isinstance(name, str) else None
        return index in self._present and super().__contains__(name)

    def locate(self, key: int | str) -> tuple[int, int]:
        if isinstance(key, str):
            if key not in self._listed.shard_of:
                raise KeyError(missing_name(key, self, self.listing, "lists"))
            index = self._listed.shard_of[key]
            return index, self._shard(index).locate(key)
        position = self.position(key)
        at = bisect_right(self._ends, position)
        index = self._present[at]
        return index, self._places(index)[position - (self._ends[at - 1] if at else 0)]

    def content(self) -> Any:
        return [file_content(self.path / shard_name(index)) for index in self._present]

    def read_at(self, place: tuple[int, int]) -> ImageFeatures:
        index, position = place
        return self._shard(index).read_at(position)

    def open_shard(self, index: int) -> FeatureFile:
        """Open a shard's file.

        Args:
            index: the shard's number, from 0.

        Returns:
            The features of the shard, including images that a later listing replaced.

        Raises:
            ExportError: The shard is missing, unreadable or damaged, or belongs to another export.
        """
        return self._open(index)

    def is_current(self, index: int, name: str) -> bool:
        """Return whether no later listing replaced or withdrew a shard's image.

        Args:
            index: the shard's number, from 0.
            name: the image's id.

        Returns:
            True if this shard contains the image's newest features or error.
        """
        return self._listed.is_current(index, name)

    def _places(self, index: int) -> Sequence[int]:
        """Return the indices of a shard's current images in the shard's file."""
        ids = self._shard(index).ids
        if self._has_replaced(index):
            return [at for at, name in enumerate(ids) if self._listed.is_current(index, name)]
        return range(len(ids))

    def _has_replaced(self, index: int) -> bool:
        return not all(self._listed.is_current(index, name) for name in self._listed.of(index))

    def _count(self, index: int) -> int:
        if self._has_replaced(index):
            return len(self._places(index))
        if isinstance(self.path, StorePath):  # its header is read once
            return len(self._shard(index))
        try:
            count: int = read_header(self.path / shard_name(index))["image_grid_thw"].shape[0]
        except (CheckpointError, KeyError, IndexError):
            return len(self._open(index))  # raises with the shard's problem
        return count

    def _open(self, index: int) -> FeatureFile:
        path = self.path / shard_name(index)
        try:
            is_there = path.is_file()
        except OSError as error:  # of a store
            raise cannot_read(path, error) from None
        if not is_there:
            raise ExportError(
                f"missing (the folder has {len(self._present)} of {self._shard_count} shards)",
                name=str(path),
                remedy=RESUME,
            )
        file = open_shard(path, verify=self._verify)
        listing, listed = self._listed.listing_of(index), self._listed.of(index)
        failed = {each.id for each in file.errors}
        is_same = self._listed.has_settings(index, file.metadata)
        is_all = len(file.ids) + len(failed) == len(listed)
        if not is_same or not is_all or file.ids != [n for n in listed if n not in failed]:
            start = (index - listing.shards.start) * self.metadata["shard_size"]
            lines = f"lines {start + 1} to {start + len(listed)} of {listing.name}"
            raise ExportError(
                "belongs to a different export",
                name=str(path),
                expected=f"the settings of export.json and the images of {lines}, or their errors",
                remedy=f"move the shard away and {RESUME}",
            )
        return file


def load_features(
    path: str | AnyPath,
    *,
    verify: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> FeatureFile | FeatureFolder:
    """Open a feature file, or a folder that `qwen-vit export` wrote.

    >>> load_features("no-such-file.safetensors")
    Traceback (most recent call last):
    qwen_vit.errors.UnreadableError: no-such-file.safetensors: does not exist. Expected a feature \
file of `qwen-vit encode` or a folder of `qwen-vit export`. Check the path.

    Args:
        path: the file or folder, or an address such as "s3://bucket/features". From an address, the
            returned object reads ranges: a file's header, and the rows of each requested image.
        verify: True compares the rows of each read with the recorded sha256. `qwen-vit verify`
            checks every image of a file or export.
        cache_dir: a folder that stores the ranges read from an address. A later read of a stored
            range sends no request, but opening the file or folder asks for the version of its
            objects. Ranges of an object without a version are not stored. None selects the folder
            in the environment variable QWEN_VIT_STORE_CACHE, if any.

    Returns:
        A FeatureFile or a FeatureFolder. Both read an image's rows at its first use.

    Raises:
        UnreadableError: The file or folder does not exist, cannot be read, contains no features or
            has another schema, or the package for an address is not installed. This error is an
            ExportError.
        ExportError: The file or `export.json` is damaged, for example truncated. A damaged shard
            raises this error at its first use. With `verify`, a read raises this error if a bit
            differs, or if the file has no digests, as in schema 1.
        ArgumentError: `path` is not a path.
    """
    path = as_path(path, expected="the path of a file or folder")
    if isinstance(path, StorePath):
        path = replace(path, cache=cache_folder(cache_dir))
    return open_features(path, verify=verify)


def open_features(path: AnyPath, *, verify: bool = False) -> FeatureFile | FeatureFolder:
    """Open a feature file or an export folder. A `StorePath` names its own cache, if any."""
    try:
        if path.is_dir():
            return FeatureFolder(path, verify=verify)
        if path.is_file():
            return FeatureFile(path, verify=verify)
        fact = "not a regular file" if path.exists() else "does not exist"
    except OSError as error:
        raise cannot_read(path, error) from None
    raise UnreadableError(
        fact,
        name=str(path),
        expected="a feature file of `qwen-vit encode` or a folder of `qwen-vit export`",
        remedy=missing_remedy(str(path)),
    )


def _names_in(folder: AnyPath) -> set[str]:
    try:
        if isinstance(folder, StorePath):
            return folder.names()
        return {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise cannot_read(folder, error) from None


def _same_folder(path: AnyPath, present: Sequence[int], verify: bool) -> FeatureFolder:
    folder = FeatureFolder(path, verify=verify)
    folder._present = list(present)
    return folder
