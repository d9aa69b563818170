"""Plan an export: its listing, its settings and its folder."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from qwen_vit.common.arguments import check_ordered, typed_repr
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.common.storage import is_remote
from qwen_vit.common.store_path import AnyPath, PathOrAddress
from qwen_vit.errors import ArgumentError, ExportError, Wording, display_name, with_options
from qwen_vit.export.changes import InputChanges, warn_of_other_inputs
from qwen_vit.export.folder import ChangedError, ExportFolder, LocalFolder
from qwen_vit.export.header_size import most_header_bytes, reserved_header_bytes
from qwen_vit.export.list_inputs import list_inputs
from qwen_vit.export.listings import Listings
from qwen_vit.export.lock import short_lock
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.segments import find_segments, remove_segments
from qwen_vit.export.settings import (
    SETTINGS,
    EncoderInfo,
    StoredExport,
    has_shards,
    is_export,
    make_settings,
    read_description,
    read_stored,
    warn_of_new,
)
from qwen_vit.export.store_folder import as_folder
from qwen_vit.export.versions import made_by_of, video_policy_of
from qwen_vit.feature_files.listed import is_made_by
from qwen_vit.feature_files.schema import shard_name
from qwen_vit.inputs.find import STDIN
from qwen_vit.inputs.listing import Listing

__all__ = [
    "ExportPlan",
    "check_folder",
    "check_is_export",
    "open_export",
    "plan_dry_run",
    "remove_leftovers",
]

logger = logging.getLogger("qwen_vit")

LEFTOVER = re.compile(
    r"\.+(?:shard-(\d{8})\.|listing-(\d+)-of-(\d+)\b|listing-\d+\.|export\.|manifest\.).*\.tmp"
)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Hold all values of an export that a worker needs for a shard, except the encoder.

    A plan can be pickled. `settings` are the settings of export.json. A shard's metadata repeats
    them, with the versions of its own run and the facts of its own listing.
    """

    folder: ExportFolder
    settings: Mapping[str, Any]
    listing: Listings
    options: ExportOptions
    made_by: Mapping[str, Any] = field(default_factory=dict)  # this run's versions and GPU
    # other versions that the export accepted after its start
    accepted: Sequence[Mapping[str, Any]] = ()

    @property
    def all_shards(self) -> range:
        return range(self.listing.n_shards)

    @property
    def shards(self) -> range:
        number, count = self.options.part
        return self.all_shards[number - 1 :: count]

    @property
    def n_images(self) -> int:
        """Return the number of lines of the listing in this part. A replaced image has several."""
        return sum(map(self.listing.shard_length, self.shards))

    def path(self, shard: int) -> AnyPath:
        return self.folder / shard_name(shard)

    def has(self, shard: int) -> bool:
        return self.folder.has(shard_name(shard))

    def existing(self) -> set[int]:
        """Return the existing shards of every part."""
        found = self.folder.which_exist(map(shard_name, self.all_shards))
        return {shard for shard in self.all_shards if shard_name(shard) in found}

    def has_any(self) -> bool:
        found = self.folder.names()
        return any(shard_name(shard) in found for shard in self.shards)

    def on_this_host(self) -> Self:
        """Return the plan for the current host, and fetch listings that this host lacks."""
        listings = [
            replace(each, path=self.folder.fetch(each.path.name, each.sha256) or each.path)
            for each in self.listing.all
        ]
        return replace(self, listing=replace(self.listing, all=tuple(listings)))

    def settings_of(self, shard: int) -> dict[str, Any]:
        """Return the settings that a shard repeats if this run writes it."""
        return {**self.settings, **self.made_by, **self.listing.facts_of(shard)}

    def has_settings(self, shard: int, metadata: Mapping[str, Any]) -> bool:
        settings = {**self.settings, **self.listing.facts_of(shard)}
        return is_made_by(metadata, settings, self.accepted)


@contextmanager
def open_export(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]] | None,
    folder: PathOrAddress | ExportFolder, options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """Begin or resume an export. Lock the folder while the block runs.

    >>> with open_export(encoder, ["photos"], Path("out"), ExportOptions()) as plan:
    ...     print(plan.n_images)  # doctest: +SKIP

    If `inputs` is None, the export continues with its own listing. Unless `options.extend` is set,
    the function logs changes of the recorded inputs.
    """
    paths, folder = None if inputs is None else _paths(inputs), as_folder(folder)
    if paths is None:
        check_is_export(folder)
    folder.check(SETTINGS, LEFTOVER, make=True)
    with folder.hold(options.part):
        found = _find(paths, folder, folder.scratch, options)
        try:
            has_videos = _has_videos(found, folder)
            settings = make_settings(encoder, options, has_videos=has_videos)  # slow
            with short_lock(folder.scratch):
                plan = _begin_among_others(settings, paths, found, folder, options)
        finally:  # removes it unless it was moved
            if found is not None:
                found.path.unlink(missing_ok=True)
        folder.check_conditions(SETTINGS)
        remove_leftovers(plan)
        if not has_shards(folder):
            _check_heads(plan)
        yield plan


