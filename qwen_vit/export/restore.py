"""Restore a missing or damaged `export.json` from the shards, which repeat its settings."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from qwen_vit.errors import CheckpointError, ExportError, UnreadableError
from qwen_vit.export.folder import ExportFolder
from qwen_vit.export.versions import MADE_BY, POLICY, adds_only_decoders, made_by_of
from qwen_vit.feature_files.file import open_shard
from qwen_vit.feature_files.listed import LISTINGS, OF_EXPORT, listing_name
from qwen_vit.feature_files.schema import SHARD, check_description, shard_name
from qwen_vit.inputs.listing import Listing

__all__ = ["restore_description"]

OF_ONE_SHARD = {"ids", "images", "errors", "patches_per_row"}
OF_LISTING = ("n_images", "listing_sha256")
OPENED_AT_A_TIME = 16  # a store answers slowly


def restore_description(folder: ExportFolder) -> dict[str, Any] | None:
    """Return an export's description without its inputs, or None if the description does not follow
    from the intact shards and the listings.

    The versions of the first intact shard become the export's first versions, and other versions
    become accepted versions. The function ignores shards with other settings. No shard records the
    kind of its listing, or which images a later listing withdrew. Therefore every later listing
    becomes an extension that withdraws no image, and the next extension withdraws the images again.
    """
    matches = filter(None, map(SHARD.fullmatch, folder.names()))
    numbers = sorted(int(match[1]) for match in matches)
    with ThreadPoolExecutor(OPENED_AT_A_TIME) as pool:
        found = pool.map(partial(_settings_in, folder), numbers)
        shards = {n: each for n, each in zip(numbers, found, strict=True) if each is not None}
    if not shards:
        return None
    start = next(iter(shards.values()))
    shards = {n: each for n, each in shards.items() if _may_follow(each, start)}
    listings = _listings(folder, shards, start["shard_size"])
    if listings is None:
        return None
    description = {**start, **listings[0]}
    accepted = list[Any]()
    for each in shards.values():
        made_by = made_by_of(each, start)
        if made_by not in accepted:
            accepted.append(made_by)
    if len(accepted) > 1:
        description["accepted"] = accepted[1:]
    if len(listings) > 1:
        description[LISTINGS] = [{"kind": "extend", **each} for each in listings[1:]]
    return description


def _settings_in(folder: ExportFolder, number: int) -> dict[str, Any] | None:
    """Return the settings that a shard repeats, or None if the file is damaged or is not a
    shard."""
    try:
        metadata = open_shard(folder / shard_name(number)).metadata
        check_description(metadata)  # raises for a feature file of `encode`
    except UnreadableError:
        raise
    except (ExportError, CheckpointError):  # the export writes a damaged shard again
        return None
    if not isinstance(metadata.get("listing_sha256"), str):
        return None
    return {n: value for n, value in metadata.items() if n not in {*OF_ONE_SHARD, *OF_EXPORT}}


def _may_follow(settings: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Return whether only the versions, the listing and a missing decoder differ."""
    names = {*settings, *start} - {*MADE_BY, *OF_LISTING, POLICY}
    ours, first = ({POLICY: each.get(POLICY)} for each in (settings, start))
    return all(settings.get(name) == start.get(name) for name in names) and (
        adds_only_decoders(first, ours) or adds_only_decoders(ours, first)
    )


def _listings(
    folder: ExportFolder, shards: Mapping[int, Mapping[str, Any]], shard_size: int
) -> Sequence[Mapping[str, Any]] | None:
    """Return the facts of each listing up to the last shard, or None if they contradict the shards.

    If no shard of a listing is intact, the function takes the facts from the listing's file. The
    file of every later listing must then be intact.
    """
    numbers, found, first = sorted(shards), list[Mapping[str, Any]](), 0
    may_replace_files = True
    while first <= numbers[-1]:
        place = bisect_left(numbers, first)
        facts = {name: shards[numbers[place]][name] for name in OF_LISTING}
        stored = _facts_of_file(folder, len(found), facts["listing_sha256"], shard_size)
        if stored is not None and stored != facts:
            end = first - (-stored["n_images"] // shard_size)
            if end <= numbers[place] and (found or end > first):
                facts, may_replace_files = stored, False
        if stored != facts and not may_replace_files:
            return None
        end = first - (-facts["n_images"] // shard_size)
        of_listing = numbers[place : bisect_left(numbers, end)]
        # `facts` may come from a later listing: two retries of the same images have equal listings
        if not of_listing and stored != facts:
            return None
        if any(shards[number][name] != facts[name] for number in of_listing for name in facts):
            return None
        found.append(facts)
        first = end
    return found


def _facts_of_file(
    folder: ExportFolder, number: int, sha256: str, shard_size: int
) -> dict[str, Any] | None:
    path = folder.fetch(listing_name(number), sha256)
    try:
        listing = None if path is None else Listing.open(path, shard_size)
    except OSError:
        return None
    if listing is None:
        return None
    return {"n_images": listing.n_images, "listing_sha256": listing.sha256}
