"""Estimate an export's size from the images' headers, and its duration from timed images."""

import io
import math
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import BinaryIO

from tqdm import tqdm

from qwen_vit.batching import TOKEN_BUDGET
from qwen_vit.common.storage import is_remote
from qwen_vit.common.store_path import PathOrAddress
from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.export.changes import open_if_whole
from qwen_vit.export.header_size import IMAGE_HEAD_BYTES, TENSOR_HEAD_BYTES
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan, plan_dry_run
from qwen_vit.export.resume import options_or_recorded
from qwen_vit.export.store_folder import as_folder
from qwen_vit.export.whole_shards import segments_to_keep
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.segments import segments_among
from qwen_vit.features import ImageFeatures
from qwen_vit.images.formats import IDENTIFY_BYTES, decoder, identify
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.patches import smart_resize
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item
from qwen_vit.inputs.urls import is_https
from qwen_vit.video.items import patches_by_header, video_of_item
from qwen_vit.video.options import Video, VideoOptions

__all__ = ["Estimate", "estimate_export", "estimate_plan", "target_size"]

SAMPLE = 1_000  # the number of images for a plan
SAMPLE_OF_ROWS = 100  # for Parquet, where reading a row also reads earlier rows of its row group
MAX_TIMED = 512  # the number of images
TIMING_S = 6.0  # for all timings but the first; on a CPU, a longer first timing is the only one
MAX_GROWTH = 8  # of the image count from one timing to the next
HEAD_BYTES = 2**16  # to read of an image in a tar or a store; most formats give the size there
NAME_BYTES = 300  # an image's id, source and share of the settings in a shard's header


@dataclass(frozen=True, slots=True)
class Estimate:
    """Describe the estimated size and duration of an export, or of the part that the options
    select.

    Attributes:
        unreadable: the number of unfinished images that exist, but that the export would reject,
            for example because of an unreadable header or too many pixels.
        seconds: the time that `encode` needs for the unfinished images, in seconds, or None if no
            image was timed.
        done: the number of images whose features are in finished shards.
        failed: the number of images that failed in an earlier run.
        missing: the number of unfinished images whose file does not exist.
        saved: the number of images whose features an interrupted run saved in unfinished shards.
    """

    images: int
    unreadable: int
    rows: int
    bytes: int
    seconds: float | None
    is_sample: bool = False
    done: int = 0
    failed: int = 0
    missing: int = 0
    saved: int = 0

    @property
    def to_do(self) -> int:
        return self.images - self.done - self.saved - self.failed


def estimate_export(
    encoder: VisionEncoder,
    inputs: Sequence[str] | None,
    options: ExportOptions | None = None,
    *,
    folder: PathOrAddress | None = None,
    show_progress: bool = False,
) -> Estimate:
    """Count images, rows and bytes, and time a sample of the images, without writing to `folder`.

    For unfinished images, the counts come from the images' headers. For other images, they come
    from the shards and segments.

    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> estimate_export(encoder, ["tests/photographs/rocket.jpg"]).rows
    345
    """
    options = options_or_recorded(options, inputs, folder)
    where = None if folder is None else as_folder(folder)
    with plan_dry_run(encoder, inputs, where, options) as plan:
        counts = _Counts(encoder, options)
        with tqdm(
            total=plan.n_images, unit="image", file=sys.stderr, disable=not show_progress
        ) as bar:
            firsts = {} if where is None else segments_among(where.names())
            for shard in plan.shards:
                file = None if where is None else open_if_whole(where, shard)
                if file is not None:
                    counts.add_stored(file, partial(plan.listing.current.has, shard))
                    bar.update(plan.listing.shard_length(shard))
                    continue
                items, start = plan.listing.shard(shard), 0
                if where is not None and shard in firsts:
                    names = [item.id for item in items]
                    for kept in segments_to_keep(
                        plan, shard, firsts[shard], names, where.__truediv__
                    ):
                        is_current = partial(plan.listing.current.has, shard)
                        counts.add_stored(kept.file, is_current, is_saved=True)
                        start = kept.end
                bar.update(start)
                for item in items[start:]:
                    counts.add(item, shard, plan.listing.current.has(shard, item.id))
                    bar.update()
        return replace(
            counts.estimate(), seconds=_seconds(encoder, counts.sample, counts.work, options)
        )


