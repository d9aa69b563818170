"""The plan of an export: its frozen listing, its settings, its folder."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen_vit.common.atomic_file import TEMPORARY_SUFFIX, cannot_write, check_utf8
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.errors import ArgumentError, ExportError, display_name
from qwen_vit.export.lock import LOCK_NAME, hold_folder, short_lock
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.settings import (
    SETTINGS,
    EncoderInfo,
    existing_settings,
    has_shards,
    make_settings,
    write_or_check_settings,
)
from qwen_vit.feature_files.schema import shard_name
from qwen_vit.inputs.find import find_items, no_image_found, warn_of_skipped
from qwen_vit.inputs.listing import Item, Listing
from qwen_vit.inputs.pages import page_items
from qwen_vit.video.sampling import MAX_FRAMES

__all__ = [
    "IMAGE_HEAD_BYTES",
    "TENSOR_HEAD_BYTES",
    "ExportPlan",
    "check_folder",
    "open_export",
    "plan_dry_run",
    "remove_leftovers",
    "reserved_header_bytes",
]

# Of a shard's head, for each image: grid, offset, size, notes, hashes; and a hash of each tensor.
IMAGE_HEAD_BYTES, TENSOR_HEAD_BYTES = 420, 100
MOMENT_BYTES = 14  # of each frame of a video
LEFTOVER = re.compile(r"\.+(?:shard-(\d{8})\.|listing-(\d+)-of-(\d+)\b|export\.|manifest\.).*\.tmp")


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A running export: everything except the encoder that a worker needs to make a shard.

    It can be pickled. `settings` are those of export.json, which every shard repeats in its
    metadata.
    """

    folder: Path
    settings: Mapping[str, Any]
    listing: Listing
    options: ExportOptions

    @property
    def all_shards(self) -> range:
        """The shards of every part."""
        return range(len(self.listing.starts))

    @property
    def shards(self) -> range:
        """The shards of this part."""
        number, count = self.options.part
        return self.all_shards[number - 1 :: count]

    @property
    def n_images(self) -> int:
        """The images of this part."""
        return sum(map(self.listing.shard_length, self.shards))

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / shard_name(shard)


@contextmanager
def open_export(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]], folder: Path,
    options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """Begin or resume an export. The folder is locked while the block runs.

    >>> with open_export(encoder, ["photos"], Path("out"), ExportOptions()) as plan:
    ...     print(plan.n_images)  # doctest: +SKIP

    Raises ExportError, before any image is read, for a folder that is not an export's or that
    another process is writing. Resuming with different inputs or settings is an ExportError that
    names the difference.
    """
    paths = _paths(inputs)
    is_new = not os.path.exists(folder)
    check_folder(folder)
    try:
        with hold_folder(folder, options.part):
            listing = _list(paths, folder, options)
            try:
                facts = make_settings(encoder, listing, options)  # too slow for a short lock
                with short_lock(folder):
                    settings, frozen = write_or_check_settings(folder, facts, listing, options.part)
            finally:  # unless it was moved
                listing.path.unlink(missing_ok=True)
            plan = ExportPlan(folder, settings, frozen, options)
            remove_leftovers(plan)
            if not has_shards(folder):
                _check_heads(plan)
            yield plan
    finally:
        if is_new and options.part == (1, 1):  # removes it only if it is still empty
            with suppress(OSError):
                folder.rmdir()


def reserved_header_bytes(items: Sequence[Item], settings: Mapping[str, Any]) -> int:
    """The bytes to reserve for a shard's header. They follow from the plan, not from the images."""
    names = [name for item in items for name in (item.id, item.source)]
    text = json.dumps({**settings, "ids": names})
    policy = settings.get("image_policy", {}).get("video") or {}
    of_videos = MOMENT_BYTES * (policy.get("n_frames") or policy.get("max_frames") or MAX_FRAMES)
    of_videos *= sum(item.is_video for item in items)
    per_image = IMAGE_HEAD_BYTES + TENSOR_HEAD_BYTES * (1 + len(settings.get("layers", ())))
    return len(json.dumps(text)) + per_image * (len(items) + 1) + of_videos  # JSON within JSON


