"""The settings of an export: written once, and compared when the export is resumed.

`export.json` holds everything that decides a shard's bytes: the model, its hashes, the options and
the listing's hash. Every shard repeats it.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, Protocol

from qwen_vit.common.atomic_file import atomic_file, cannot_write
from qwen_vit.common.strict_json import read_json
from qwen_vit.errors import CheckpointError, ExportError, display_name
from qwen_vit.export.options import ExportOptions
from qwen_vit.feature_files.schema import READABLE, SCHEMA_VERSION
from qwen_vit.images.image import EXIF_IGNORED
from qwen_vit.inputs.listing import Item, Listing, read_listing
from qwen_vit.video.source import decoder_name

__all__ = [
    "LISTING",
    "SETTINGS",
    "EncoderInfo",
    "existing_settings",
    "has_shards",
    "make_settings",
    "write_or_check_settings",
]

SETTINGS, LISTING = "export.json", "listing.jsonl"
# Another name of the same weights is the same model: hashes decide.
NAMES_ALONE = {"model", "commit"}
SHARD = re.compile(r"shard-\d+\.safetensors")


class EncoderInfo(Protocol):
    """The facts about an encoder that an export records, from any process."""

    def metadata(self) -> dict[str, Any]:
        """As `VisionEncoder.metadata`."""


def make_settings(encoder: EncoderInfo, listing: Listing, options: ExportOptions) -> dict[str, Any]:
    """The settings of an export as JSON values. Hashes the weights, which takes a moment."""
    metadata = encoder.metadata()
    if listing.n_videos or options.as_video:
        metadata["image_policy"] = {**metadata["image_policy"], "video": _video_policy(options)}
    settings = {
        **metadata,
        "schema_version": SCHEMA_VERSION,
        "computed_in": metadata["dtype"],
        "dtype": options.dtype or metadata["dtype"],
        "image_policy": {
            **metadata["image_policy"],
            **({"orientation": EXIF_IGNORED} if options.exif == "ignore" else {}),
        },
        "output": options.output,
        "normalize": options.normalize,
        "layers": options.layers,
        "shard_size": options.shard_size,
        # seconds depend on the machine: they may be raised when resuming
        "limits": {k: v for k, v in asdict(options.limits).items() if k != "max_seconds"},
        "n_images": listing.n_images,
        "listing_sha256": listing.sha256,
    }
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]  # lists, not tuples


def _video_policy(options: ExportOptions) -> dict[str, Any]:
    """How videos become patches. PyAV's version decides their pixels."""
    return {
        **asdict(options.video),
        "as_video": options.as_video,
        "decoder": decoder_name(),
        "limits": asdict(options.video_limits),
    }


def write_or_check_settings(
    folder: Path, settings: dict[str, Any], listing: Listing, part: tuple[int, int]
) -> tuple[dict[str, Any], Listing]:
    """Write the settings and the listing into the folder, or check that they are those there.

    Returns both as the export has them; the listing's file has then moved into the folder. Raises
    ExportError that names the differences if the folder belongs to a different export.
    """
    found = existing_settings(folder, settings, listing, part)
    if found is None:
        with atomic_file(folder / SETTINGS) as file:
            file.write(json.dumps(settings, sort_keys=True, indent=1).encode() + b"\n")
    settings, listing = found or (settings, listing)
    try:
        os.replace(listing.path, folder / LISTING)  # an existing one has the same bytes
    except OSError as error:
        raise cannot_write(folder / LISTING, error) from None
    return settings, replace(listing, path=folder / LISTING)


