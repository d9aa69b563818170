"""Bulk export: images -> shards of features, in a folder that any interruption leaves whole.

The listing is frozen first. Line i of it belongs to shard i // shard_size, a feature file whose
bytes follow from the listing and the settings alone; it is there whole or not at all, and names
each of its images, or its error. So what is missing is what remains to be done, and every shard can
be made by any worker, at any time, in any order.
"""

import json
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError, shown
from qwen_vit.export_estimate import Estimate, estimate_plan
from qwen_vit.export_plan import (
    LISTING,
    SETTINGS,
    ExportOptions,
    Plan,
    RowForm,
    open_export,
)
from qwen_vit.feature_files import open_shard
from qwen_vit.features import FeatureWriter, ImageFeatures
from qwen_vit.finite import extremes
from qwen_vit.folder_lock import hold_moment
from qwen_vit.image import ImageLimits, load_image
from qwen_vit.listing import Item, read_item
from qwen_vit.manifest import ManifestRow, load_arrow, shard_rows, write_manifest
from qwen_vit.patches import Patches, patchify
from qwen_vit.pinned_ring import PinnedRing
from qwen_vit.pipeline import Behind, Clock, Job, thread_count, work_ahead
from qwen_vit.safetensors_header import MAX_HEADER_BYTES

__all__ = [
    "Breaker",
    "DoneShard",
    "ExportReport",
    "Progress",
    "Tally",
    "export_features",
    "export_shards",
    "load_encoder",
    "make_manifest",
    "whole_shard",
]

logger = logging.getLogger("qwen_vit")

LINE_EVERY_S = 60.0
FAILURES_TOLD = 20
RING_BYTES = 2**29  # pinned, for features on their way
BEHIND_BYTES = RING_BYTES // 4 * 3  # of them that wait to be written; one more finds room beside
IMAGE_HEAD_BYTES = 320  # of a shard's head, besides names: grid, offset, hash, size, notes
ROW_BYTES = 1_000  # of the manifest, in memory, or more
STAGES = READ, ENCODE, COPY, WRITE, REST = "read and decode", "encode", "copy back", "write", "rest"


@dataclass(slots=True)
class Breaker:
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
    stage: str = "read"
    error: ImageError | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.pixels.nbytes


class _Begin(NamedTuple):
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
    plan: Plan,
    shards: Iterable[int],
    *,
    breaker: Breaker | None = None,
    on_image: Callable[[ImageFeatures], None] = lambda features: None,
    decode_threads: int | None = None,
    clock: Clock | None = None,
) -> Iterator[DoneShard]:
    """Make shards, one after the other, and give each when it is on the disk.

    Threads load images ahead, the next shard's too, and one writes behind; batches never cross a
    shard, so its bytes do not depend on this, and none is encoded before the one before it is
    whole. `on_image` sees each image when it is done, in the thread that writes; its rows are gone
    afterwards. Raises ExportError where a shard cannot be written, or `breaker` stops it; the first
    ImageError with on_error="raise".
    """
    breaker, clock = breaker or Breaker(plan.options.max_failures), clock or Clock(REST)
    form = RowForm.of(encoder, plan.options)
    jobs = _jobs(encoder.image_config, plan, shards)
    sender: _Sender | None = None  # made when a shard is missing: it takes memory
    with closing(work_ahead(jobs, threads=thread_count(decode_threads))) as loaded:
        for begin in loaded:
            if not isinstance(begin, _Begin):
                raise TypeError(f"{type(begin).__name__} between shards")
            if begin.rows is not None:
                yield DoneShard(begin.shard, begin.rows, is_new=False)
                continue
            sender = sender or _Sender(encoder.device, form)
            images = islice(loaded, begin.n_images)
            with (
                _Shard(plan, begin.shard, form, breaker, on_image) as shard,
                Behind(BEHIND_BYTES) as writer,
            ):
                for image, embeds in _encode(encoder, images, plan.options, breaker, clock):
                    with clock.stage(COPY):
                        rows = None if embeds is None else sender.send(embeds)
                    with _behind(shard, clock):
                        n_bytes = 0 if rows is None else rows.n_bytes
                        writer.do(partial(shard.add, image, rows), n_bytes)
                with _behind(shard, clock):
                    saved = writer.wait(writer.do(shard.save))
            yield DoneShard(begin.shard, saved, is_new=True)