def estimate_plan(encoder: VisionEncoder, plan: ExportPlan) -> Estimate:
    """Estimate a plan's counts from a sample of its images, without timing the encoder."""
    sample = plan.listing.spread(SAMPLE)
    if any(item.row is not None for item in sample):
        sample = plan.listing.spread(SAMPLE_OF_ROWS)
    counts = _Counts(encoder, plan.options)
    for item in sample:
        counts.add(item)
    found = counts.estimate()
    scale = plan.n_images / len(sample)
    return Estimate(
        plan.n_images,
        round(found.unreadable * scale),
        round(found.rows * scale),
        round(found.bytes * scale),
        None,
        is_sample=scale > 1,
        missing=round(found.missing * scale),
    )


def target_size(height: int, width: int, config: ImageConfig, name: str) -> tuple[int, int]:
    """Return the height and width in pixels to which `encode` resizes an image.

    >>> target_size(100, 200, ImageConfig.from_json({}), "a.jpg")
    (112, 196)
    """
    return smart_resize(
        height,
        width,
        factor=config.patch_px * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        name=name,
    )


@dataclass(slots=True)
class _Work:
    batches: int = 0
    patches: int = 0
    _in_batch: int = 0
    _shard: int | None = None

    def add(self, n_patches: int, budget: int, shard: int = 0) -> None:
        if self._shard != shard or self._in_batch + n_patches > budget:
            self.batches += 1
            self._in_batch = 0
        self._shard = shard
        self._in_batch += n_patches
        self.patches += n_patches


class _Counts:
    def __init__(self, encoder: VisionEncoder, options: ExportOptions) -> None:
        self._encoder, self._options = encoder, options
        self._form = RowFormat.of(encoder, options)
        self.work = _Work()
        self.sample: list[Item] = []  # of the unfinished images, to time them
        self._chance = Random(0)
        self._seen = self._images = self._done = self._failed = 0
        self._missing = self._unreadable = self._rows = self._bytes = self._saved = 0

    def add(self, item: Item, shard: int = 0, is_current: bool = True) -> None:
        """Count an unfinished image, which takes time and bytes even if a later shard replaces
        it."""
        self._images += is_current
        self._take_for_sample(item)
        n_patches = _patches(item, self._encoder.image_config, self._options)
        self._bytes += NAME_BYTES + IMAGE_HEAD_BYTES + TENSOR_HEAD_BYTES * len(self._form.tensors)
        if n_patches is None:
            self._missing += (is_missing := _is_missing(item))
            self._unreadable += not is_missing
            return
        rows = self._form.count(n_patches)
        self._rows += rows * is_current
        self._bytes += self._form.n_bytes(rows, n_patches)
        self.work.add(n_patches, TOKEN_BUDGET[self._encoder.device.type], shard)

    def add_stored(
        self, file: FeatureFile, is_current: Callable[[str], bool], *, is_saved: bool = False
    ) -> None:
        """Count a shard or a saved segment: its current images, and all its bytes."""
        counts = [
            count for name, count in zip(file.ids, file.row_counts, strict=True) if is_current(name)
        ]
        failed = sum(is_current(error.id) for error in file.errors)
        self._images += len(counts) + failed
        self._done += len(counts) * (not is_saved)
        self._saved += len(counts) * is_saved
        self._failed += failed
        self._rows += sum(counts)
        self._bytes += file.path.stat().st_size

    def estimate(self) -> Estimate:
        return Estimate(
            self._images, self._unreadable, self._rows, self._bytes, None, done=self._done,
            failed=self._failed, missing=self._missing, saved=self._saved,
        )  # fmt: skip

    def _take_for_sample(self, item: Item) -> None:
        """Keep up to MAX_TIMED images, each with equal probability (Vitter's algorithm R)."""
        self._seen += 1
        if len(self.sample) < MAX_TIMED:
            self.sample.append(item)
        elif (place := self._chance.randrange(self._seen)) < MAX_TIMED:
            self.sample[place] = item


def _is_missing(item: Item) -> bool:
    if item.error is not None:
        return item.error[0] == "missing"
    return _is_on_disk(item.source) and not os.path.exists(item.source)


def _is_on_disk(source: str) -> bool:
    return not is_remote(source) and not is_https(source)