def existing_settings(
    folder: Path, settings: Mapping[str, Any], listing: Listing, part: tuple[int, int]
) -> tuple[dict[str, Any], Listing] | None:
    """The settings and the listing of the export in the folder, or None if none was begun.

    The listing's file is still the one that was passed. Raises as `write_or_check_settings` does.
    """
    path = folder / SETTINGS
    if not path.exists():
        return None
    stored = _read_settings(path)
    # without a shard, for example after a refusal for size, there is nothing to differ from
    if part == (1, 1) and "listing_sha256" in stored and not has_shards(folder):
        return None
    version = stored.get("schema_version")
    if version in READABLE and version != SCHEMA_VERSION:
        raise ExportError(
            f"it holds an export of schema {version}",
            name=str(folder),
            expected=f"schema {SCHEMA_VERSION}, which this version of qwen_vit writes",
            remedy="finish it with the version that began it, or pass another --out; load_features "
            "reads both",
        )
    listing = _stored_listing(folder / LISTING, stored, listing)
    _check_same(path, stored, {**settings, "listing_sha256": listing.sha256}, listing)
    return stored, listing


def has_shards(folder: Path) -> bool:
    """Whether an existing folder holds any whole shard."""
    return any(SHARD.fullmatch(name) for name in os.listdir(folder))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ExportError.of(error, remedy="pass another --out") from None


def _stored_listing(path: Path, stored: Mapping[str, Any], listing: Listing) -> Listing:
    """The listing of the export's start, if this one differs only in its messages.

    Another version of this package may word an error differently; the listing's hash is part of
    every shard and must not change with it.
    """
    if listing.sha256 == stored.get("listing_sha256") or not _is_intact(path, stored):
        return listing
    if listing.n_images != stored.get("n_images"):
        return listing
    pairs = zip(read_listing(path), read_listing(listing.path), strict=True)
    if any(_without_message(before) != _without_message(now) for before, now in pairs):
        return listing
    return Listing.freeze(listing.path, read_listing(path), listing.shard_size)


def _without_message(item: Item) -> Item:
    """An image of a listing, with only the code of its error."""
    return item if item.error is None else replace(item, error=(item.error[0], ""))


def _is_intact(path: Path, stored: Mapping[str, Any]) -> bool:
    """Whether this is the listing that the settings name."""
    try:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest() == stored.get("listing_sha256")
    except OSError:
        return False


def _check_same(
    path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any], listing: Listing
) -> None:
    before, now = _flat(stored), _flat(settings)
    names = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    names -= NAMES_ALONE
    if not names:
        return
    if len(names) > 1:
        names.discard("config_sha256")  # its settings are compared by name
    differences, input_hint = [], ""
    if "listing_sha256" in names:
        names -= {"listing_sha256", "n_images"}
        difference, input_hint = _listing_difference(path.with_name(LISTING), listing, stored)
        differences.append(difference)
    differences += [
        f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')} now"
        for name in sorted(names)
    ]
    no_shard = "" if has_shards(path.parent) else f", or delete {path}: no shard exists yet"
    raise ExportError(
        f"it holds an export that differs: {'; '.join(differences)}",
        name=str(path.parent),
        remedy=f"to continue, pass the inputs and settings that it was started with{input_hint}; "
        f"to start a new export, pass another --out{no_shard}",
    )


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat


def _listing_difference(
    before: Path, listing: Listing, stored: Mapping[str, Any]
) -> tuple[str, str]:
    """How the images differ, and a hint at the input that has those of the start."""
    if not _is_intact(before, stored):
        return f"cannot compare images: {before.name} is missing or corrupt", ""
    old = {item.id: _without_message(item) for item in read_listing(before)}
    new = {item.id: _without_message(item) for item in read_listing(listing.path)}
    gone, added = [i for i in old if i not in new], [i for i in new if i not in old]
    moved = [i for i in new if i in old and new[i] != old[i]]
    reported = [
        f"{len(names)} {what}, first {display_name(names[0])}"
        for names, what in ((gone, "missing"), (added, "new"), (moved, "in another place"))
        if names
    ]
    hint = f" (as input, pass {before})"
    if moved:
        reported[-1] += f" (it was in {display_name(old[moved[0]].source)})"
        hint = ""  # the stored listing has old paths of the images
    return f"its images: {'; '.join(reported) or 'in another order'}", hint
