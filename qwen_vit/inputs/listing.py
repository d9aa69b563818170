"""Define the items of a listing, each with an id and a source, and write listings to files.

A listing has one JSON object per line: `{"id": ..., "source": ...}`. An export stores its listing
in its folder, and does not change it afterwards. An image inside a tar also has `offset` and `size`
in bytes, so rereading it needs no search. An image in a Parquet file has `row` and `column`. If
another program writes the tar or the Parquet file again, `header` and `id_column` show whether the
place still has the listed member or id.
"""

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from qwen_vit.common.atomic_file import atomic_file
from qwen_vit.errors import ExportError, ImageError, display_name, plural, with_options
from qwen_vit.inputs.suffixes import VIDEO_SUFFIXES, suffix_of

__all__ = ["MAX_NAME_BYTES", "Item", "Listing", "read_listing", "same_id"]

logger = logging.getLogger("qwen_vit")

MAX_NAME_BYTES = 2**20  # of a list's line, a tar member's header or an id, as in Go's archive/tar
IDS_KEPT = 100_000  # a repeated id among the first ones ends even an endless list
LINE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Item:
    """Describe one image of a listing: its id and its file.

    `source` is an absolute path, or an address. In a tar, the image is the `size` bytes at
    `offset`. In a Parquet file, the image is in `row`, counted from 0, of `column`. `page`, counted
    from 1, selects one of several pages of an image. `version` identifies the listed content of an
    object in object storage. `header` identifies the tar member that was listed at `offset`, and
    `id_column` is the column that had the id in `row`. `error` is the (code, message) of an
    ImageError during listing.

    >>> gone = ImageError("does not exist", name="a.tar", code="missing")
    >>> item = Item.failed("a.tar", "/data/a.tar", gone)
    >>> item.error
    ('missing', 'a.tar: does not exist')
    >>> print(item.to_json())
    {"id": "a.tar", "source": "/data/a.tar", "error": ["missing", "a.tar: does not exist"]}
    """

    id: str
    source: str
    offset: int | None = None
    size: int | None = None
    error: tuple[str, str] | None = None
    row: int | None = None
    column: str | None = None
    page: int | None = None
    version: str | None = None
    header: str | None = None
    id_column: str | None = None
    listed_at: str = field(default="", compare=False)  # the list and its line, for an error

    @property
    def is_file(self) -> bool:
        """Return whether the image is a whole file. False for a listed object in object storage,
        whose offset is 0."""
        return self.offset is None and self.row is None

    @property
    def is_video(self) -> bool:
        """Return whether the file's name has a video's extension.

        False for a row of a Parquet file, because only its bytes show whether it is a video.

        >>> Item("clip.mp4", "/data/clip.mp4").is_video, Item("a", "/data/a.jpg").is_video
        (True, False)
        """
        names = (self.id, self.source) if self.is_file else (self.id,)
        return self.row is None and any(suffix_of(name) in VIDEO_SUFFIXES for name in names)

    @classmethod
    def failed(cls, id: str, source: str, error: ImageError) -> Self:
        """Create an item for an unreadable image. An export of this item reports the error."""
        return cls(id, source, error=(error.code, str(error)))

    def to_json(self) -> str:
        """Return the item as one line. Surrogates preserve the bytes of a name that is not
        Unicode."""
        facts: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.offset is not None:
            facts |= {"offset": self.offset, "size": self.size}
        if self.header is not None:
            facts["header"] = self.header
        if self.row is not None:
            facts |= {"row": self.row, "column": self.column}
        if self.id_column is not None:
            facts["id_column"] = self.id_column
        if self.page is not None:
            facts["page"] = self.page
        if self.version is not None:
            facts["version"] = self.version
        if self.error is not None:
            facts["error"] = self.error
        return json.dumps(facts)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        error = facts.get("error")
        return cls(
            facts["id"],
            facts["source"],
            facts.get("offset"),
            facts.get("size"),
            None if error is None else (error[0], error[1]),
            facts.get("row"),
            facts.get("column"),
            facts.get("page"),
            facts.get("version"),
            facts.get("header"),
            facts.get("id_column"),
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """Describe the file of a listing: its path, its number of images and the first byte of each
    shard's lines.

    `n_videos` counts items with a video's name, and is 0 after `open`.
    """

    path: Path
    n_images: int
    sha256: str
    shard_size: int
    starts: tuple[int, ...]  # byte offsets
    n_videos: int = 0

    @classmethod
    def save(cls, path: Path, items: Iterable[Item], shard_size: int) -> Self:
        """Write the items to a file, completely or not at all, and describe the file.

        For each image, the method keeps a hash of 8 bytes in memory, and for the first 100,000 also
        the id.
        """
        digest, starts, position, count = hashlib.sha256(), [], 0, 0
        ids = _Ids()
        n_videos = 0
        with atomic_file(path) as file:
            for count, item in enumerate(_watched(items), start=1):
                ids.add(item)
                n_videos += item.is_video
                if (count - 1) % shard_size == 0:
                    starts.append(position)
                line = item.to_json().encode() + b"\n"
                digest.update(line)
                position += file.write(line)
            ids.check(file)
        return cls(path, count, digest.hexdigest(), shard_size, tuple(starts), n_videos)

    @classmethod
    def open(cls, path: Path, shard_size: int) -> Self:
        digest, starts, position, count = hashlib.sha256(), [], 0, 0
        with open(path, "rb") as file:
            for count, line in enumerate(file, start=1):
                if (count - 1) % shard_size == 0:
                    starts.append(position)
                digest.update(line)
                position += len(line)
        return cls(path, count, digest.hexdigest(), shard_size, tuple(starts))

    def shard(self, index: int) -> list[Item]:
        with self._opened() as file:
            file.seek(self.starts[index])
            lines = islice(file, self.shard_length(index))
            return [Item.from_json(json.loads(line)) for line in lines]

    def shard_length(self, index: int) -> int:
        return min(self.shard_size, self.n_images - index * self.shard_size)

    def spread(self, count: int) -> list[Item]:
        """Return at most `count` images, evenly spread over the listing."""
        step = max(1, -(-self.n_images // count))
        with self._opened() as file:
            lines = islice(file, 0, None, step)
            return [Item.from_json(json.loads(line)) for line in lines]

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb") as file:
                yield file
        except OSError as error:
            raise ExportError(
                f"can no longer be read ({error.strerror})",
                name=str(self.path),
                remedy="run the same command again, which keeps the finished shards",
            ) from None


def read_listing(path: Path) -> Iterator[Item]:
    with open(path, "rb") as file:
        for line in file:
            yield Item.from_json(json.loads(line))


class _Ids:
    """Find an id that two items share. `add` finds another item with one of the first IDS_KEPT ids,
    and `check` finds all others.

    After the first IDS_KEPT ids, the object stores only hashes. For two equal hashes, it compares
    the ids in the written listing.
    """

    def __init__(self) -> None:
        self._first: set[str] = set()
        self._hashes = array("q")

    def add(self, item: Item) -> None:
        if item.id in self._first:
            raise same_id(item)
        if len(self._first) < IDS_KEPT:
            self._first.add(item.id)
        self._hashes.append(hash(item.id))

    def check(self, listing: BinaryIO) -> None:
        ordered = np.sort(np.frombuffer(self._hashes, np.int64))
        twice = {*ordered[1:][ordered[1:] == ordered[:-1]].tolist()}
        seen: set[str] = set()
        if twice:
            listing.seek(0)
        for line in listing if twice else ():
            item = Item.from_json(json.loads(line))
            if item.id in seen:
                raise same_id(item)
            if hash(item.id) in twice:
                seen.add(item.id)


def same_id(item: Item, first: Item | None = None) -> ExportError:
    """Return the error for an item whose id another item has. `first` is that item, if known."""
    places = [_place(each) for each in (first, item) if each is not None]
    remedy = "pass each image once, pass the folder that contains both images, or pass a "
    remedy += '.jsonl list with an "id" for each'
    if not item.is_file:
        remedy = "rename one in its tar, pass each tar once, or unpack it and pass the folder"
    if item.row is not None:
        remedy = with_options("pass each file once, another {}, or none", "id_column")
    if item.listed_at:
        remedy = 'give each line its own "id"'
    fact = "two images have this id"
    is_path = item.is_file and not item.listed_at
    second = f", the second is {'' if is_path else 'in '}{places[-1]}"
    fact += second if first is None else f": {' and '.join(places)}"
    return ExportError(fact, name=item.id, remedy=remedy)


def _place(item: Item) -> str:
    if item.listed_at:
        return display_name(item.listed_at)
    place = display_name(item.source)
    if item.row is not None:
        return f"{place}, row {item.row}"
    return place if item.is_file else f"{place}, byte {item.offset}"


def _watched(items: Iterable[Item]) -> Iterator[Item]:
    """Log the number of items, and raise the inputs' OSErrors as ExportError.

    The writer's own OSErrors then remain distinct.
    """
    due = time.monotonic() + LINE_EVERY_S
    try:
        for count, item in enumerate(items):
            if count % 1000 == 0 and time.monotonic() > due:
                logger.warning("still listing: %s so far", plural(count, "image"))
                due = time.monotonic() + LINE_EVERY_S
            yield item
    except OSError as error:
        raise ExportError(
            f"cannot be listed ({error.strerror})",
            name=str(error.filename),
            remedy="check its disk",
        ) from None
