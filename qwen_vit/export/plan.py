"""The plan of an export: its options, its frozen listing, and the folder that it goes to."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol, Self

import torch

from qwen_vit.batching import OnError
from qwen_vit.common.atomic_file import TEMPORARY_SUFFIX, atomic_file, cannot_write, check_utf8
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.common.strict_json import is_integer, read_json
from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError, ExportError, display_name
from qwen_vit.export.lock import LOCK_NAME, hold_folder, short_lock
from qwen_vit.feature_files.schema import SCHEMA_VERSION, shard_name
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.patches import smart_resize
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item, Listing, read_listing

__all__ = [
    "LISTING",
    "SETTINGS",
    "EncoderInfo",
    "ExportOptions",
    "ExportPlan",
    "RowFormat",
    "check_folder",
    "has_shards",
    "open_export",
    "plan_dry_run",
    "remove_leftovers",
    "reserved_header_bytes",
    "target_size",
]

logger = logging.getLogger("qwen_vit")

Output = Literal["merged", "patch", "mean"]
STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS, LISTING = "export.json", "listing.jsonl"
SUFFIXES_TOLD = 5
# Another name for the same weights is the same model: their hashes are compared.
NAMES_ALONE = {"model", "commit"}
IMAGE_HEAD_BYTES = 320  # of a shard's head, besides names: grid, offset, hash, size, notes
SHARD = re.compile(r"shard-\d+\.safetensors")
LEFTOVER = re.compile(r"\.+(?:shard-(\d{8})\.|listing-(\d+)-of-(\d+)\b|export\.|manifest\.).*\.tmp")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How images are exported.

    >>> ExportOptions(output="mean", part=(2, 8)).shard_size
    512

    `output`: "merged" rows are what the language model takes, "patch" rows un-merged patches, and
    "mean" is one row per image, the mean of its merged ones (in float32). `dtype` is how they are
    stored, None as they were computed. `part` (I, N) takes every N-th shard, starting with the
    I-th. `max_failures` in a row stop an export: something else is broken then (0: never).
    Raises ArgumentError for a value that makes no sense.
    """

    output: Output = "merged"
    dtype: Literal["float32", "bfloat16"] | None = None
    shard_size: int = 512
    on_error: OnError = "skip"
    part: tuple[int, int] = (1, 1)
    max_failures: int = 200
    limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        is_part = (
            isinstance(self.part, tuple) and len(self.part) == 2 and all(map(is_integer, self.part))
        )
        for is_right, name, expected in (
            (self.output in ("merged", "patch", "mean"), "output", "'merged', 'patch' or 'mean'"),
            (self.dtype in (None, *STORAGE), "dtype", f"None, {' or '.join(map(repr, STORAGE))}"),
            (
                is_integer(self.shard_size) and self.shard_size >= 1,
                "shard_size",
                "at least 1 image",
            ),
            (self.on_error in ("skip", "raise"), "on_error", "'skip' or 'raise'"),
            (is_part and 1 <= self.part[0] <= self.part[1], "part", "(I, N) with I from 1 to N"),
            (
                is_integer(self.max_failures) and self.max_failures >= 0,
                "max_failures",
                "0 (never stop) or more",
            ),
            (isinstance(self.limits, ImageLimits), "limits", "ImageLimits"),
        ):
            if not is_right:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What one row of the features is: its width, its type, and the patches that it stands for.

    `patches_per_row` is None where an image has one row, however many patches.
    """

    width: int
    dtype: torch.dtype
    patches_per_row: int | None

    @classmethod
    def of(cls, encoder: VisionEncoder, options: ExportOptions) -> Self:
        """The form that an encoder's features take under these options."""
        config = encoder.config
        dtype = encoder.dtype if options.dtype is None else STORAGE[options.dtype]
        if options.output == "patch":
            return cls(config.hidden_size, dtype, 1)
        per_row = None if options.output == "mean" else config.merge_unit
        return cls(config.out_hidden_size, dtype, per_row)

    def count(self, n_patches: int) -> int:
        """The rows of an image."""
        return 1 if self.patches_per_row is None else n_patches // self.patches_per_row


def target_size(height: int, width: int, config: ImageConfig, name: str) -> tuple[int, int]:
    """The size in pixels at which an image is encoded; ImageError, which says `name`, for none."""
    return smart_resize(
        height,
        width,
        factor=config.patch_px * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        name=name,
    )


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that is under way: all that a worker needs, besides the encoder, to make a shard.

    `settings` are those of export.json, which every shard repeats in its metadata.
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
        """Where a shard lies."""
        return self.folder / shard_name(shard)


