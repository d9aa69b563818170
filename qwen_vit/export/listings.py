"""Combine an export's first listing with the listings of its extensions and retries.

Each listing begins a new shard, so the shards of earlier listings keep their bytes. An image
belongs to the last listing that contains it, because a later listing replaces images that failed or
changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from qwen_vit.export.manifest import ManifestRow
from qwen_vit.inputs.listing import Item, Listing, read_listing

__all__ = ["CurrentImages", "Listings"]


@dataclass(frozen=True)
class Listings:
    """Combine listings in order, with the ids that each listing withdraws.

    A withdrawn id stands for an input that an earlier listing could not list, such as a temporarily
    unreadable folder.
    """

    all: tuple[Listing, ...]
    withdrawn: tuple[Sequence[str], ...] = ((),)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(listing.starts) for listing in self.all))

    @cached_property
    def current(self) -> "CurrentImages":
        return CurrentImages(self)

    @property
    def n_shards(self) -> int:
        return self._ends[-1]

    @property
    def n_images(self) -> int:
        """Return the number of lines. A replaced image has several lines."""
        return sum(listing.n_images for listing in self.all)

    def number_of(self, shard: int) -> int:
        return next(number for number, end in enumerate(self._ends) if shard < end)

    def of(self, shard: int) -> Listing:
        return self.all[self.number_of(shard)]

    def shard(self, shard: int) -> list[Item]:
        return self.of(shard).shard(self._place(shard))

    def shard_length(self, shard: int) -> int:
        return self.of(shard).shard_length(self._place(shard))

    def first_line(self, shard: int) -> int:
        """Return the line of a shard's first image, counted from 0 through all listings."""
        number = self.number_of(shard)
        before = sum(listing.n_images for listing in self.all[:number])
        return before + self._place(shard) * self.all[number].shard_size

    def spread(self, count: int) -> list[Item]:
        return [
            item
            for listing in self.all
            for item in listing.spread(max(1, count * listing.n_images // self.n_images))
        ][:count]

    def facts_of(self, shard: int) -> Mapping[str, Any]:
        listing = self.of(shard)
        return {"n_images": listing.n_images, "listing_sha256": listing.sha256}

    def _place(self, shard: int) -> int:
        return shard - ([0, *self._ends][self.number_of(shard)])


class CurrentImages:
    """Find the lines that no later listing replaces or withdraws."""

    def __init__(self, listings: Listings) -> None:
        self._listings = listings
        self._last: dict[str, int] = {}  # id -> its last later listing, or -1 if withdrawn
        later = zip(listings.all[1:], listings.withdrawn[1:], strict=True)
        for number, (listing, withdrawn) in enumerate(later, start=1):
            self._last |= dict.fromkeys(withdrawn, -1)
            self._last |= {item.id: number for item in read_listing(listing.path)}

    def has(self, shard: int, name: str) -> bool:
        number = self._listings.number_of(shard)
        return self._last.get(name, number) == number

    def rows(self, shard: int, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
        return [row for row in rows if self.has(shard, row.id)] if self._last else list(rows)

    def count(self, shards: Sequence[int]) -> int:
        if not self._last:
            return sum(map(self._listings.shard_length, shards))
        return sum(self.has(s, item.id) for s in shards for item in self._listings.shard(s))
