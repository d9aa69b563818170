"""A plan's shards: made one after the other, each whole under its name or not there, read back.

Threads load images ahead and one writes behind, so that the encoder is what an export waits for.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from qwen_vit.common.prefetch import BackgroundWriter, Job, StageTimer, thread_count, work_ahead
from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, ImageError, display_name
from qwen_vit.export.device_to_host import PinnedRing
from qwen_vit.export.manifest import ManifestRow, shard_rows
from qwen_vit.export.plan import (
    LISTING,
    SETTINGS,
    ExportOptions,
    ExportPlan,
    RowFormat,
    reserved_header_bytes,
)
from qwen_vit.feature_files.read import open_shard
from qwen_vit.feature_files.write import FeatureWriter
from qwen_vit.features import FailedImage, ImageFeatures, not_finite
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item

__all__ = ["REST", "STAGES", "CircuitBreaker", "DoneShard", "export_shards", "whole_shard"]

logger = logging.getLogger("qwen_vit")

RING_BYTES = 2**29  # pinned, for features on their way
BEHIND_BYTES = RING_BYTES // 4 * 3  # of them that wait to be written; one more finds room beside
GROUP_BYTES, GROUP_IMAGES = 2**24, 64  # of a GPU's features that are copied back together
ROW_BYTES = 1_000  # of the manifest, in memory, or more
STAGES = READ, ENCODE, COPY, WRITE, REST = "read and decode", "encode", "copy back", "write", "rest"


@dataclass(slots=True)
class CircuitBreaker:
    """Stops an export when many images in a row fail: the disk is gone, or the model is broken."""

    limit: int
    unread: int = 0  # in a row, as they are read, ahead of the encoder
    failed: int = 0  # in a row, as they leave it

    def count_read(self, error: ImageError | None) -> None:
        self.unread = 0 if error is None else self.unread + 1
        self._check(self.unread, error)

    def count_done(self, error: ImageError | None) -> None:
        self.failed = 0 if error is None else self.failed + 1
        self._check(self.failed, error)

    def _check(self, in_a_row: int, error: ImageError | None) -> None:
        if 0 < self.limit <= in_a_row:
            raise ExportError(
                f"stopped, because {in_a_row} images in a row failed, the last one so: {error}; "
                "whole shards are kept: mend the cause and run the same command again, or allow "
                "more with --max-failures"
            )


@dataclass(slots=True)
class _Image:
    """One image on its way into a shard."""

    item: Item
    sha256: str = ""
    size_px: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    grid_thw: tuple[int, int, int] = (0, 0, 0)
    patches: Patches | None = None  # from its file to the encoder
    n_rows: int = 0  # of its features, as they are stored
    stage: str = "read"
    error: ImageError | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.pixels.nbytes


class ShardStart(NamedTuple):
    """Comes before a shard's images; `rows` if it is there, and then no image comes."""

    shard: int
    n_images: int
    rows: list[ManifestRow] | None

    @property
    def n_bytes(self) -> int:
        return ROW_BYTES * len(self.rows or ())


class DoneShard(NamedTuple):
    """A whole shard and its rows of the manifest; not `is_new`, if it was there before."""

    shard: int
    rows: list[ManifestRow]
    is_new: bool


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
    """Make shards, one after the other, and give each when it is on the disk.

    Threads load images ahead, the next shard's too, and one writes behind; batches never cross a
    shard, so its bytes do not depend on this, and none is encoded before the one before it is
    whole. `on_image` sees each image when it is done, in the thread that writes; its rows are gone
    afterwards. Raises ExportError where a shard cannot be written, or `breaker` stops it; the first
    ImageError with on_error="raise".
    """
    breaker, clock = breaker or CircuitBreaker(plan.options.max_failures), clock or StageTimer(REST)
    form = RowFormat.of(encoder, plan.options)
    jobs = _jobs(encoder.image_config, plan, shards)
    sender: _Sender | None = None  # made when a shard is missing: it takes memory
    with closing(work_ahead(jobs, threads=thread_count(decode_threads))) as loaded:
        for begin in loaded:
            if not isinstance(begin, ShardStart):
                raise TypeError(f"{type(begin).__name__} between shards")
            if begin.rows is not None:
                yield DoneShard(begin.shard, begin.rows, is_new=False)
                continue
            sender = sender or _Sender(encoder.device, form)
            images = islice(loaded, begin.n_images)
            with (
                _Shard(plan, begin.shard, form, breaker, on_image) as shard,
                BackgroundWriter(BEHIND_BYTES) as writer,
            ):
                encoded = _encode(encoder, images, plan.options, breaker, clock)
                for group, embeds in _in_groups(encoded, encoder.device):
                    with clock.stage(COPY):
                        sent = sender.send(group, embeds)
                    with _behind(shard, clock):
                        writer.do(partial(shard.add, group, sent), sent.n_bytes)
                with _behind(shard, clock):
                    saved = writer.wait(writer.do(shard.save))
            yield DoneShard(begin.shard, saved, is_new=True)


