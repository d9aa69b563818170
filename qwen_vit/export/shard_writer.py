"""Write a shard's file in the writer thread."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

import torch
from torch import Tensor

from qwen_vit.errors import ExportError
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.device_to_host import HostCopy
from qwen_vit.export.header_size import reserved_header_bytes
from qwen_vit.export.options import RowFormat
from qwen_vit.export.plan import ExportPlan
from qwen_vit.export.records import ImageRecord, ShardStart
from qwen_vit.export.segments import remove_segments
from qwen_vit.feature_files.file import open_shard
from qwen_vit.feature_files.schema import (
    EMBEDS,
    ItemFacts,
    layer_name,
    rows_by_tensor,
    shard_name,
)
from qwen_vit.feature_files.segments import Segment, segment_name
from qwen_vit.feature_files.writer import FeatureWriter
from qwen_vit.features import FailedImage, ImageFeatures, not_finite
from qwen_vit.images.image import ExifPolicy

__all__ = ["ShardWriter"]

logger = logging.getLogger("qwen_vit")


class ShardWriter:
    """Write the images of a shard that earlier runs have not saved as segments.

    An interrupt in the block saves the images written so far as another segment. `batch_starts` are
    the indices of the first images of batches. On a CPU, where bits depend on the batch, a segment
    ends only at the start of a batch.
    """

    def __init__(
        self,
        plan: ExportPlan,
        start: ShardStart,
        form: RowFormat,
        breaker: CircuitBreaker,
        on_image: Callable[[ImageFeatures | FailedImage], None],
        *,
        bits_depend_on_batch: bool,
    ) -> None:
        self.number, self._replaces = start.shard, start.replaces
        self.waited_s = 0.0  # for the GPU, in seconds
        self.saving: Future[None] | None = None
        self._plan, self._form, self._breaker, self._on_image = plan, form, breaker, on_image
        self._kept, self._firsts = list(start.segments), {*start.firsts}
        self._bits_depend_on_batch = bits_depend_on_batch
        self._first = self._kept[-1].end if self._kept else 0
        self.batch_starts = [self._first]
        self._begin()

    def _begin(self) -> None:
        self._errors: list[tuple[int, dict[str, Any]]] = []  # each with its image's place
        self._has_rows: list[bool] = []  # for each image
        plan, number = self._plan, self.number
        room = reserved_header_bytes(plan.listing.shard(number), plan.settings_of(number))
        self._writer = FeatureWriter(
            plan.folder.scratch / shard_name(number), self._form.tensors, room
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self._keep()
        finally:
            self._writer.discard()

    @property
    def is_saving(self) -> bool:
        """Return whether `save` is queued or running in the writer thread."""
        return self.saving is not None and not self.saving.done()

    @property
    def end(self) -> int:
        """Return the index after the last written image."""
        return self._first + len(self._has_rows)

    def may_be_cut_before(self, place: int) -> bool:
        """Return whether a segment may end before the next image, which is at `place`."""
        return not self._bits_depend_on_batch or place == self.batch_starts[-1]

    def add(self, images: Sequence[ImageRecord], copy: HostCopy) -> None:
        self._wait_for(copy)
        exif = self._plan.options.exif
        items = [_item_facts(image, exif) for image in images]  # a failed image has no rows
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
            self._errors.append((self.end, entry))
            if self._plan.options.on_error == "raise":
                raise error
        self._has_rows.append(error is None)
        self._breaker.count_done(error)
        if error is not None:
            self._on_image(FailedImage(item.id, error, image.stage, image.size_px))
            return
        layers = {block: rows[layer_name(block)] for block in self._plan.options.layers}
        self._on_image(
            ImageFeatures(item.id, rows[EMBEDS], image.grid_thw, image.size_px, layers=layers)
        )

    def close_segment(self, *, publish: bool = True) -> None:
        """Save the images of the open file, if any, as a segment, and begin a new file. With
        `publish`, also upload the segment to a store."""
        if not self._has_rows:
            return
        folder, name = self._plan.folder, segment_name(self.number, self._first)
        path = folder.scratch / name
        self._writer.save(self._facts([entry for _, entry in self._errors]), path)
        self._kept.append(Segment(open_shard(path), self._first, self.end))
        self._firsts.add(self._first)
        self._first = self.end
        self._begin()
        if publish:  # for a run on another machine
            folder.publish(name, replace=True, keep=True)

    def save(self) -> None:
        """Publish the finished shard, and then remove its segments."""
        if self._kept:
            self.close_segment(publish=False)
            self._join()
        else:
            self._writer.save(self._facts([entry for _, entry in self._errors]))
        self._plan.folder.publish(shard_name(self.number), replace=self._replaces)
        remove_segments(self._plan.folder, self.number, self._firsts)
        self._has_rows = []  # an interrupt has nothing more to keep

    def _keep(self) -> None:
        """After an interrupt, save as much of the open file as possible as a segment."""
        end = self.end
        if self._bits_depend_on_batch:
            end = max(place for place in self.batch_starts if place <= end)
        count = end - self._first
        if count <= 0:
            return
        try:
            self._writer.drop_behind(sum(self._has_rows[:count]))
            self._errors = [(place, entry) for place, entry in self._errors if place < end]
            self._has_rows = self._has_rows[:count]
            self.close_segment()
        except ExportError as error:  # it must not hide the interrupt
            logger.warning("%s", error)

    def _join(self) -> None:
        """Write the shard from its segments, with the same bytes as without segments."""
        errors: list[dict[str, Any]] = []
        for segment in self._kept:
            for image, entry in _images(segment):
                rows = rows_by_tensor(image)
                self._writer.add(rows, [_stored_facts(image, entry)])
                if self._writer.last_digests() != entry["rows_sha256"]:
                    raise ExportError(
                        f"the rows of {image.id!r} changed after they were written",
                        name=str(segment.file.path),
                        remedy="delete this file, check the disk, and run the same command again",
                    )
            errors += segment.file.metadata["errors"]
        self._writer.save(self._facts(errors))

    def _facts(self, errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            **self._plan.settings_of(self.number),
            "errors": errors,
            "patches_per_row": self._form.patches_per_row,
        }

    def _wait_for(self, copy: HostCopy) -> None:
        if copy.event is not None:
            begin = time.perf_counter()
            # otherwise torch would create a context on the first GPU
            with torch.cuda.device(copy.event.device):
                copy.event.synchronize()
            self.waited_s += time.perf_counter() - begin


def _images(segment: Segment) -> Iterator[tuple[ImageFeatures, Mapping[str, Any]]]:
    return zip(segment.file, segment.file.metadata["images"], strict=True)


def _item_facts(image: ImageRecord, exif: ExifPolicy) -> ItemFacts:
    return ItemFacts(
        image.item.id, image.grid_thw, image.n_rows, image.size_px, image.notes, image.sha256,
        image.item.source, "image" if image.timing is None else "video",
        exif if image.timing is None else None,
        None if image.timing is None else image.timing.second_per_grid_t,
        None if image.timing is None else image.timing.frame_seconds,
    )  # fmt: skip


def _stored_facts(image: ImageFeatures, entry: Mapping[str, Any]) -> ItemFacts:
    facts = {name: value for name, value in entry.items() if name != "rows_sha256"}
    return ItemFacts(image.id, image.grid_thw, len(image.embeds), **facts)
