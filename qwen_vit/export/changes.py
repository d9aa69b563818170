"""Compare an export's listings with a new listing of the inputs."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Self

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import ExportError, ImageError, display_name, plural
from qwen_vit.export.folder import ExportFolder
from qwen_vit.export.listings import Listings
from qwen_vit.feature_files.file import FeatureFile, open_shard
from qwen_vit.feature_files.schema import shard_name
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import STDIN
from qwen_vit.inputs.listing import Item, Listing, read_listing
from qwen_vit.inputs.read import read_item
from qwen_vit.video.items import open_video_item
from qwen_vit.video.options import VideoLimits

__all__ = ["InputChanges", "failed_items", "open_if_whole", "warn_of_other_inputs"]

logger = logging.getLogger("qwen_vit")


@dataclass(slots=True)
class InputChanges:
    """Hold the result of comparing a new listing with an export's listings.

    Attributes:
        new: images that the export lacks, or whose earlier listing error is gone.
        moved: images whose source, place in the source or listing error changed, each with its old
            item.
        replaced: images in objects of a store whose version changed.
        is_reordered: whether the export has one listing, which does not begin with the ids of the
            new listing, in order. False if the export has several listings.
    """

    new: list[Item] = field(default_factory=list)
    moved: list[tuple[Item, Item]] = field(default_factory=list)
    replaced: list[Item] = field(default_factory=list)
    gone: list[Item] = field(default_factory=list)
    same: list[tuple[Item, int]] = field(default_factory=list)  # each with its shard
    is_reordered: bool = False

    @classmethod
    def between(cls, listings: Listings, found: Listing) -> Self:
        changes, current = cls(), listings.current
        before = {
            item.id: (item, shard)
            for shard in range(listings.n_shards)
            for item in listings.shard(shard)
            if current.has(shard, item.id)
        }
        is_in_order, order = True, iter(list(before))
        for item in read_listing(found.path):
            old, shard = before.pop(item.id, (None, 0))
            is_in_order = is_in_order and next(order, None) == item.id
            if old is None or (old.error is not None and item.error is None):
                changes.new.append(item)
            elif _place(old) != _place(item):
                changes.moved.append((item, old))
            elif old.version != item.version:
                changes.replaced.append(item)
            else:
                changes.same.append((old, shard))
        changes.gone = [item for item, _ in before.values()]
        changes.is_reordered = not is_in_order and len(listings.all) == 1
        return changes

    def describe(self) -> str:
        counts = [
            (self.gone, "missing"),
            (self.new, "new"),
            (self.replaced, "changed"),
            ([item for item, _ in self.moved], "in another place"),
        ]
        words = [
            f"{len(items)} {what}, first {display_name(items[0].id)}"
            for items, what in counts
            if items
        ]
        if self.moved:
            item, old = self.moved[0]
            now = _place_text(item).removesuffix(f" of {display_name(old.source)}")
            words[-1] += f" (it was {_place_text(old)}, and is {now} now)"
        return "; ".join(words) or "in another order" * self.is_reordered

    def aim_of_extend(self) -> str:
        """Return what an extension would do, for an error's remedy."""
        if self.new:
            return "add the new images"
        is_lost = any(item.error is not None for item in self.gone)
        return "withdraw the inputs that failed" if is_lost else ""

    def log_growth(self, changed: Sequence[Item], failed: Sequence[Item]) -> None:
        gone = [item for item in self.gone if item.error is None]
        for items, words in (
            (changed, "changed since the export, first %s: exported again"),
            (
                failed,
                "failed earlier, in files that are newer now, first %s: the export tries again",
            ),
            (gone, "not in these inputs, first %s: the export keeps its listed images"),
        ):
            if items:
                count = plural(len(items), "image")
                logger.warning(f"%s {words}", count, display_name(items[0].id))

    def changed(
        self, folder: ExportFolder, listings: Listings, limits: ImageLimits
    ) -> tuple[list[Item], list[Item]]:
        """Return the images whose content changed after they were exported, and failed images in
        newer files.

        The method reads an image only if its file is not older than the listing and its shard is
        intact. A shard has no digest of a failed image, so its content may be the same.
        """
        listed_ns = [os.stat(listing.path).st_mtime_ns for listing in listings.all]
        times: dict[str, int] = {}
        newer: dict[int, list[Item]] = {}
        for item, shard in self.same:
            if item.source not in times:
                times[item.source] = _time_ns(item.source)
            if times[item.source] >= listed_ns[listings.number_of(shard)] and item.error is None:
                newer.setdefault(shard, []).append(item)
        found = [
            (item, digest)
            for shard, items in newer.items()
            for item, digest in _changed_of_shard(open_if_whole(folder, shard), items, limits)
        ]
        return [item for item, digest in found if digest], [i for i, digest in found if not digest]


