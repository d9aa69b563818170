"""A plan's shards, one after the other: each is complete or absent.

Loader threads prefetch; a writer thread drains results. An export therefore waits only for the
encoder.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from qwen_vit.common.prefetch import Job, core_count, thread_count, work_ahead
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.export.background import BackgroundWriter, StageTimer
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.device_to_host import MAX_UNWRITTEN_BYTES, HostCopier, HostCopy
from qwen_vit.export.manifest import ManifestRow, shard_rows
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan, reserved_header_bytes
from qwen_vit.export.records import (
    COPY,
    ENCODE,
    READ,
    REST,
    WRITE,
    DoneShard,
    ImageRecord,
    ShardStart,
)
from qwen_vit.export.retry import may_work_now
from qwen_vit.export.settings import LISTING, SETTINGS
from qwen_vit.export.under_way import UnderWay
from qwen_vit.feature_files.read import open_shard
from qwen_vit.feature_files.schema import EMBEDS, ItemFacts, layer_name, rows_by_tensor
from qwen_vit.feature_files.writer import FeatureWriter
from qwen_vit.features import FailedImage, ImageFeatures, not_finite
from qwen_vit.images.image import ExifPolicy
from qwen_vit.images.isolated import decode_in_child
from qwen_vit.images.patches import Patches
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.pages import as_page
from qwen_vit.inputs.read import read_item
from qwen_vit.loading import ImageLoader
from qwen_vit.video.isolated import load_in_child
from qwen_vit.video.items import open_video_item, video_of_item

__all__ = ["export_shards", "whole_shard"]

logger = logging.getLogger("qwen_vit")

Value = TypeVar("Value")

GROUP_BYTES, GROUP_IMAGES = 2**24, 64  # of a GPU's features that are copied back together


def export_shards(
    encoder: VisionEncoder,
    plan: ExportPlan,
    shards: Iterable[int],
    *,
    breaker: CircuitBreaker | None = None,
    on_image: Callable[[ImageFeatures | FailedImage], None] = lambda features: None,
    decode_threads: int | None = None,
    clock: StageTimer | None = None,
) -> Iterator[DoneShard]:
    """Make shards, one after the other, and yield each when it is on the disk.

    >>> for done in export_shards(encoder, plan, plan.shards):
    ...     print(done.shard, len(done.rows))  # doctest: +SKIP

    Loader threads prefetch images, also of the next shard. A writer thread drains results. A batch
    never crosses a shard, so the bytes do not depend on the threads. No shard is encoded before the
    previous one is complete.

    Args:
        breaker: stops the export after too many consecutive failures.
        on_image: is called for each image in the writer thread; its rows are valid until it
            returns.
        decode_threads: loader threads; one for two cores, 2 to 16, if not given.
        clock: measures what this thread waits for.

    Raises:
        ExportError: a shard cannot be written, or `breaker` stops the export.
        ImageError: the first image that fails, with on_error="raise".
    """
    breaker, clock = breaker or CircuitBreaker(plan.options.max_failures), clock or StageTimer(REST)
    form = RowFormat.of(encoder, plan.options)
    options = plan.options
    loader = ImageLoader(
        encoder.config,
        encoder.image_config,
        "auto",
        options.limits,
        on_error="raise",
        video_limits=options.video_limits,
        exif=options.exif,
        video_threads=max(1, core_count() // thread_count(decode_threads)),
        video=options.video,
        as_video=options.as_video,
    )
    copier: HostCopier | None = None  # made only for a missing shard: it takes memory
    with (
        UnderWay(plan.folder) as under_way,
        closing(
            work_ahead(_jobs(loader, plan, shards, under_way), threads=thread_count(decode_threads))
        ) as loaded,
    ):
        for start in loaded:
            if not isinstance(start, ShardStart):
                raise TypeError(f"{type(start).__name__} between shards")
            if start.rows is not None:
                yield DoneShard(start.shard, start.rows, is_new=False)
                continue
            copier = copier or HostCopier(encoder.device, form)
            next_images = islice(loaded, start.n_images)
            images = (image for image in next_images if isinstance(image, ImageRecord))
            with (
                _Shard(plan, start.shard, form, breaker, on_image) as shard,
                BackgroundWriter(MAX_UNWRITTEN_BYTES) as writer,
            ):
                encoded = _encode(encoder, images, plan.options, breaker, clock)
                for group, features in _in_groups(encoded, encoder.device):
                    with clock.stage(COPY):
                        copy = copier.copy(group, features)
                    with _time_writer(shard, clock):
                        writer.submit(partial(shard.add, group, copy), copy.n_bytes)
                with _time_writer(shard, clock):
                    rows = writer.wait(writer.submit(shard.save))
            yield DoneShard(start.shard, rows, is_new=True)


def _jobs(
    loader: ImageLoader, plan: ExportPlan, shards: Iterable[int], under_way: UnderWay
) -> Iterator[Job[ShardStart | ImageRecord]]:
    for shard in shards:
        rows = whole_shard(plan, shard)
        if rows is not None and may_work_now(plan, shard, rows):
            rows = None
        items = plan.listing.shard(shard) if rows is None else []
        yield Job(partial(ShardStart, shard, len(items), rows))
        first = shard * plan.listing.shard_size
        for line, item in enumerate(items, start=first):
            yield Job(partial(_load, item, line, loader, under_way))


def _load(item: Item, line: int, loader: ImageLoader, under_way: UnderWay) -> ImageRecord:
    """An image with its patches, or its error. `line` is its place in the listing."""
    image = ImageRecord(item)
    try:
        image.stage = "read" if item.error is None else "list"
        if item.is_video:
            with open_video_item(item) as (file, image.sha256), under_way.mark(line):
                image.stage = "decode"
                if line in under_way.suspects:  # a process died while it decoded this
                    load_in_child(item, loader.video, loader.video_limits, loader.image_config)
                video = video_of_item(item, loader.video)
                loaded = loader.load_video(video, item.id, file)
        else:
            data = read_item(item, loader.limits)
            image.sha256 = sha256(data).hexdigest()
            image.stage = "decode"
            with under_way.mark(line):
                if line in under_way.suspects:  # a process died while it decoded this
                    decode_in_child(data, item.id, loader.limits, page=item.page)
                loaded = loader.load(as_page(data, item), item.id)
        image.size_px, image.notes, image.patches = loaded.size_px, loaded.notes, loaded.patches
        image.timing = loaded.timing
        image.stage = "encode"
    except ImageError as error:
        image.error = error.without_frames()
    except MemoryError:
        image.error = ImageError(
            "does not fit into memory",
            name=item.id,
            remedy="free some memory, or leave the image out",
            code="memory",
        )
    return image


def _encode(
    encoder: VisionEncoder,
    images: Iterator[ImageRecord],
    options: ExportOptions,
    breaker: CircuitBreaker,
    clock: StageTimer,
) -> Iterator[tuple[ImageRecord, ImageFeatures | None]]:
    """Every image in order, with its features or its error."""
    under_way: deque[ImageRecord] = deque()

    def patches() -> Iterator[Patches]:
        for image in _timed(images, READ, clock):
            under_way.append(image)
            breaker.count_read(image.error)
            if image.patches is not None:
                loaded, image.patches = image.patches, None
                yield loaded

    encoded = encoder.encode_iter(
        patches(), on_error="skip", output=options.output, normalize=options.normalize,
        layers=options.layers, decode_threads=1,
    )  # fmt: skip
    for features in _timed(encoded, ENCODE, clock):
        while under_way[0].error is not None:
            yield under_way.popleft(), None
        image = under_way.popleft()
        if isinstance(features, FailedImage):
            image.error = features.error
            yield image, None
        else:
            image.grid_thw = features.grid_thw
            yield image, features
    for image in under_way:
        yield image, None


def _timed(values: Iterator[Value], stage: str, clock: StageTimer) -> Iterator[Value]:
    """The same values. The time of each counts for the stage."""
    while True:
        with clock.stage(stage):
            try:
                value = next(values)
            except StopIteration:
                return
        yield value


def _in_groups(
    encoded: Iterable[tuple[ImageRecord, ImageFeatures | None]], device: torch.device
) -> Iterator[tuple[list[ImageRecord], list[ImageFeatures]]]:
    """Images with their features, in groups of one copy from the GPU.

    Copying small images one by one would keep the export waiting for Python. On a CPU nothing is
    copied, and every image is a group of its own.
    """
    most = GROUP_IMAGES if device.type == "cuda" else 1
    images: list[ImageRecord] = []
    features: list[ImageFeatures] = []
    n_bytes = 0
    for image, each in encoded:
        images.append(image)
        if each is not None:
            features.append(each)
            n_bytes += sum(rows.nbytes for rows in rows_by_tensor(each).values())
        if len(images) == most or n_bytes >= GROUP_BYTES:
            yield images, features
            images, features, n_bytes = [], [], 0
    if images:
        yield images, features


@contextmanager
def _time_writer(shard: "_Shard", clock: StageTimer) -> Iterator[None]:
    """Time a wait for the writer thread, which may itself be waiting for a copy."""
    before, begin = shard.waited_s, time.perf_counter()
    with clock.stage(WRITE):
        yield
    # the writer's own wait may have begun before ours
    waited_s = min(shard.waited_s - before, time.perf_counter() - begin)
    clock.move(waited_s, WRITE, COPY)


class _Shard:
    """A shard's file as it grows, in the writer thread."""

    def __init__(
        self,
        plan: ExportPlan,
        number: int,
        form: RowFormat,
        breaker: CircuitBreaker,
        on_image: Callable[[ImageFeatures | FailedImage], None],
    ) -> None:
        self.number = number
        self.waited_s = 0.0  # for the GPU
        self._plan, self._form, self._breaker, self._on_image = plan, form, breaker, on_image
        self._errors: list[dict[str, Any]] = []
        room = reserved_header_bytes(plan.listing.shard(number), plan.settings)
        self._writer = FeatureWriter(plan.path(number), form.tensors, room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()

    def add(self, images: Sequence[ImageRecord], copy: HostCopy) -> None:
        """Append images: their rows, or their errors."""
        self._wait_for(copy)
        items = [
            _item_facts(image, self._plan.options.exif) for image in images
        ]  # of a failed one, no rows
        parts = {
            name: rows.split([item.rows_of(name) for item in items])
            for name, rows in copy.rows.items()
        }
        is_finite = copy.is_finite.split([item.n_rows for item in items])
        for image, of_rows in zip(images, is_finite, strict=True):
            if not of_rows.numpy().all():
                image.error = not_finite(image.item.id)
        good = [place for place, image in enumerate(images) if not image.error]
        if good:
            is_whole = sum(items[place].n_rows for place in good) == len(copy.is_finite)
            rows = copy.rows
            if not is_whole:
                rows = {n: torch.cat([each[place] for place in good]) for n, each in parts.items()}
            self._writer.add(rows, [items[place] for place in good])
        for place, image in enumerate(images):
            self._count(image, {name: each[place] for name, each in parts.items()})
        copy.release()

    def _count(self, image: ImageRecord, rows: Mapping[str, Tensor]) -> None:
        item, error = image.item, image.error
        if error is not None:
            entry = {"id": item.id, "stage": image.stage, "code": error.code, "message": str(error)}
            self._errors.append(entry)
            if self._plan.options.on_error == "raise":
                raise error
        self._breaker.count_done(error)
        if error is not None:
            self._on_image(FailedImage(item.id, error, image.stage, image.size_px))
            return
        layers = {block: rows[layer_name(block)] for block in self._plan.options.layers}
        self._on_image(
            ImageFeatures(item.id, rows[EMBEDS], image.grid_thw, image.size_px, layers=layers)
        )

    def save(self) -> list[ManifestRow]:
        """Write the file, read it again, and return its rows of the manifest."""
        self._writer.save(
            {
                **self._plan.settings,
                "errors": self._errors,
                "patches_per_row": self._form.patches_per_row,
            }
        )
        rows = whole_shard(self._plan, self.number)
        if rows is None:
            raise ExportError(
                "it disappeared or was damaged right after it was written",
                name=str(self._plan.path(self.number)),
                remedy="check its disk",
            )
        return rows

    def _wait_for(self, copy: HostCopy) -> None:
        if copy.event is not None:
            begin = time.perf_counter()
            with torch.cuda.device(copy.event.device):  # else the first GPU would get a context
                copy.event.synchronize()
            self.waited_s += time.perf_counter() - begin


def _item_facts(image: ImageRecord, exif: ExifPolicy) -> ItemFacts:
    return ItemFacts(
        image.item.id, image.grid_thw, image.n_rows, image.size_px, image.notes, image.sha256,
        image.item.source, "image" if image.timing is None else "video",
        exif if image.timing is None else None,
        None if image.timing is None else image.timing.second_per_grid_t,
        None if image.timing is None else image.timing.frame_seconds,
    )  # fmt: skip


def whole_shard(
    plan: ExportPlan, shard: int, then: str = "it is made again"
) -> list[ManifestRow] | None:
    """A shard's rows of the manifest, or None if its file is missing or torn.

    Its size must be the one in its header, its settings the plan's, and its images and errors
    together those of the listing. For a torn one, a log line names `then`, the next step. Raises
    ExportError for a file of a different export.
    """
    path = plan.path(shard)
    if not path.exists():
        return None
    if path.is_dir():
        raise ExportError(
            "a folder", name=str(path), expected="a feature file", remedy="move it away"
        )
    try:
        file = open_shard(path)
    except ExportError as error:
        logger.warning("%s", ExportError.of(error, remedy=then))
        return None
    items = plan.listing.shard(shard)
    failed = {error.id for error in file.errors}
    good = [item.id for item in items if item.id not in failed]
    is_ours = all(file.metadata.get(name) == value for name, value in plan.settings.items())
    if not is_ours or list(file.ids) != good or len(good) + len(failed) != len(items):
        raise ExportError(
            "it belongs to a different export",
            name=str(path),
            expected=f"the settings of {SETTINGS} and the images of {LISTING} from line "
            f"{shard * plan.listing.shard_size + 1}",
            remedy="move it away",
        )
    return shard_rows(file, items, shard * plan.listing.shard_size)