def _jobs(config: ImageConfig, plan: Plan, shards: Iterable[int]) -> Iterator[Job[_Begin | _Image]]:
    for shard in shards:
        rows = whole_shard(plan, shard)
        items = plan.listing.shard(shard) if rows is None else []
        yield Job(partial(_Begin, shard, len(items), rows))
        for item in items:
            yield Job(partial(_load, item, config, plan.options.limits))


@contextmanager
def _behind(shard: "_Shard", clock: Clock) -> Iterator[None]:
    """Waiting for the thread that writes; which may itself wait for what the GPU has not sent."""
    before, begin = shard.waited_s, time.perf_counter()
    with clock.stage(WRITE):
        yield
    # it may have waited since long before we did
    waited_s = min(shard.waited_s - before, time.perf_counter() - begin)
    clock.move(waited_s, WRITE, COPY)


def _head_room(items: Sequence[Item], settings: Mapping[str, Any]) -> int:
    """The bytes to leave for a shard's head; what it follows from is known before any image is."""
    names = [name for item in items for name in (item.id, item.source)]
    text = json.dumps({**settings, "ids": names})
    return len(json.dumps(text)) + IMAGE_HEAD_BYTES * (len(items) + 1)  # JSON within JSON


class _Rows(NamedTuple):
    """An image's features on their way to the CPU: there, once the GPU has done what it has to."""

    values: Tensor
    extremes: Tensor  # the least and the largest of them, NaN if one is
    arrival: torch.cuda.Event | None
    release: Callable[[], None]  # when nobody reads them any more

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes


class _Sender:
    """Copies what is stored of embeddings to the CPU, on a stream beside the encoder's."""

    def __init__(self, device: torch.device, form: RowForm) -> None:
        self._form = form
        self._ring: PinnedRing | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._ring = PinnedRing(_pinned((RING_BYTES,), torch.uint8))

    def send(self, embeds: Tensor) -> _Rows:
        """Begin to copy an image's rows; they are released in the order in which they are sent."""
        if self._form.patches_per_row is None:
            embeds = embeds.float().mean(dim=0, keepdim=True)
        stored = embeds.to(self._form.dtype)
        bounds = extremes(stored)
        if self._ring is None:
            return _Rows(stored, bounds, None, lambda: None)
        place, release = self._ring.take(stored.nbytes), self._ring.give_back
        if place is None:
            place, release = _pinned((stored.nbytes,), torch.uint8), lambda: None
        values, on_host = place.view(stored.dtype).view(stored.shape), _pinned((2,), bounds.dtype)
        self._stream.wait_stream(torch.cuda.current_stream(stored.device))
        with torch.cuda.stream(self._stream):
            for there, here in ((stored, values), (bounds, on_host)):
                here.copy_(there, non_blocking=True)
                there.record_stream(self._stream)
            arrival = torch.cuda.Event(blocking=True)
            arrival.record(self._stream)
        return _Rows(values, on_host, arrival, release)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