def warn_of_other_inputs(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Warn if an extension's inputs, which the export then records, omit recorded inputs."""
    places = {_input_place(path, now) for path in now["paths"]}
    paths = [] if before is None else before["paths"]
    left = [path for path in paths if _input_place(path, before or {}) not in places]
    if left:
        logger.warning(
            "the export records only these inputs now, and no longer %s; to extend it with the "
            "earlier inputs as well, pass all inputs",
            display_name(left[0]),
        )


def _input_place(path: str, inputs: Mapping[str, Any]) -> str:
    if path == STDIN or is_remote(path):
        return path
    return os.path.normpath(os.path.join(str(inputs.get("folder", "")), path))


def failed_items(folder: ExportFolder, listings: Listings) -> Iterator[Item]:
    """Yield the current images that failed, from the shards that are intact."""
    current = listings.current
    for shard in range(listings.n_shards):
        file = open_if_whole(folder, shard)
        failed = {error.id for error in file.errors} if file is not None else ()
        for item in listings.shard(shard) if failed else ():
            if item.id in failed and current.has(shard, item.id):
                yield item


def _changed_of_shard(
    file: FeatureFile | None, items: Sequence[Item], limits: ImageLimits
) -> Iterator[tuple[Item, str]]:
    """Yield each image with other content, and the digest in the shard, or "" if it failed."""
    if file is None:  # the export reads the shard's images again
        return
    digests = {
        name: facts["sha256"] for name, facts in zip(file.ids, file.metadata["images"], strict=True)
    }
    for item in items:
        try:
            digest = _digest(item, limits)
        except ImageError:  # keep the last good features
            continue
        if (before := digests.get(item.id, "")) != digest:
            yield item, before


def _digest(item: Item, limits: ImageLimits) -> str:
    if item.is_video:
        with open_video_item(item, VideoLimits()) as (_, digest):
            return digest
    return sha256(read_item(item, limits)).hexdigest()


def open_if_whole(folder: ExportFolder, shard: int) -> FeatureFile | None:
    """Return a shard, or None if its file is missing or cannot be opened as a shard."""
    name = shard_name(shard)
    try:
        return open_shard(folder / name) if folder.has(name) else None
    except ExportError:
        return None


def _place(item: Item) -> Item:
    """Return the item without what identifies its content, and without an error's message.

    Other versions of qwen_vit may word an error differently. Only a whole object has offset 0,
    because a tar begins with a header.
    """
    error = None if item.error is None else (item.error[0], "")
    is_object = item.version is not None and item.offset == 0
    size = None if is_object else item.size
    return replace(item, error=error, version=None, size=size, header=None, id_column=None)


def _place_text(item: Item) -> str:
    source = display_name(item.source)
    if item.error is not None:
        return f"unreadable in {source}"
    if item.row is not None:
        return f"in row {item.row} of {source}"
    return f"in {source}" if item.is_file else f"at byte {item.offset} of {source}"


def _time_ns(path: str) -> int:
    """Return the later of mtime and ctime, because a rename changes only the ctime."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError for a NUL in a list
        return 0
    return max(status.st_mtime_ns, status.st_ctime_ns)
