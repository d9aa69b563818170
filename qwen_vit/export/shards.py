"""Write a plan's shards in order. Each shard is complete or absent.

Loader threads prefetch images, and a writer thread writes results, while the encoder computes.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import TypeVar

import torch

from qwen_vit.common.prefetch import Job, core_count, thread_count, work_ahead
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.export.background import BackgroundWriter, StageTimer
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.device_to_host import MAX_UNWRITTEN_BYTES, HostCopier
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan
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
from qwen_vit.export.segments import find_segments
from qwen_vit.export.shard_writer import ShardWriter
from qwen_vit.export.under_way import UnderWay
from qwen_vit.export.whole_shards import (
    publish_unsent,
    rows_of_saved,
    segments_to_keep,
    whole_shard,
)
from qwen_vit.feature_files.schema import n_bytes_of
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.frames import Frames
from qwen_vit.images.isolated import decode_in_child
from qwen_vit.images.patches import Patches
from qwen_vit.images.picture import Picture, resizes_on
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.pages import as_page
from qwen_vit.inputs.read import read_item
from qwen_vit.loading import ImageLoader
from qwen_vit.video.isolated import load_in_child
from qwen_vit.video.items import open_video_item, video_of_item

__all__ = ["export_shards"]

logger = logging.getLogger("qwen_vit")

Value = TypeVar("Value")

GROUP_BYTES, GROUP_IMAGES = 2**24, 64  # of a GPU's features, copied back together
# Of features that wait on the GPU while the writer thread saves the previous shard.
AHEAD_BYTES = {"cuda": MAX_UNWRITTEN_BYTES, "cpu": 0}

Group = tuple[list[ImageRecord], list[ImageFeatures]]


def export_shards(
    encoder: VisionEncoder,
    plan: ExportPlan,
    shards: Iterable[int],
    *,
    breaker: CircuitBreaker | None = None,
    on_image: Callable[[ImageFeatures | FailedImage], None] = lambda features: None,
    decode_threads: int | None = None,
    clock: StageTimer | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[DoneShard]:
    """Yield shards in order, after writing each that is missing, damaged or worth a retry.

    >>> for done in export_shards(encoder, plan, plan.shards):
    ...     print(done.shard, len(done.rows))  # doctest: +SKIP

    All images of a batch belong to one shard, so the bytes do not depend on the timing of threads.
    The encoder begins to encode a shard while the writer thread still saves the previous shard. An
    interrupt saves the encoded images of the open shard as a segment.

    Args:
        on_image: a function that the writer thread calls for each image. The rows are valid until
            the function returns.
        is_stopped: a function that the export calls before each image. If it returns True, the
            export finishes the batch in progress, and then ends as after an interrupt.
    """
    breaker, clock = breaker or CircuitBreaker(plan.options.max_failures), clock or StageTimer(REST)
    form = RowFormat.of(encoder, plan.options)
    loader = _image_loader(encoder, plan.options, decode_threads)
    copier: HostCopier | None = None  # only a missing shard needs it, because it takes memory
    with (
        UnderWay(plan.folder.scratch) as under_way,
        closing(
            work_ahead(_jobs(loader, plan, shards, under_way), threads=thread_count(decode_threads))
        ) as loaded,
        ExitStack() as unfinished,
    ):
        previous: Iterator[DoneShard | None] = iter(())  # the shard that is being saved
        before: ShardWriter | None = None  # its writer
        for start in loaded:
            if not isinstance(start, ShardStart):
                raise TypeError(f"{type(start).__name__} between shards")
            if is_stopped():
                yield from filter(None, previous)
                raise KeyboardInterrupt
            if start.rows is not None:
                yield from filter(None, previous)
                yield DoneShard(start.shard, start.rows, len(start.rows))
                continue
            copier = copier or HostCopier(encoder.device, form)
            next_images = islice(loaded, start.n_images)
            images = (image for image in next_images if isinstance(image, ImageRecord))
            shard = ShardWriter(
                plan, start, form, breaker, on_image,
                bits_depend_on_batch=encoder.device.type == "cpu",
            )  # fmt: skip
            encoded = _encode(
                encoder, images, shard,
                options=plan.options, breaker=breaker, clock=clock, is_stopped=is_stopped,
            )  # fmt: skip
            current = _write(
                plan, start, shard, _in_groups(encoded, encoder.device),
                before=before, device=encoder.device, copier=copier, clock=clock,
            )  # fmt: skip
            unfinished.enter_context(closing(current))
            try:
                next(current)
            finally:  # also after an error, which comes after earlier results
                yield from filter(None, previous)
            next(current)
            previous, before = current, shard
        yield from filter(None, previous)


def _write(
    plan: ExportPlan,
    start: ShardStart,
    shard: ShardWriter,
    groups: Iterator[Group],
    *,
    before: ShardWriter | None,
    device: torch.device,
    copier: HostCopier,
    clock: StageTimer,
) -> Generator[DoneShard | None, None, None]:
    """Write a shard, and yield it at the end. Before that, yield None twice: after the first
    batches start, and while the writer saves the shard.

    The caller finishes the previous shard at the first pause, because only one shard may copy
    features. Closing the generator at the second pause waits until the writer has saved the shard.
    """
    with shard, BackgroundWriter(MAX_UNWRITTEN_BYTES) as writer:
        started = _started(groups, before, AHEAD_BYTES[device.type])
        yield None
        saved = time.monotonic()
        for group, features in started:
            is_due = time.monotonic() - saved > (plan.options.shard_seconds or math.inf)
            if is_due and shard.may_be_cut_before(group[0].place):
                writer.submit(shard.close_segment)
                saved = time.monotonic()
            with clock.stage(COPY):
                copy = copier.copy(group, features)
            with _time_writer(shard, clock):
                writer.submit(partial(shard.add, group, copy), copy.n_bytes)
        shard.saving = writer.submit(shard.save)
        yield None
        with _time_writer(shard, clock):
            writer.wait(shard.saving)
            rows = rows_of_saved(plan, start.shard)
    yield DoneShard(start.shard, rows, start.segments[-1].end if start.segments else 0)


def _started(groups: Iterator[Group], before: ShardWriter | None, n_bytes: int) -> Iterator[Group]:
    """Encode a group, and more groups while the shard `before` is being saved, up to `n_bytes`.

    The result yields all groups. After an interrupt, it yields the groups encoded so far, and then
    raises the interrupt.
    """
    first: list[Group] = []
    rest = groups
    try:
        while not first or (before is not None and before.is_saving and n_bytes > 0):
            images, features = next(groups)
            first.append((images, features))
            n_bytes -= sum(n_bytes_of(each) for each in features)
    except StopIteration:
        pass
    except KeyboardInterrupt as interrupt:
        rest = _raising(interrupt)
    return chain(first, rest)


def _raising(error: BaseException) -> Iterator[Group]:
    """Raise the error at the first request."""
    raise error
    yield


def _image_loader(
    encoder: VisionEncoder, options: ExportOptions, decode_threads: int | None
) -> ImageLoader:
    return ImageLoader(
        encoder.config, encoder.image_config, "auto", options.limits,
        on_error="raise",
        video_limits=options.video_limits,
        exif=options.exif,
        video_threads=max(1, core_count() // thread_count(decode_threads)),
        video=options.video,
        as_video=options.as_video,
        on_gpu=resizes_on(encoder.device),
    )  # fmt: skip


def _jobs(
    loader: ImageLoader, plan: ExportPlan, shards: Iterable[int], under_way: UnderWay
) -> Iterator[Job[ShardStart | ImageRecord]]:
    kept = find_segments(plan.folder)
    for shard in shards:
        publish_unsent(plan, shard)
        rows = whole_shard(plan, shard)
        if rows is not None and may_work_now(plan, shard, rows):
            rows = None
        items = plan.listing.shard(shard) if rows is None else []
        names = [item.id for item in items]
        firsts = kept.get(shard, ()) if rows is None else ()
        segments = segments_to_keep(plan, shard, firsts, names, plan.folder.fetch)
        first = segments[-1].end if segments else 0
        replaces = rows is None and plan.has(shard)
        start = partial(ShardStart, shard, len(items) - first, rows, segments, firsts, replaces)
        yield Job(start)
        line = plan.listing.first_line(shard)
        for place, item in enumerate(items[first:], start=first):
            yield Job(partial(_load, item, place, line + place, loader, under_way))


def _load(
    item: Item, place: int, line: int, loader: ImageLoader, under_way: UnderWay
) -> ImageRecord:
    """Load the image of a line, counted from 0 through all listings."""
    image = ImageRecord(item, place)
    try:
        image.stage = "read" if item.error is None else "list"
        if item.is_video:
            with open_video_item(item, loader.video_limits) as opened, under_way.mark(line):
                file, image.sha256 = opened
                image.stage = "decode"
                if line in under_way.suspects:  # a process died while it decoded this image
                    load_in_child(item, loader.video, loader.video_limits, loader.image_config)
                video = video_of_item(item, loader.video)
                loaded = loader.load_video(video, item.id, file)
        else:
            data = read_item(item, loader.limits)
            image.sha256 = sha256(data).hexdigest()
            image.stage = "decode"
            with under_way.mark(line):
                if line in under_way.suspects:  # a process died while it decoded this image
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
            remedy="free some memory, or omit the image",
            code="memory",
        )
    return image


def _encode(
    encoder: VisionEncoder,
    images: Iterator[ImageRecord],
    shard: ShardWriter,
    *,
    options: ExportOptions,
    breaker: CircuitBreaker,
    clock: StageTimer,
    is_stopped: Callable[[], bool],
) -> Iterator[tuple[ImageRecord, ImageFeatures | None]]:
    """Yield every image in order, with its features, or with None if it failed."""
    under_way: deque[ImageRecord] = deque()
    place = 0  # after the last image
    pending: deque[int] = deque()  # places of images in the encoder without features yet

    def patches() -> Iterator[Patches | Picture | Frames]:
        nonlocal place
        for image in _timed(images, READ, clock):
            if is_stopped():
                raise KeyboardInterrupt
            under_way.append(image)
            place = image.place + 1
            breaker.count_read(image.error)
            if image.patches is not None:
                pending.append(image.place)
                loaded, image.patches = image.patches, None
                yield loaded
                # an encoder that requests an image and has at most one starts a batch with it
                if len(pending) <= 1:
                    shard.batch_starts.append(pending[0] if pending else image.place + 1)

    encoded = encoder.encode_iter(
        patches(), on_error="skip", output=options.output, normalize=options.normalize,
        layers=options.layers, decode_threads=1,
    )  # fmt: skip
    for features in _timed(encoded, ENCODE, clock):
        while under_way[0].error is not None:
            yield under_way.popleft(), None
        image = under_way.popleft()
        pending.popleft()
        if isinstance(features, FailedImage):
            image.error = features.error
            yield image, None
        else:
            image.grid_thw = features.grid_thw
            yield image, features
    for image in under_way:
        yield image, None
    shard.batch_starts.append(place)


def _timed(values: Iterator[Value], stage: str, clock: StageTimer) -> Iterator[Value]:
    while True:
        with clock.stage(stage):
            try:
                value = next(values)
            except StopIteration:
                return
        yield value


def _in_groups(
    encoded: Iterable[tuple[ImageRecord, ImageFeatures | None]], device: torch.device
) -> Iterator[Group]:
    """Yield images with their features, in groups that the writer copies from a GPU together.

    Python would take too long to copy small images one by one. On a CPU, every image is a separate
    group.
    """
    most = GROUP_IMAGES if device.type == "cuda" else 1
    images: list[ImageRecord] = []
    features: list[ImageFeatures] = []
    n_bytes = 0
    try:
        for image, each in encoded:
            images.append(image)
            if each is not None:
                features.append(each)
                n_bytes += n_bytes_of(each)
            if len(images) == most or n_bytes >= GROUP_BYTES:
                yield images, features
                images, features, n_bytes = [], [], 0
    except KeyboardInterrupt:  # the caller saves these images
        if images:
            yield images, features
        raise
    if images:
        yield images, features


@contextmanager
def _time_writer(shard: ShardWriter, clock: StageTimer) -> Iterator[None]:
    """Time a wait for the writer thread, which may itself wait for a copy."""
    before, begin = shard.waited_s, time.perf_counter()
    with clock.stage(WRITE):
        yield
    # the writer's own wait may have begun before ours
    waited_s = min(shard.waited_s - before, time.perf_counter() - begin)
    clock.move(waited_s, WRITE, COPY)