class EncoderInfo(Protocol):
    """What an export records of an encoder, wherever that is."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def metadata(self) -> dict[str, Any]:
        """As `VisionEncoder.metadata`."""


@contextmanager
def open_export(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]], folder: Path,
    options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """Begin an export, or take one up again: the folder is held while the block runs.

    Raises ExportError, before any image is read, for a folder that is not an export's, that
    somebody else is writing, or that has other settings or images, which are named.
    """
    paths = _paths(inputs)
    is_new = not os.path.exists(folder)
    check_folder(folder)
    try:
        with hold_folder(folder, options.part):
            listing = _list(paths, folder, options)
            try:
                facts = _settings(encoder, listing, options)  # it hashes the weights: no moment
                with short_lock(folder):
                    settings = write_or_check_settings(folder, facts, listing, options.part)
            finally:  # where it has not taken its place
                listing.path.unlink(missing_ok=True)
            plan = ExportPlan(folder, settings, replace(listing, path=folder / LISTING), options)
            remove_leftovers(plan)
            if not has_shards(folder):
                _check_heads(plan)
            yield plan
    finally:
        if is_new and options.part == (1, 1):  # and empty: nothing came of it, nor will of others
            with suppress(OSError):
                folder.rmdir()


def reserved_header_bytes(items: Sequence[Item], settings: Mapping[str, Any]) -> int:
    """The bytes to leave for a shard's head; what it follows from is known before any image is."""
    names = [name for item in items for name in (item.id, item.source)]
    text = json.dumps({**settings, "ids": names})
    return len(json.dumps(text)) + IMAGE_HEAD_BYTES * (len(items) + 1)  # JSON within JSON


def _check_heads(plan: ExportPlan) -> None:
    """Raise ExportError for shards of more images than a header can name, before any is made."""
    for shard in plan.shards:
        n_images = plan.listing.shard_length(shard)
        if n_images * IMAGE_HEAD_BYTES < MAX_HEADER_BYTES // 16:  # its names take no 5,000 bytes
            continue
        room = reserved_header_bytes(plan.listing.shard(shard), plan.settings)
        if room > MAX_HEADER_BYTES:
            raise ExportError(
                f"{plan.path(shard)} would need a header of up to {room} bytes for {n_images} "
                f"images, of which safetensors reads {MAX_HEADER_BYTES}; lower --shard-size"
            )


def _paths(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(inputs, str | bytes | os.PathLike):
        raise ArgumentError(
            f"inputs is one {type(inputs).__name__}, expected a list of paths; pass [inputs]"
        )
    paths: list[str] = []
    for each in inputs:
        if not isinstance(each, str | os.PathLike) or isinstance(os.fspath(each), bytes):
            raise ArgumentError(
                f"inputs holds {each!r}, expected paths as str or Path; pass os.fsdecode of bytes"
            )
        paths.append(os.fspath(each))
    if not paths:
        raise ArgumentError("inputs is empty, expected files, folders, patterns, lists or tars")
    return paths


@contextmanager
def plan_dry_run(
    encoder: EncoderInfo, inputs: Sequence[str | os.PathLike[str]], folder: Path | None,
    options: ExportOptions,
) -> Iterator[ExportPlan]:  # fmt: skip
    """The plan of an export that is not begun; nothing stays of it when the block ends.

    Raises what `open_export` would of the inputs and, unless it is None, of the folder.
    """
    paths = _paths(inputs)
    if folder is not None:
        check_folder(folder, make=False)
    with TemporaryDirectory(prefix="qwen-vit-") as temporary:
        listing = _list(paths, Path(temporary), options)
        settings: Mapping[str, Any] = {}
        if folder is not None and (folder / SETTINGS).exists():
            settings = _settings(encoder, listing, options)
            settings = existing_settings(folder, settings, listing, options.part) or settings
        plan = ExportPlan(Path(temporary), settings, listing, options)
        if folder is None or not folder.exists() or not has_shards(folder):
            _check_heads(plan)
        yield plan


def check_folder(folder: Path, *, make: bool = True) -> None:
    """Make the folder, or raise ExportError for one that holds something else than an export."""
    check_utf8(folder)
    try:
        if not folder.absolute().parent.is_dir():
            raise ExportError(f"{folder.parent} is not a folder, expected one; create it first")
        if os.path.lexists(folder) and not folder.is_dir():
            raise ExportError(f"{folder} is not a folder, expected one; pass another --out")
        if make:
            folder.mkdir(exist_ok=True)
        names = sorted(os.listdir(folder)) if folder.exists() else []
    except OSError as error:
        raise cannot_write(folder, error) from None
    strange = [n for n in names if not LOCK_NAME.fullmatch(n) and not LEFTOVER.fullmatch(n)]
    if strange and SETTINGS not in names:
        raise ExportError(
            f"{folder} holds {display_name(strange[0])} (one of {len(strange)} names) and no "
            f"{SETTINGS}, expected an export or an empty folder; pass another --out"
        )
    written = folder if folder.exists() else folder.absolute().parent
    if not os.access(written, os.W_OK):
        raise ExportError(f"{written} cannot be written to; check its permissions")


def _list(inputs: Sequence[str], folder: Path, options: ExportOptions) -> Listing:
    """Freeze the listing under a name of this part's own."""
    number, count = options.part
    left_out: Counter[str] = Counter()
    path = folder / f".listing-{number}-of-{count}{TEMPORARY_SUFFIX}"
    listing = Listing.freeze(path, find_items(inputs, left_out), options.shard_size)
    if left_out:
        kinds = left_out.most_common(SUFFIXES_TOLD)
        named = ", ".join(
            f"{count} {display_name(suffix) if suffix else 'without any'}"
            for suffix, count in kinds
        )
        more = ", ..." if len(left_out) > len(kinds) else ""
        logger.warning("skipped files without an image extension: %s%s", named, more)
    if listing.n_images == 0:
        path.unlink()
        raise ExportError(
            f"no image was found in {', '.join(map(display_name, inputs))}; files in folders and "
            "tars need an image's suffix, such as .jpg"
        )
    return listing


def _settings(encoder: EncoderInfo, listing: Listing, options: ExportOptions) -> dict[str, Any]:
    metadata = encoder.metadata()
    settings = {
        **metadata,
        "versions": {**metadata["versions"], "pillow": version("pillow")},
        "schema_version": SCHEMA_VERSION,
        "computed_in": metadata["dtype"],
        "device": encoder.device.type,
        "dtype": options.dtype or metadata["dtype"],
        "output": options.output,
        "shard_size": options.shard_size,
        "limits": asdict(options.limits),
        "n_images": listing.n_images,
        "listing_sha256": listing.sha256,
    }
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]  # lists, not tuples


