"""Restore a missing or damaged `export.json` from the shards, which repeat its settings."""

from typing import Any

from qwen_vit.common.strict_json import is_integer
from qwen_vit.errors import ExportError, UnreadableError
from qwen_vit.export.folder import ExportFolder
from qwen_vit.export.versions import made_by_of
from qwen_vit.feature_files.file import open_shard
from qwen_vit.feature_files.listed import LISTINGS
from qwen_vit.feature_files.schema import SHARD, shard_name

__all__ = ["restore_description"]

OF_ONE_SHARD = {"ids", "images", "errors", "patches_per_row"}
OF_LISTING = ("n_images", "listing_sha256")


def restore_description(folder: ExportFolder) -> dict[str, Any] | None:
    """Return an export's description, which lacks the inputs, or None if no shard is intact.

    The versions of the first intact shard become those of the export's start, and other versions
    become accepted ones. No shard records the kind of its listing, or which images a later listing
    withdrew. Every later listing becomes an extension that withdraws no image, and the next
    extension withdraws the images again.
    """
    description: dict[str, Any] = {}
    accepted, listings = list[Any](), list[Any]()
    found = filter(None, map(SHARD.fullmatch, folder.names()))
    for number in sorted(int(match[1]) for match in found):
        try:
            metadata = open_shard(folder / shard_name(number)).metadata
        except UnreadableError:
            raise
        except ExportError:  # the export writes a damaged shard again
            continue
        if not all(is_integer(metadata.get(name)) for name in ("n_images", "shard_size")):
            continue  # a feature file of `encode`
        if not description:
            description = {n: value for n, value in metadata.items() if n not in OF_ONE_SHARD}
        made_by = made_by_of(metadata, description)
        if made_by not in accepted:
            accepted.append(made_by)
        listing = {name: metadata.get(name) for name in OF_LISTING}
        if listing not in listings:
            listings.append(listing)
    if len(accepted) > 1:
        description["accepted"] = accepted[1:]
    if len(listings) > 1:
        description[LISTINGS] = [{"kind": "extend", **each} for each in listings[1:]]
    return description or None