class _Shard:
    """A shard's file as it grows, in the thread that writes."""

    def __init__(
        self,
        plan: Plan,
        number: int,
        form: RowForm,
        breaker: Breaker,
        on_image: Callable[[ImageFeatures], None],
    ) -> None:
        self.number = number
        self.waited_s = 0.0  # for the GPU
        self._plan, self._form, self._breaker, self._on_image = plan, form, breaker, on_image
        self._facts: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []
        room = _head_room(plan.listing.shard(number), plan.settings)
        if room > MAX_HEADER_BYTES:  # found out at the end, all of it would have been for nothing
            raise ExportError(
                f"{plan.path(number)} would need a header of up to {room} bytes for "
                f"{plan.listing.shard_length(number)} images, of which safetensors reads "
                f"{MAX_HEADER_BYTES}; lower --shard-size"
            )
        self._writer = FeatureWriter(plan.path(number), form.width, form.dtype, room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.discard()

    def add(self, image: _Image, rows: _Rows | None) -> None:
        """The next image: its rows, or its error."""
        embeds = None if rows is None else self._arrived(image, rows)
        if embeds is not None:
            self._writer.add(image.item.id, embeds, image.grid_thw)
            self._facts.append(
                {
                    "sha256": image.sha256, "size_px": image.size_px, "notes": image.notes,
                    "source": image.item.source,
                }
            )  # fmt: skip
        elif image.error is not None:
            self._errors.append(
                {
                    "id": image.item.id, "stage": image.stage, "code": image.error.code,
                    "message": str(image.error),
                }
            )  # fmt: skip
            if self._plan.options.on_error == "raise":
                raise image.error
        self._breaker.count_done(image.error)
        self._on_image(ImageFeatures(image.item.id, embeds, image.grid_thw, error=image.error))
        if rows is not None:
            rows.release()

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

    def _arrived(self, image: _Image, rows: _Rows) -> Tensor | None:
        """An image's rows on the CPU; None, and its error, if they are not finite."""
        if rows.arrival is not None:
            begin = time.perf_counter()
            with torch.cuda.device(rows.arrival.device):  # or the first GPU is woken, too
                rows.arrival.synchronize()
            self.waited_s += time.perf_counter() - begin
        if bool(rows.extremes.isfinite().all()):
            return rows.values
        image.error = ImageError(
            f"{shown(image.item.id)}: its embeddings hold NaN or infinity; check the checkpoint "
            "with `qwen-vit info`, and try --dtype float32",
            code="not-finite",
        )
        return None


def whole_shard(plan: Plan, shard: int, then: str = "it is made again") -> list[ManifestRow] | None:
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
    images: Iterator[_Begin | _Image],
    options: ExportOptions,
    breaker: Breaker,
    clock: Clock,
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
    for number, features in enumerate(_timed(encoded, clock)):
        while under_way[0].error is not None:
            yield under_way.popleft(), None
        image = under_way.popleft()
        image.grid_thw = features.grid_thw or (0, 0, 0)
        if features.error is not None:  # the encoder was given patches, which have no name
            message = str(features.error).replace(f"image {number} ", f"{shown(image.item.id)} ", 1)
            image.error = ImageError(message, code=features.error.code)
        yield image, features.embeds
    for image in under_way:
        yield image, None


def _timed(encoded: Iterator[ImageFeatures], clock: Clock) -> Iterator[ImageFeatures]:
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
        image.patches = patchify(rgb.pixels, config, name=shown(item.id))
        image.stage = "encode"
    except ImageError as error:
        # without its traceback, whose frames hold the file's bytes
        image.error = ImageError(str(error), code=error.code)
    except MemoryError:
        message = f"{shown(item.id)} does not fit into memory; free some, or leave it out"
        image.error = ImageError(message, code="memory")
    return image


# All of it


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did: the images of its part, whoever exported them, and this run's share.

    `failed` counts images by the code of their error; `resumed` those that were there already.
    `bytes` are those of the part's shards. `waits` is how many seconds of this run went to waiting
    for each of its stages.
    """

    folder: Path
    manifest: Path
    images: int
    exported: int
    failed: dict[str, int]
    resumed: int
    rows: int
    bytes: int
    seconds: float
    waits: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same for a JSON document."""
        return {**asdict(self), "folder": str(self.folder), "manifest": str(self.manifest)}


def export_features(
    encoder: VisionEncoder,
    inputs: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    confirm: Callable[[Estimate], None] | None = None,
    show_progress: bool = False,
    decode_threads: int | None = None,
) -> ExportReport:
    """Export the images of files, folders, patterns, lists and tars into a folder of shards.

    >>> encoder = VisionEncoder.from_pretrained("tiny")  # doctest: +SKIP
    >>> export_features(encoder, ["tests/images"], "features").exported  # doctest: +SKIP
    3

    Called again it takes up what is missing, whatever stopped it; read it with `load_features`.
    `confirm` is shown an estimate before a new export begins, and may raise. Raises ExportError
    for a folder, inputs or settings that do not fit, and a disk that is full; the first ImageError
    with on_error="raise".
    """
    if not hasattr(encoder, "image_config"):
        raise ArgumentError(
            f"encoder is {encoder!r}, expected a VisionEncoder; make one with from_pretrained"
        )
    if not isinstance(options, ExportOptions | None):
        raise ArgumentError(f"options is {options!r}, expected ExportOptions or None")
    options, tally = options or ExportOptions(), Tally()
    thread_count(decode_threads)  # refuses what makes no sense, before anything is made
    load_arrow()
    clock = Clock(REST)
    with open_export(encoder, inputs, Path(folder), options) as plan:
        if confirm is not None and not any(plan.path(shard).exists() for shard in plan.shards):
            confirm(estimate_plan(encoder, plan))
        with Progress(plan, show_progress) as progress:
            for done in export_shards(
                encoder, plan, plan.shards, on_image=progress.count, decode_threads=decode_threads,
                clock=clock,
            ):  # fmt: skip
                if not done.is_new:
                    progress.skip(len(done.rows))
                tally.count(plan, done)
        return tally.report(plan, make_manifest(plan), clock.seconds())


@dataclass(slots=True)
class Tally:
    """What an export has done so far."""

    exported: int = 0
    resumed: int = 0
    rows: int = 0
    bytes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    start: float = field(default_factory=time.monotonic)

    def count(self, plan: Plan, done: DoneShard) -> None:
        """One more whole shard."""
        good = [row for row in done.rows if row.status == "ok"]
        self.failed.update(row.error_code or "" for row in done.rows if row.status != "ok")
        self.resumed += 0 if done.is_new else len(done.rows)
        self.exported += len(good)
        self.rows += sum(row.tokens or 0 for row in good)
        self.bytes += plan.path(done.shard).stat().st_size

    def report(self, plan: Plan, manifest: Path, waits: dict[str, float]) -> ExportReport:
        """All of it."""
        return ExportReport(
            plan.folder, manifest, plan.n_images, self.exported, dict(self.failed.most_common()),
            self.resumed, self.rows, self.bytes, round(time.monotonic() - self.start, 3),
            {stage: round(waits.get(stage, 0.0), 3) for stage in STAGES},
        )  # fmt: skip


def load_encoder(
    model: str | os.PathLike[str], options: ExportOptions, *, device: str = "auto", **loading: Any
) -> VisionEncoder:
    """Load an encoder: a GPU computes in the type that is stored, a CPU in float32."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    dtype = "auto" if is_cpu or options.dtype is None else options.dtype
    return VisionEncoder.from_pretrained(model, device=device, dtype=dtype, **loading)


def make_manifest(plan: Plan) -> Path:
    """Write the manifest of every shard that is there, those of other parts too.

    Raises ExportError where one of this part, which was whole, cannot be read again.
    """

    def shards() -> Iterator[list[ManifestRow]]:
        for shard in range(len(plan.listing.starts)):
            rows = whole_shard(plan, shard, "the manifest leaves it out: run its part again")
            if rows is not None:
                yield rows
            elif shard in plan.shards:
                raise ExportError(
                    f"{plan.path(shard)} was whole, and cannot be read for the manifest; check its "
                    "disk, and run the same command again"
                )

    with hold_moment(plan.folder):
        return write_manifest(plan.folder, shards())


class _Lines:
    """Whole lines in a log, where a terminal has one line that is written again and again."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Each line has been."""


class Progress:
    """A bar on a terminal, a line a minute in a log; the first failures are told in either case."""

    def __init__(self, plan: Plan, is_shown: bool) -> None:
        how: dict[str, Any] = {"file": sys.stderr}
        if is_shown and not sys.stderr.isatty():
            pause = {"mininterval": LINE_EVERY_S, "maxinterval": LINE_EVERY_S}
            how = {"file": _Lines(), "delay": LINE_EVERY_S, **pause}
        self.bar = tqdm(total=plan.n_images, unit="image", disable=not is_shown, smoothing=0, **how)
        self.tokens = self.bytes = self.failed = 0
        self.start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, features: ImageFeatures) -> None:
        """One more image, in this process."""
        if features.embeds is None:
            self._count(0, 0, str(features.error))
        else:
            self._count(len(features.embeds), features.embeds.nbytes)

    def count_shard(self, rows: Sequence[ManifestRow], n_bytes: int) -> None:
        """One more shard, from elsewhere."""
        for row in rows:
            self._count(row.tokens or 0, n_bytes // len(rows), row.error_message)

    def _count(self, tokens: int, n_bytes: int, error: str | None = None) -> None:
        self.tokens += tokens
        self.bytes += n_bytes
        if error is not None:
            self.failed += 1
            self._tell(f"skipped: {error}")
        if not self.bar.disable:
            rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
            self.bar.set_postfix_str(
                f"{rate:,.0f} tokens/s, {self.bytes / 1e6:,.0f} MB, {self.failed} skipped",
                refresh=False,
            )
            self.bar.update()

    def skip(self, count: int) -> None:
        """Images that were there already: they say nothing about the speed."""
        if not self.bar.disable:
            self.bar.initial += count
            self.bar.update(count)

    def _tell(self, message: str) -> None:
        if self.failed <= FAILURES_TOLD:
            with logging_redirect_tqdm():
                logger.warning(message)
        elif self.failed == FAILURES_TOLD + 1:
            with logging_redirect_tqdm():
                logger.warning("skipped: more than %d; the manifest has them", FAILURES_TOLD)
