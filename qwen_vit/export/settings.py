"""Write the settings of a new export, and compare the settings of a resumed export.

`export.json` contains all settings that determine a shard's bytes: the model, its hashes, the
options, the versions and the listing's hash. Every shard repeats these settings, with the versions
of its own run and the hash of its own listing. `export.json` also names later listings, later
accepted versions and the inputs, which no shard repeats.
"""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from qwen_vit.common.atomic_file import cannot_write
from qwen_vit.errors import (
    ExportError,
    UnreadableError,
    Wording,
    plural,
    with_options,
)
from qwen_vit.export.changes import InputChanges, failed_items
from qwen_vit.export.folder import OTHER_FOLDER, ExportFolder
from qwen_vit.export.listings import Listings
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.restore import restore_description
from qwen_vit.export.versions import MADE_BY, adds_only_decoders, flat, made_by_of, makers_in
from qwen_vit.feature_files import schema
from qwen_vit.feature_files.head import cannot_read
from qwen_vit.feature_files.listed import LISTINGS, OF_EXPORT, listing_name, listings_of
from qwen_vit.feature_files.schema import (
    READABLE,
    SCHEMA_VERSION,
    SHARD,
    shard_name,
)
from qwen_vit.images.image import EXIF_IGNORED
from qwen_vit.inputs.listing import Item, Listing
from qwen_vit.video.source import decoder_name

__all__ = [
    "LISTING",
    "SETTINGS",
    "EncoderInfo",
    "StoredExport",
    "has_shards",
    "is_export",
    "make_settings",
    "read_description",
    "read_stored",
    "warn_of_new",
]

logger = logging.getLogger("qwen_vit")

SETTINGS, LISTING = "export.json", listing_name(0)
# Hashes show whether weights are equal. Equal weights may have another name.
NAMES_ALONE = {"model", "commit"}
NOT_OF_PIXELS = {"max_seconds", "allow_urls"}  # these may change when resuming
OF_LISTING = {"n_images", "listing_sha256"}
SHARD_OR_SEGMENT = re.compile(r"(?:shard-\d+|segment-\d+-\d+)\.safetensors")


class EncoderInfo(Protocol):
    """Describe an encoder for an export, in any process."""

    def metadata(self) -> dict[str, Any]: ...


def make_settings(
    encoder: EncoderInfo, options: ExportOptions, *, has_videos: bool
) -> dict[str, Any]:
    """Return the settings of an export as JSON values, without the listing's facts.

    The first call for an encoder hashes the weights, which takes time.
    """
    metadata = encoder.metadata()
    if has_videos or options.as_video:
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
        "limits": {k: v for k, v in asdict(options.limits).items() if k not in NOT_OF_PIXELS},
    }
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]  # lists, not tuples


def _video_policy(options: ExportOptions) -> dict[str, Any]:
    return {
        **asdict(options.video),
        "as_video": options.as_video,
        "decoder": decoder_name(),
        "limits": asdict(options.video_limits),
    }