def _check_heads(plan: ExportPlan) -> None:
    """Raise ExportError for shards of more images than a header can name, before any is made."""
    for shard in plan.shards:
        n_images = plan.listing.shard_length(shard)
        if n_images * IMAGE_HEAD_BYTES < MAX_HEADER_BYTES // 16:  # its names take no 5,000 bytes
            continue
        room = reserved_header_bytes(plan.listing.shard(shard), plan.settings)
        if room > MAX_HEADER_BYTES:
            raise ExportError(
                f"{n_images} images would need a header of up to {room} bytes",
                name=str(plan.path(shard)),
                expected=f"at most {MAX_HEADER_BYTES}, which is what safetensors reads",
                remedy="lower --shard-size",
            )


def _paths(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(inputs, str | bytes | os.PathLike):
        raise ArgumentError(
            f"inputs is one {type(inputs).__name__}",
            expected="a list of paths",
            remedy="pass [inputs]",
        )
    paths: list[str] = []
    for each in inputs:
        if not isinstance(each, str | os.PathLike) or isinstance(os.fspath(each), bytes):
            raise ArgumentError(
                f"inputs holds {each!r}",
                expected="paths as str or Path",
                remedy="decode bytes with os.fsdecode",
            )
        paths.append(os.fspath(each))
    if not paths:
        raise ArgumentError("inputs is empty", expected="files, folders, patterns, lists or tars")
    return paths


@contextmanager
def plan_dry_run(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]], folder: Path | None,
    options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """The plan of an export, for an estimate. Its files are removed when the block ends.

    Raises as `open_export` does, for the inputs and for the folder, unless that is None.
    """
    paths = _paths(inputs)
    if folder is not None:
        check_folder(folder, make=False)
    with TemporaryDirectory(prefix="qwen-vit-") as temporary:
        listing = _list(paths, Path(temporary), options)
        settings: Mapping[str, Any] = {}
        if folder is not None and (folder / SETTINGS).exists():
            settings = make_settings(encoder, listing, options)
            found = existing_settings(folder, settings, listing, options.part)
            settings, listing = found or (settings, listing)
        plan = ExportPlan(Path(temporary), settings, listing, options)
        if folder is None or not folder.exists() or not has_shards(folder):
            _check_heads(plan)
        yield plan


def check_folder(folder: Path, *, make: bool = True) -> None:
    """Make the folder, or raise ExportError for one that holds anything but an export."""
    check_utf8(folder)
    try:
        if not folder.absolute().parent.is_dir():
            raise ExportError("not a folder", name=str(folder.parent), remedy="create it first")
        if os.path.lexists(folder) and not folder.is_dir():
            raise ExportError("not a folder", name=str(folder), remedy="pass another --out")
        if make:
            folder.mkdir(exist_ok=True)
        names = sorted(os.listdir(folder)) if folder.exists() else []
    except OSError as error:
        raise cannot_write(folder, error) from None
    strange = [n for n in names if not LOCK_NAME.fullmatch(n) and not LEFTOVER.fullmatch(n)]
    if strange and SETTINGS not in names:
        raise ExportError(
            f"it holds {display_name(strange[0])} ({len(strange)} in all) and no {SETTINGS}",
            name=str(folder),
            expected="an export or an empty folder",
            remedy="pass another --out",
        )
    written = folder if folder.exists() else folder.absolute().parent
    if not os.access(written, os.W_OK):
        raise ExportError("not writable", name=str(written), remedy="check its permissions")


def _list(inputs: Sequence[str], folder: Path, options: ExportOptions) -> Listing:
    """Freeze the listing under this part's own name."""
    number, count = options.part
    left_out: Counter[str] = Counter()
    path = folder / f".listing-{number}-of-{count}{TEMPORARY_SUFFIX}"
    items = find_items(inputs, left_out, columns=options.columns)
    if options.pages == "all":
        items = page_items(items, options.limits)
    listing = Listing.freeze(path, items, options.shard_size)
    warn_of_skipped(left_out)
    if listing.n_images == 0:
        path.unlink()
        raise no_image_found(inputs, left_out)
    return listing


def remove_leftovers(plan: ExportPlan) -> None:
    """Remove leftovers of killed runs: temporary files of this part or of no part."""
    shards, part = plan.shards, plan.options.part
    with short_lock(plan.folder):
        for name in os.listdir(plan.folder):
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
                    (plan.folder / name).unlink(missing_ok=True)
