"""Find the shard of each image of an export folder, from the folder's listings."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.store_path import AnyPath
from qwen_vit.common.strict_json import is_integer
from qwen_vit.errors import ExportError
from qwen_vit.feature_files.schema import RESTORE, read_listing

__all__ = [
    "LISTINGS",
    "OF_EXPORT",
    "ListedImages",
    "ListingFacts",
    "is_made_by",
    "listing_name",
    "listings_of",
]

# The keys of export.json that no shard repeats: later listings, later accepted versions, and where
# the images were found.
LISTINGS = "more_listings"
OF_EXPORT = (LISTINGS, "accepted", "inputs")


class ListingFacts(NamedTuple):
    """Describe one listing of an export folder, and its shards."""

    name: str
    n_images: int
    sha256: str | None
    shards: range
    withdrawn: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the facts about this listing that the listing's shards record."""
        return {"n_images": self.n_images, "listing_sha256": self.sha256}


def listing_name(number: int) -> str:
    """Return the file name of an export's listing.

    >>> listing_name(0), listing_name(2)
    ('listing.jsonl', 'listing-0002.jsonl')
    """
    return f"listing-{number:04}.jsonl" if number else "listing.jsonl"


def listings_of(description: Mapping[str, Any], path: AnyPath) -> list[ListingFacts]:
    """Return the listings that an export's description names, in order. `path` is for errors."""
    found, first = list[ListingFacts](), 0
    for number, entry in enumerate(_entries(description, path)):
        n_images = entry["n_images"]
        shards = range(first, first - (-n_images // description["shard_size"]))
        found.append(
            ListingFacts(
                listing_name(number), n_images, entry.get("listing_sha256"), shards,
                entry.get("withdrawn", ()),
            )
        )  # fmt: skip
        first = shards.stop
    return found


def is_made_by(
    metadata: Mapping[str, Any], settings: Mapping[str, Any], accepted: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether a shard's metadata match an export's settings. The versions may be those of
    the export's start, or versions that it accepted later."""
    return any(
        all(metadata.get(name) == value for name, value in {**settings, **made_by}.items())
        for made_by in ({}, *accepted)
    )


def _entries(description: Mapping[str, Any], path: AnyPath) -> list[Mapping[str, Any]]:
    more = description.get(LISTINGS, [])
    if isinstance(more, list) and all(_is_entry(entry) for entry in more):
        return [description, *more]
    raise ExportError(
        f"its {LISTINGS} are {short_repr(more)}",
        name=str(path),
        expected="n_images and listing_sha256 of each listing",
        remedy=RESTORE,
    )


def _is_entry(entry: Any) -> bool:
    withdrawn = entry.get("withdrawn", []) if isinstance(entry, dict) else None
    if not isinstance(withdrawn, list) or not all(isinstance(name, str) for name in withdrawn):
        return False
    n_images = entry.get("n_images")
    return is_integer(n_images) and n_images >= 0 and isinstance(entry.get("listing_sha256"), str)


class ListedImages:
    """Find the images of an export's listings. An image belongs to the last listing that contains
    it, unless a later listing withdraws it."""

    def __init__(self, folder: AnyPath, description: Mapping[str, Any]) -> None:
        self._description = description
        self._shard_size: int = description["shard_size"]
        self._listings = [
            (facts, read_listing(folder / facts.name, facts.n_images))
            for facts in listings_of(description, folder / "export.json")
        ]

    @property
    def n_shards(self) -> int:
        return self._listings[-1][0].shards.stop

    @cached_property
    def shard_of(self) -> Mapping[str, int]:
        """Return the shard of each image, in the order of the listings.

        An image that was withdrawn and listed again takes its later place.
        """
        shards: dict[str, int] = {}
        for facts, ids in self._listings:
            for name in facts.withdrawn:
                shards.pop(name, None)
            first, size = facts.shards.start, self._shard_size
            shards |= {name: first + line // size for line, name in enumerate(ids)}
        return shards

    @property
    def ids(self) -> Sequence[str]:
        """Return the id of each image once, in the order of `shard_of`."""
        return list(self.shard_of) if len(self._listings) > 1 else self._listings[0][1]

    def listing_of(self, shard: int) -> ListingFacts:
        return next(facts for facts, _ in self._listings if shard in facts.shards)

    def has_settings(self, shard: int, metadata: Mapping[str, Any]) -> bool:
        settings = {n: value for n, value in self._description.items() if n not in OF_EXPORT}
        settings |= self.listing_of(shard).to_json()
        return is_made_by(metadata, settings, self._description.get("accepted", ()))

    def of(self, shard: int) -> Sequence[str]:
        """Return the ids in a shard's lines of the listing, including those of images replaced
        later."""
        facts, ids = next(each for each in self._listings if shard in each[0].shards)
        start = (shard - facts.shards.start) * self._shard_size
        return ids[start : start + self._shard_size]

    def is_current(self, shard: int, name: str) -> bool:
        """Return whether no later listing replaced or withdrew a shard's image."""
        return len(self._listings) == 1 or self.shard_of.get(name) == shard