def check_folder(folder: PathOrAddress, *, make: bool = True) -> None:
    as_folder(folder).check(SETTINGS, LEFTOVER, make=make)


def check_is_export(folder: PathOrAddress | ExportFolder) -> None:
    if not is_export(as_folder(folder)):
        raise ExportError(
            "no export to resume",
            name=str(folder),
            expected="a folder of `qwen-vit export`",
            remedy=Wording(
                "begin an export with inputs", shell="begin an export with INPUTS and --out"
            ),
        )


def _find(
    paths: Sequence[str] | None, folder: ExportFolder, scratch: Path, options: ExportOptions
) -> Listing | None:
    """Write the listing of the inputs to `scratch`, and return the listing.

    Without paths, the function lists the existing export's own inputs. If this machine cannot list
    them, the function returns None. With `options.extend`, it raises ExportError instead.
    """
    if paths is not None:
        return list_inputs(paths, scratch, options, folder.scratch)
    inputs = read_description(folder).get("inputs", {})
    recorded, started_in = inputs.get("paths", []), inputs.get("folder")
    is_here = started_in == os.getcwd() or all(map(_is_absolute, recorded))
    reason = ""
    if not recorded or STDIN in recorded:
        reason = "its inputs were a list on standard input, or are not recorded"
    elif not is_here:
        reason = f"its inputs are relative to {display_name(str(started_in))}"
    else:
        try:
            return list_inputs(recorded, scratch, options, folder.scratch)
        except ExportError as error:
            if options.extend:
                raise
            logger.warning(
                "the export uses its own listing, because its inputs cannot be listed: %s", error
            )
            return None
    if options.extend:
        remedy = Wording("also pass the inputs", shell="also pass INPUTS")
        remedy += "" if is_here or STDIN in recorded else ", or run the command in that folder"
        raise ExportError(reason, name=str(folder), remedy=remedy)
    return None


def _is_absolute(path: str) -> bool:
    return os.path.isabs(path) or is_remote(path)


def _has_videos(found: Listing | None, folder: ExportFolder) -> bool:
    if found is not None and found.n_videos:
        return True
    if not is_export(folder):
        return False
    description = read_description(folder, may_restore=found is not None)
    return bool(video_policy_of(description))


def _begin_among_others(
    settings: Mapping[str, Any], paths: Sequence[str] | None, found: Listing | None,
    folder: ExportFolder, options: ExportOptions,
) -> ExportPlan:  # fmt: skip
    """Begin or resume the export. Try again if another machine changed it first."""
    try:
        return _begin_or_resume(settings, paths, found, folder, options)
    except ChangedError:
        return _begin_or_resume(settings, paths, found, folder, options)


def _begin_or_resume(
    settings: Mapping[str, Any], paths: Sequence[str] | None, found: Listing | None,
    folder: ExportFolder, options: ExportOptions, scratch: Path | None = None,
) -> ExportPlan:  # fmt: skip
    """Return the plan of a new or existing export. With `scratch`, leave the folder unchanged."""
    inputs = {"paths": paths, "folder": os.getcwd(), **_columns(options)}
    stored = read_stored(folder, found, options, may_restart=paths is not None)
    if stored is None:
        if found is None or paths is None:  # another process removed its settings after the check
            raise ExportError("no export to resume", name=str(folder), remedy="start a new export")
        warn_of_new(folder, found, options)
        stored = StoredExport.new(folder, settings, found, inputs)
        if scratch is None:
            stored.save()
    else:
        accepted, changes = stored.accepted, None
        is_same = found is None or [found.sha256] == [each.sha256 for each in stored.listings.all]
        if found is not None and (options.extend or not is_same):
            changes = InputChanges.between(stored.listings, found)
        stored.check(settings, changes if paths is not None or options.extend else None, options)
        if paths is None and changes is not None and not options.extend and changes.describe():
            growth = with_options("; to add the new images, pass {}", ("extend", True))
            logger.warning(
                "the export's inputs changed: %s; the export continues with its own listing%s",
                changes.describe(), growth if changes.new and not changes.moved else "",
            )  # fmt: skip
        is_restored = paths is not None and "inputs" not in stored.description
        if paths is not None and (options.extend or is_restored):
            if scratch is None:
                warn_of_other_inputs(stored.description.get("inputs"), inputs)
            stored.description["inputs"] = inputs
        if is_restored and scratch is None:
            logger.warning("%s: restored from the shards", folder / SETTINGS)
        stored.grow(changes, options, scratch)
        if scratch is None and (is_restored or stored.accepted != accepted):
            stored.save()
        elif scratch is None:
            stored.place_listing()
    made_by = made_by_of(settings, stored.settings)
    return ExportPlan(folder, stored.settings, stored.listings, options, made_by, stored.accepted)