def _jobs(
    config: ImageConfig, plan: ExportPlan, shards: Iterable[int]
) -> Iterator[Job[ShardStart | _Image]]:
    for shard in shards:
        rows = whole_shard(plan, shard)
        items = plan.listing.shard(shard) if rows is None else []
        yield Job(partial(ShardStart, shard, len(items), rows))
        for item in items:
            yield Job(partial(_load, item, config, plan.options.limits))


@contextmanager
def _behind(shard: "_Shard", clock: StageTimer) -> Iterator[None]:
    """Waiting for the thread that writes; which may itself wait for what the GPU has not sent."""
    before, begin = shard.waited_s, time.perf_counter()
    with clock.stage(WRITE):
        yield
    # it may have waited since long before we did
    waited_s = min(shard.waited_s - before, time.perf_counter() - begin)
    clock.move(waited_s, WRITE, COPY)


class _Sent(NamedTuple):
    """Images' features on their way to the CPU: there, once the GPU has done what it has to."""

    rows: Tensor  # of one image after the other
    is_finite: Tensor  # each of them
    arrival: torch.cuda.Event | None
    release: Callable[[], None]  # when nobody reads them any more

    @property
    def n_bytes(self) -> int:
        return self.rows.nbytes


class _Sender:
    """Copies what is stored of embeddings to the CPU, on a stream beside the encoder's."""

    def __init__(self, device: torch.device, form: RowFormat) -> None:
        self._form = form
        self._ring: PinnedRing | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._ring = PinnedRing(_pinned(RING_BYTES))

    def send(self, images: Sequence[_Image], embeds: Sequence[Tensor]) -> _Sent:
        """Begin to copy the rows of those images that have any.

        What is sent is released in the order in which it was sent.
        """
        if self._form.patches_per_row is None:
            embeds = [each.float().mean(dim=0, keepdim=True) for each in embeds]
        lengths = iter(map(len, embeds))
        for image in images:
            image.n_rows = 0 if image.error is not None else next(lengths)
        if not embeds:
            nothing = torch.empty(0, self._form.width, dtype=self._form.dtype, device="cpu")
            return _Sent(nothing, nothing.bool().all(1), None, lambda: None)
        stored = (embeds[0] if len(embeds) == 1 else torch.cat(list(embeds))).to(self._form.dtype)
        # by their extremes: values one by one would take more memory than they have themselves
        is_finite = stored.amin(1).isfinite() & stored.amax(1).isfinite()
        if self._ring is None:
            return _Sent(stored, is_finite, None, lambda: None)
        n_bytes = stored.nbytes + is_finite.nbytes
        place, release = self._ring.take(n_bytes), self._ring.give_back
        if place is None:
            place, release = _pinned(n_bytes), lambda: None
        rows = place[: stored.nbytes].view(stored.dtype).view(stored.shape)
        flags = place[stored.nbytes :].view(torch.bool)
        self._stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(self._stream):
            for there, here in ((stored, rows), (is_finite, flags)):
                here.copy_(there, non_blocking=True)
                there.record_stream(self._stream)
            arrival = torch.cuda.Event(blocking=True)
            arrival.record(self._stream)
        return _Sent(rows, flags, arrival, release)


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class _Shard:
    """A shard's file as it grows, in the thread that writes."""

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
        self._facts: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []
        room = reserved_header_bytes(plan.listing.shard(number), plan.settings)
        self._writer = FeatureWriter(plan.path(number), form.width, form.dtype, room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()

    def add(self, images: Sequence[_Image], sent: _Sent) -> None:
        """The next images: their rows, or their errors."""
        self._wait_for(sent)
        parts = sent.rows.split([image.n_rows for image in images])
        is_finite, begin = sent.is_finite.numpy(), 0
        for image in images:
            if not is_finite[begin : begin + image.n_rows].all():
                image.error = not_finite(image.item.id)
            begin += image.n_rows
        good = [(each, part) for each, part in zip(images, parts, strict=True) if not each.error]
        if good:
            is_whole = sum(each.n_rows for each, _ in good) == len(sent.rows)
            self._writer.add(
                sent.rows if is_whole else torch.cat([part for _, part in good]),
                [(each.item.id, each.grid_thw, each.n_rows) for each, _ in good],
            )
        for image, part in zip(images, parts, strict=True):
            self._count(image, None if image.error else part)
        sent.release()

    def _count(self, image: _Image, embeds: Tensor | None) -> None:
        if image.error is None:
            self._facts.append(
                {
                    "sha256": image.sha256, "size_px": image.size_px, "notes": image.notes,
                    "source": image.item.source,
                }
            )  # fmt: skip
        else:
            self._errors.append(
                {
                    "id": image.item.id, "stage": image.stage, "code": image.error.code,
                    "message": str(image.error),
                }
            )  # fmt: skip
            if self._plan.options.on_error == "raise":
                raise image.error
        self._breaker.count_done(image.error)
        if embeds is not None:
            self._on_image(ImageFeatures(image.item.id, embeds, image.grid_thw, image.size_px))
        elif image.error is not None:
            self._on_image(FailedImage(image.item.id, image.error, image.stage, image.size_px))

    def save(self) -> list[ManifestRow]:
        """Write the file, read it again, and give its rows of the manifest."""
        self._writer.save(
            {
                **self._plan.settings,
                "errors": self._errors,
                "images": self._facts,
                "patches_per_row": self._form.patches_per_row,
            }
        )
        rows = whole_shard(self._plan, self.number)
        if rows is None:
            raise ExportError(
                f"{self._plan.path(self.number)} is gone, or damaged, right after it was written; "
                "check its disk"
            )
        return rows

    def _wait_for(self, sent: _Sent) -> None:
        if sent.arrival is not None:
            begin = time.perf_counter()
            with torch.cuda.device(sent.arrival.device):  # or the first GPU is woken, too
                sent.arrival.synchronize()
            self.waited_s += time.perf_counter() - begin


def whole_shard(
    plan: ExportPlan, shard: int, then: str = "it is made again"
) -> list[ManifestRow] | None:
    """A shard's rows, or None where it is not there, or torn. Raises ExportError for a strange one.

    Its size must be the one that its header promises, its settings the plan's, and its images and
    errors, together, those of the listing. Of a torn one a log says what happens `then`.
    """
    path = plan.path(shard)
    if not path.exists():
        return None
    if path.is_dir():
        raise ExportError(f"{path} is a folder, expected a feature file; move it away")
    try:
        file = open_shard(path)
    except ExportError as error:
        fact, _, remedy = str(error).rpartition(";")
        logger.warning("%s; %s", fact or remedy, then)
        return None
    items = plan.listing.shard(shard)
    failed = {error.id for error in file.errors}
    good = [item.id for item in items if item.id not in failed]
    is_ours = all(file.metadata.get(name) == value for name, value in plan.settings.items())
    if not is_ours or list(file.ids) != good or len(good) + len(failed) != len(items):
        raise ExportError(
            f"{path} is of another export, expected the settings of {SETTINGS} and the images of "
            f"{LISTING} from line {shard * plan.listing.shard_size + 1}; move it away"
        )
    return shard_rows(file, items, shard * plan.listing.shard_size)


def _encode(
    encoder: VisionEncoder,
    images: Iterator[ShardStart | _Image],
    options: ExportOptions,
    breaker: CircuitBreaker,
    clock: StageTimer,
) -> Iterator[tuple[_Image, Tensor | None]]:
    """Every image in order, with its embeddings or its error."""
    under_way: deque[_Image] = deque()

    def patches() -> Iterator[Patches]:
        while True:
            with clock.stage(READ):
                image = next(images, None)
            if not isinstance(image, _Image):
                return
            under_way.append(image)
            breaker.count_read(image.error)
            if image.patches is not None:
                prepared, image.patches = image.patches, None
                yield prepared

    output: Literal["patch", "merged"] = "patch" if options.output == "patch" else "merged"
    encoded = encoder.encode_iter(patches(), on_error="skip", output=output, decode_threads=1)
    for features in _timed(encoded, clock):
        while under_way[0].error is not None:
            yield under_way.popleft(), None
        image = under_way.popleft()
        if isinstance(features, FailedImage):
            image.error = features.error
            yield image, None
        else:
            image.grid_thw = features.grid_thw
            yield image, features.embeds
    for image in under_way:
        yield image, None


def _in_groups(
    encoded: Iterable[tuple[_Image, Tensor | None]], device: torch.device
) -> Iterator[tuple[list[_Image], list[Tensor]]]:
    """Images, and the embeddings of those that have any, as many as are copied from a GPU at once.

    What a copy costs in Python an export of small images would wait for. On a CPU nothing is
    copied, and each image is told when it is done.
    """
    most = GROUP_IMAGES if device.type == "cuda" else 1
    images: list[_Image] = []
    embeds: list[Tensor] = []
    n_bytes = 0
    for image, each in encoded:
        images.append(image)
        if each is not None:
            embeds.append(each)
            n_bytes += each.nbytes
        if len(images) == most or n_bytes >= GROUP_BYTES:
            yield images, embeds
            images, embeds, n_bytes = [], [], 0
    if images:
        yield images, embeds


def _timed(
    encoded: Iterator[ImageFeatures | FailedImage], clock: StageTimer
) -> Iterator[ImageFeatures | FailedImage]:
    while True:
        with clock.stage(ENCODE):
            features = next(encoded, None)
        if features is None:
            return
        yield features


def _load(item: Item, config: ImageConfig, limits: ImageLimits) -> _Image:
    """An image with its patches, or its error."""
    image = _Image(item)
    try:
        image.stage = "read" if item.error is None else "list"
        data = read_item(item, limits)
        image.sha256 = sha256(data).hexdigest()
        image.stage = "decode"
        rgb = load_image(data, name=item.id, limits=limits)
        image.size_px, image.notes = (rgb.height, rgb.width), rgb.notes
        image.patches = patchify(rgb.picture, config, name=item.id)
        image.stage = "encode"
    except ImageError as error:
        image.error = error.without_frames()
    except MemoryError:
        message = f"{display_name(item.id)} does not fit into memory; free some, or leave it out"
        image.error = ImageError(message, code="memory")
    return image