def write_or_check_settings(
    folder: Path, settings: dict[str, Any], listing: Listing, part: tuple[int, int]
) -> dict[str, Any]:
    """Write the settings and the listing, or check that they are those already there."""
    settled = existing_settings(folder, settings, listing, part)
    if settled is None:
        with atomic_file(folder / SETTINGS) as file:
            file.write(json.dumps(settings, sort_keys=True, indent=1).encode() + b"\n")
    try:
        os.replace(listing.path, folder / LISTING)  # which has the same bytes, if it is there
    except OSError as error:
        raise cannot_write(folder / LISTING, error) from None
    return settled or settings


def existing_settings(
    folder: Path, settings: dict[str, Any], listing: Listing, part: tuple[int, int]
) -> dict[str, Any] | None:
    """The settings that this export was begun with, if it was; ExportError if they are others."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    stored = _read_settings(path)
    # what was refused for its size, say, leaves nothing to differ from; other parts may be at work
    if part == (1, 1) and "listing_sha256" in stored and not has_shards(folder):
        return None
    return _same_settings(path, stored, settings, listing)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ExportError(f"{str(error).rpartition(';')[0]}; pass another --out") from None


def has_shards(folder: Path) -> bool:
    """Whether a folder that is there holds any whole shard."""
    return any(SHARD.fullmatch(name) for name in os.listdir(folder))


def _same_settings(
    path: Path, stored: dict[str, Any], settings: dict[str, Any], listing: Listing
) -> dict[str, Any]:
    before, now = _flat(stored), _flat(settings)
    names = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    names -= NAMES_ALONE
    if not names:
        return stored
    if len(names) > 1:
        names.discard("config_sha256")  # what it stands for is told by itself
    differences, way = [], ""
    if "listing_sha256" in names:
        names -= {"listing_sha256", "n_images"}
        difference, way = _listing_difference(path.with_name(LISTING), listing, stored)
        differences.append(difference)
    differences += [
        f"{name} was {before.get(name, 'not there')}, is {now.get(name, 'not there')} now"
        for name in sorted(names)
    ]
    again = "" if has_shards(path.parent) else f"; it has no shard yet: delete {path} to begin anew"
    raise ExportError(
        f"{path.parent} holds an export that differs: {'; '.join(differences)}. Give what it was "
        f"begun with{way}, or pass another --out{again}"
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
    """How the images differ, and where those that the export was begun with are found."""
    try:
        with open(before, "rb") as file:
            is_whole = file_digest(file, "sha256").hexdigest() == stored["listing_sha256"]
    except OSError:
        is_whole = False
    if not is_whole:
        return f"its images cannot be told, because {before.name} is damaged or gone", ""
    old = {item.id: item for item in read_listing(before)}
    new = {item.id: item for item in read_listing(listing.path)}
    gone, added = [i for i in old if i not in new], [i for i in new if i not in old]
    moved = [i for i in new if i in old and new[i] != old[i]]
    reported = [
        f"{len(names)} {what}, first {display_name(names[0])}"
        for names, what in ((gone, "missing"), (added, "new"), (moved, "in another place"))
        if names
    ]
    if moved:
        reported[-1] += f" (it was in {display_name(old[moved[0]].source)})"
        way = ""  # its listing says where they no longer are
    else:
        way = f" (the input {before} is just that)"
    return f"its images: {'; '.join(reported) or 'in another order'}", way


def remove_leftovers(plan: ExportPlan) -> None:
    """Remove what killed runs left of this part's shards, and of the files that one may write."""
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