def _columns(options: ExportOptions) -> dict[str, Any]:
    return {
        "column": options.column, "id_column": options.id_column, "pages": options.pages,
        **({"allow_urls": hosts} if (hosts := options.limits.allow_urls) else {}),
    }  # fmt: skip


def _check_heads(plan: ExportPlan) -> None:
    """Raise ExportError if a shard's header might exceed the limit of safetensors."""
    for shard in plan.shards:
        n_images = plan.listing.shard_length(shard)
        settings = plan.settings_of(shard)
        if n_images * most_header_bytes(settings) < MAX_HEADER_BYTES:
            continue
        room = reserved_header_bytes(plan.listing.shard(shard), settings)
        if room > MAX_HEADER_BYTES:
            raise ExportError(
                f"{n_images} images would need a header of up to {room} bytes",
                name=str(plan.path(shard)),
                expected=f"at most {MAX_HEADER_BYTES}, which is the limit of safetensors",
                remedy=with_options("lower {}", "shard_size"),
            )


def _paths(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    check_ordered("inputs", inputs)
    if isinstance(inputs, str | bytes | os.PathLike) or not isinstance(inputs, Iterable):
        raise ArgumentError(
            f"inputs is {typed_repr(inputs)}",
            expected="a list of paths",
            remedy="pass [inputs]",
        )
    paths: list[str] = []
    for each in inputs:
        if not isinstance(each, str | os.PathLike) or isinstance(os.fspath(each), bytes):
            raise ArgumentError(
                f"inputs contains {typed_repr(each)}",
                expected="paths as str or Path",
                remedy="decode a path with os.fsdecode, or encode images in memory with encode_iter"
                if isinstance(each, bytes)
                else "write images to files or a Parquet table, or use encode_iter",
            )
        paths.append(os.fspath(each))
    if not paths:
        raise ArgumentError("inputs is empty", expected="files, folders, patterns, lists or tars")
    return paths


@contextmanager
def plan_dry_run(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]] | None,
    folder: ExportFolder | None, options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """Yield the plan of an export, for an estimate. Remove the plan's files when the block ends."""
    paths = None if inputs is None else _paths(inputs)
    if folder is not None:
        if paths is None:
            check_is_export(folder)
        folder.check(SETTINGS, LEFTOVER, make=False)
    with TemporaryDirectory(prefix="qwen-vit-") as temporary:
        scratch = Path(temporary)
        where = folder or LocalFolder(scratch)
        found = _find(paths, where, scratch, options)
        if folder is not None and is_export(folder):
            has_videos = _has_videos(found, folder)
            settings = make_settings(encoder, options, has_videos=has_videos)
            plan = _begin_or_resume(settings, paths, found, folder, options, scratch)
        else:
            warn_of_new(where, found, options)
            plan = ExportPlan(where, {}, Listings(() if found is None else (found,)), options)
        if folder is None or not has_shards(folder):
            _check_heads(plan)
        yield plan


def remove_leftovers(plan: ExportPlan) -> None:
    """Remove this part's segments of finished shards, and the temporary files of killed runs,
    except files of other parts."""
    shards, part, folder = plan.shards, plan.options.part, plan.folder
    with short_lock(folder.scratch):
        for name in os.listdir(folder.scratch):
            match = LEFTOVER.fullmatch(name)
            if match is None:
                continue
            shard, number, count = (None if text is None else int(text) for text in match.groups())
            is_ours = (
                shard in shards if shard is not None
                else (number, count) == part if number is not None
                else True
            )  # fmt: skip
            if is_ours or part == (1, 1):
                with suppress(OSError):
                    (folder.scratch / name).unlink(missing_ok=True)
        for shard, firsts in find_segments(folder).items():
            if shard in shards and plan.has(shard):  # the shard was completed afterwards
                remove_segments(folder, shard, firsts)