def _patches(item: Item, config: ImageConfig, options: ExportOptions) -> int | None:
    """Return the number of patches from the image's header, or None for an unreadable or
    unsupported image."""
    try:
        if item.is_video:
            return patches_by_header(item, options.video, options.video_limits, config)
        size = _size_in_header(item, options.limits)
        if size is None:
            return None
        height, width = target_size(*size, config, item.id)
    except ImageError:  # such as a ratio above 200
        return None
    return height * width // config.patch_px**2


def _seconds(
    encoder: VisionEncoder, sample: Sequence[Item], work: _Work, options: ExportOptions
) -> float | None:
    """Return the seconds for the work, or None if no image was timed.

    The first timing also includes the time to load kernels. The result includes this time once. A
    batch of one small image takes longer per patch than a full batch, so the number of images grows
    from one timing to the next.
    """
    if not work.patches:
        return 0.0
    shuffled = Random(0).sample(sample, len(sample))  # the first images are a random sample
    timings: list[tuple[float, _Work]] = []
    is_warm, place, count, left = False, 0, 1, TIMING_S
    while place < len(shuffled) and count >= 1:
        seconds, timed = _time_batch(
            encoder, shuffled[place : place + count], options.limits, options.video
        )
        place += count
        if not timed.patches:  # every image failed
            continue
        timings.append((seconds, timed))
        if is_warm:
            left -= seconds
            count = min(count * MAX_GROWTH, int(left * count / max(seconds, 1e-9)))
        elif seconds > TIMING_S and encoder.device.type == "cpu":  # which compiles nothing
            break
        is_warm = True
    if not timings:
        return None
    warm = timings[1:] or timings
    per_batch, per_patch = _rates(warm[0], warm[-1])
    first_s, first = timings[0]
    start = max(0.0, first_s - per_batch * first.batches - per_patch * first.patches)
    return round(start + per_batch * work.batches + per_patch * work.patches, 3)


def _time_batch(
    encoder: VisionEncoder, items: Sequence[Item], limits: ImageLimits, video: VideoOptions
) -> tuple[float, _Work]:
    images: list[bytes | Video] = []
    for item in items:
        with suppress(ImageError):
            if not item.is_video:
                images.append(read_item(item, limits))
            elif item.is_file and item.error is None:
                images.append(video_of_item(item, video))
    start = time.monotonic()
    done = encoder.encode(images, on_error="skip", limits=limits)
    seconds = time.monotonic() - start
    work = _Work()
    for each in done:
        if isinstance(each, ImageFeatures):
            work.add(math.prod(each.grid_thw), TOKEN_BUDGET[encoder.device.type])
    return seconds, work


def _rates(few: tuple[float, _Work], many: tuple[float, _Work]) -> tuple[float, float]:
    """Return the seconds per batch and per patch, from the timings of a small and a large run."""
    (t, one), (u, other) = few, many
    determinant = one.batches * other.patches - other.batches * one.patches
    if determinant:
        per_batch = (t * other.patches - u * one.patches) / determinant
        per_patch = (one.batches * u - other.batches * t) / determinant
        if per_batch >= 0 and per_patch >= 0:
            return per_batch, per_patch
    return 0.0, u / other.patches


def _size_in_header(item: Item, limits: ImageLimits) -> tuple[int, int] | None:
    """Return (height, width) before any rotation, which does not change the number of tokens.

    The result is None for an unreadable header or too many pixels.
    """
    # in a tar or a store: first read only the head
    if item.size is not None and item.size > HEAD_BYTES:
        size = _open_header(replace(item, size=HEAD_BYTES), limits)
        if size is not None:
            return size
    return _open_header(item, limits)


def _open_header(item: Item, limits: ImageLimits) -> tuple[int, int] | None:
    try:
        with ExitStack() as stack:
            file: BinaryIO
            if item.is_file and item.error is None and _is_on_disk(item.source):
                if not stat.S_ISREG(os.stat(item.source).st_mode):
                    return None
                file = stack.enter_context(open(item.source, "rb"))
            else:
                file = io.BytesIO(read_item(item, limits))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # ignore a decoder's warning about a doubtful header
            file_format = identify(file.read(IDENTIFY_BYTES), item.id, limits.formats)
            file.seek(0)
            image = stack.enter_context(decoder(file_format, item.id, limits)(file, ""))
            if item.page is not None:
                image.seek(item.page - 1)
            is_allowed = image.height * image.width <= limits.max_pixels
            return (image.height, image.width) if is_allowed else None
    except Exception:  # noqa: BLE001 - plug-ins raise anything; encoding it reports the error
        return None