@dataclass(slots=True)
class StoredExport:
    """Hold the settings and listings of the export in a folder."""

    folder: ExportFolder
    description: dict[str, Any]
    listings: Listings
    version: str | None = None  # of export.json, in a store

    @classmethod
    def new(
        cls, folder: ExportFolder, settings: Mapping[str, Any], listing: Listing,
        inputs: Mapping[str, Any],
    ) -> Self:  # fmt: skip
        """Create an export of one listing, whose file still has a temporary name.

        `save` replaces the settings that an export without shards left in the folder.
        """
        facts = {"n_images": listing.n_images, "listing_sha256": listing.sha256}
        description = {**settings, **facts, "inputs": dict(inputs)}
        return cls(folder, description, Listings((listing,)), folder.version(SETTINGS))

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings with which the export started."""
        return {n: value for n, value in self.description.items() if n not in OF_EXPORT}

    @property
    def accepted(self) -> Sequence[Mapping[str, Any]]:
        """Return the versions that the export accepted after its start."""
        found: list[Mapping[str, Any]] = self.description.get("accepted", [])
        return found

    def save(self) -> None:
        """Write the description, and move the first listing to its place.

        Raises ChangedError as `ExportFolder.write` does.
        """
        text = json.dumps(self.description, sort_keys=True, indent=1)
        self.version = self.folder.write(SETTINGS, text.encode() + b"\n", self.version)
        self.place_listing()

    def place_listing(self) -> None:
        """Move the first listing to its place, where it replaces an earlier file."""
        first, *later = self.listings.all
        path = self.folder.scratch / LISTING
        if first.path != path:
            try:
                os.replace(first.path, path)
            except OSError as error:
                raise cannot_write(path, error) from None
            self.listings = replace(self.listings, all=(replace(first, path=path), *later))
        # an earlier run may have ended before this
        if first.path != path or not self.folder.has(LISTING):
            self.folder.publish(LISTING, replace=True, keep=True)

    def check(
        self, settings: Mapping[str, Any], changes: InputChanges | None, options: ExportOptions
    ) -> None:
        """Raise ExportError if the current settings or inputs differ from those of the export.

        The model's name and commit may differ. With `options.extend`, the inputs may differ, unless
        an image is in another place. The method accepts versions that only add a missing decoder,
        and adds them to `accepted`. With `options.accept_versions`, it accepts all versions.
        """
        ours = makers_in(settings)
        known = [makers_in({**self.settings, **each}) for each in ({}, *self.accepted)]
        versions = {name: ours[name] for name in MADE_BY}
        last = {**known[-1], **(versions if options.accept_versions else {})}
        if ours not in known and adds_only_decoders(last, ours):
            self.description["accepted"] = [*self.accepted, made_by_of(settings, self.settings)]
            known.append(ours)
        closest = min(
            reversed(known), key=lambda each: (each != ours, {**each, **versions} != each)
        )
        before = flat({**self.settings, **closest})
        now = flat(settings)
        names = {name for name in {*before, *now} if before.get(name) != now.get(name)}
        names -= NAMES_ALONE | OF_LISTING
        if len(names) > 1:
            names.discard("config_sha256")  # the comparison names each setting of the config
        words = [] if changes is None else [changes.describe()]
        if changes is not None and options.extend and not changes.moved:
            words = []
        differences = [f"its images: {each}" for each in words if each]
        differences += [
            f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')} now"
            for name in sorted(names)
        ]
        if differences:
            raise self._differs(differences, names, changes)

    def _differs(
        self, differences: Sequence[str], names: set[str], changes: InputChanges | None
    ) -> ExportError:
        ways = ["to continue this export, pass its original inputs and settings"]
        if changes is not None and changes.moved:
            ways = ["if the images moved, move them back, and pass the export's settings"]
        is_same_start = all(name.partition(".")[0] in MADE_BY for name in names)
        if names and is_same_start:
            ways.append(
                with_options("to continue with these versions, pass {}", ("accept_versions", True))
            )
        if changes is not None and changes.describe() and not changes.moved:
            aim = changes.aim_of_extend()
            if "inputs" in self.description:
                resume = f", or only --resume {self.folder}"
                ways[0] += Wording(", or inputs of None", shell=resume)
            else:
                aim = f"restore {SETTINGS} and {aim or 'keep the features of the missing images'}"
            if is_same_start and aim:
                ways.append(with_options(f"to {aim}, pass {{}}", ("extend", True)))
        ways.append("to start a new export, " + OTHER_FOLDER)
        if not has_shards(self.folder):
            ways[-1] += f", or delete {self.folder / SETTINGS}: no shard exists yet"
        return ExportError(
            f"the folder contains a different export: {'; '.join(differences)}",
            name=str(self.folder),
            remedy=Wording.joined("; ", ways),
        )

    def grow(
        self, changes: InputChanges | None, options: ExportOptions, scratch: Path | None = None
    ) -> None:
        """Append listings of new, changed and failed images, according to the options.

        With `scratch`, the method writes the listings into that folder and does not save the
        description.
        """
        if options.extend and changes is not None:
            changed, failed = changes.changed(self.folder, self.listings, options.limits)
            changed += changes.replaced
            withdrawn = [item.id for item in changes.gone if item.error is not None]
            changes.log_growth(changed, failed)
            self._append("extend", [*changes.new, *changed, *failed], withdrawn, scratch)
        if options.retry_failed and self._has_open_retry():
            logger.warning(
                "an earlier run with %s is unfinished: this run finishes its retries, and starts "
                "no new ones",
                with_options("{}", "retry_failed"),
            )
        elif options.retry_failed:
            failed = list(failed_items(self.folder, self.listings))
            again = [item for item in failed if item.error is None]
            if len(again) < len(failed):
                logger.warning(
                    "not retried: %s while listing; pass %s to list these inputs again",
                    plural(len(failed) - len(again), "failure"),
                    with_options("{}", "extend"),
                )
            self._append("retry", again, [], scratch)

    def _has_open_retry(self) -> bool:
        """Return whether a shard of images to retry is missing."""
        facts = listings_of(self.description, self.folder / SETTINGS)[1:]
        entries = self.description.get(LISTINGS, [])
        return any(
            not self.folder.has(shard_name(shard))
            for entry, listing in zip(entries, facts, strict=True)
            if entry["kind"] == "retry"
            for shard in listing.shards
        )

    def _append(
        self, kind: str, items: Sequence[Item], withdrawn: Sequence[str], scratch: Path | None
    ) -> None:
        """Write the file of another listing, and then add the listing to `export.json`."""
        if not items and not withdrawn:
            return
        name = listing_name(len(self.listings.all))
        path = (scratch or self.folder.scratch) / name
        listing = Listing.save(path, items, self.description["shard_size"])
        if scratch is None:  # a killed extension may have left another file
            self.folder.publish(name, replace=True, keep=True)
        entry = {"kind": kind, "n_images": listing.n_images, "listing_sha256": listing.sha256}
        if withdrawn:
            entry["withdrawn"] = list(withdrawn)
        self.description[LISTINGS] = [*self.description.get(LISTINGS, []), entry]
        self.listings = Listings(
            (*self.listings.all, listing), (*self.listings.withdrawn, tuple(withdrawn))
        )
        if scratch is None:
            self.save()


def read_stored(
    folder: ExportFolder, found: Listing | None, options: ExportOptions, *, may_restart: bool
) -> StoredExport | None:
    """Return the export in the folder, or None if the folder has no export.

    The listing of the inputs, `found`, replaces a missing or damaged listing with the same hash.
    With `may_restart`, and if this run is not split into parts, the function ignores an export
    without shards.
    """
    if not is_export(folder):
        return None
    version = folder.version(SETTINGS)
    description = read_description(folder, may_restore=found is not None)
    # without a shard, for example after the size was declined, there is nothing to compare
    is_begun = has_shards(folder) or "listing_sha256" not in description
    if may_restart and options.part == (1, 1) and not is_begun:
        return None
    stored_schema = description.get("schema_version")
    if stored_schema in READABLE and stored_schema != SCHEMA_VERSION:
        raise ExportError(
            f"the folder contains an export of schema {stored_schema}",
            name=str(folder),
            expected=f"schema {SCHEMA_VERSION}, which this version of qwen_vit writes",
            remedy="finish it with the version that began it, or "
            + OTHER_FOLDER
            + "; load_features reads both",
        )
    return StoredExport(folder, description, _read_listings(folder, description, found), version)


def warn_of_new(folder: ExportFolder, found: Listing | None, options: ExportOptions) -> None:
    """Warn about options that have no effect on a new export. If the new export replaces one
    without shards, also warn about changed inputs."""
    for name in ("extend", "retry_failed", "accept_versions"):
        if getattr(options, name):
            option = with_options("{}", (name, True))
            logger.warning("%s: this run starts a new export: %s has no effect", folder, option)
    with suppress(ExportError):  # there is no earlier export, or its listing is damaged
        before = _read_listings(folder, read_description(folder), None)
        changes = "" if found is None else InputChanges.between(before, found).describe()
        if changes:
            logger.warning(
                "%s: no shard exists, so this run starts a new export. Its inputs changed: %s",
                folder, changes,
            )  # fmt: skip


def read_description(folder: ExportFolder, *, may_restore: bool = False) -> dict[str, Any]:
    """Read export.json. If the file is missing or damaged, and `may_restore` is True, return the
    description restored from the shards."""
    path = folder / SETTINGS
    try:
        description = schema.read_description(path, () if folder.has(SETTINGS) else folder.names())
        listings_of(description, path)  # raises for a damaged list of listings
    except UnreadableError:
        raise
    except OSError as error:
        raise cannot_read(path, error) from None
    except ExportError as error:
        if not may_restore:
            raise
        restored = restore_description(folder)
        if restored is None:
            raise ExportError.of(error, remedy=OTHER_FOLDER) from None
        return restored
    return description


def _read_listings(
    folder: ExportFolder, description: Mapping[str, Any], found: Listing | None
) -> Listings:
    facts = listings_of(description, folder / SETTINGS)
    listings = []
    for each in facts:
        listing = None
        with suppress(OSError):
            path = folder.fetch(each.name, each.sha256)
            if path is not None:
                listing = Listing.open(path, description["shard_size"])
        if listing is None or listing.sha256 != each.sha256:
            listing = found
            if found is not None:  # `changed` must compare every image, as newer than this listing
                os.utime(found.path, (0, 0))
        if listing is None or listing.sha256 != each.sha256:
            raise ExportError(
                f"cannot compare images: {each.name} is missing or corrupt",
                name=str(folder),
                remedy="to continue this export, pass its original inputs; to start a new export, "
                + OTHER_FOLDER,
            )
        listings.append(listing)
    return Listings(tuple(listings), tuple(each.withdrawn for each in facts))


def is_export(folder: ExportFolder) -> bool:
    """Return whether a folder contains an export, which may lack its `export.json`."""
    return folder.has(SETTINGS) or any(map(SHARD.fullmatch, folder.names()))


def has_shards(folder: ExportFolder) -> bool:
    """Return whether a folder contains a finished shard or a segment of a shard."""
    return any(map(SHARD_OR_SEGMENT.fullmatch, folder.names()))
