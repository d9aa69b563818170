"""Bulk export: images -> shards of features, in a folder that any interruption leaves whole.

The listing is frozen first. Line i of it belongs to shard i // shard_size, a feature file whose
bytes follow from the listing and the settings alone; it is there whole or not at all, and names
each of its images, or its error. So what is missing is what remains to be done, and every shard can
be made by any worker, at any time, in any order.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_vit.common.prefetch import StageTimer, thread_count
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, plural
from qwen_vit.export.estimate import Estimate, estimate_plan
from qwen_vit.export.lock import short_lock
from qwen_vit.export.manifest import ManifestRow, load_arrow, write_manifest
from qwen_vit.export.plan import ExportOptions, ExportPlan, open_export
from qwen_vit.export.shards import REST, STAGES, DoneShard, export_shards, whole_shard
from qwen_vit.features import FailedImage, ImageFeatures

__all__ = [
    "ExportCounts",
    "ExportReport",
    "Progress",
    "export_features",
    "load_encoder",
    "make_manifest",
    "warn_of_idle",
]

logger = logging.getLogger("qwen_vit")

LINE_EVERY_S = 60.0
FAILURES_TOLD = 20


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did: the images of its part, whoever exported them, and this run's share.

    `failed` counts images by the code of their error; `resumed` those that were there already.
    `bytes` are those of the part's shards. `waits` is how many seconds of this run went to waiting
    for each of its stages. Of the folder's `shards` some may be missing, those of other parts.
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
    shards: int = 0
    shards_missing: int = 0

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
    options, tally = options or ExportOptions(), ExportCounts()
    thread_count(decode_threads)  # refuses what makes no sense, before anything is made
    load_arrow()
    clock = StageTimer(REST)
    with open_export(encoder, inputs, Path(folder), options) as plan:
        warn_of_idle(len(plan.all_shards), options.part[1], "parts")
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
class ExportCounts:
    """What an export has done so far."""

    exported: int = 0
    resumed: int = 0
    rows: int = 0
    bytes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    start: float = field(default_factory=time.monotonic)

    def count(self, plan: ExportPlan, done: DoneShard) -> None:
        """One more whole shard."""
        good = [row for row in done.rows if row.status == "ok"]
        self.failed.update(row.error_code or "" for row in done.rows if row.status != "ok")
        self.resumed += 0 if done.is_new else len(done.rows)
        self.exported += len(good)
        self.rows += sum(row.tokens or 0 for row in good)
        self.bytes += plan.path(done.shard).stat().st_size

    def report(self, plan: ExportPlan, manifest: Path, waits: dict[str, float]) -> ExportReport:
        """All of it."""
        return ExportReport(
            plan.folder, manifest, plan.n_images, self.exported, dict(self.failed.most_common()),
            self.resumed, self.rows, self.bytes, round(time.monotonic() - self.start, 3),
            {stage: round(waits.get(stage, 0.0), 3) for stage in STAGES},
            len(plan.all_shards), sum(not plan.path(shard).exists() for shard in plan.all_shards),
        )  # fmt: skip


def load_encoder(
    model: str | os.PathLike[str], options: ExportOptions, *, device: str = "auto", **loading: Any
) -> VisionEncoder:
    """Load an encoder: a GPU computes in the type that is stored, a CPU in float32."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    dtype = "auto" if is_cpu or options.dtype is None else options.dtype
    return VisionEncoder.from_pretrained(model, device=device, dtype=dtype, **loading)


def warn_of_idle(n_shards: int, n_workers: int, workers: str) -> None:
    """Say so where there are fewer shards than workers, or parts, to make them."""
    if n_shards < n_workers:
        logger.warning(
            "%s for %d %s: with a smaller --shard-size all would have work",
            plural(n_shards, "shard"), n_workers, workers,
        )  # fmt: skip


def make_manifest(plan: ExportPlan) -> Path:
    """Write the manifest of every shard that is there, those of other parts too.

    Raises ExportError where one of this part, which was whole, cannot be read again.
    """

    def shards() -> Iterator[list[ManifestRow]]:
        for shard in plan.all_shards:
            rows = whole_shard(plan, shard, "the manifest leaves it out: run its part again")
            if rows is not None:
                yield rows
            elif shard in plan.shards:
                raise ExportError(
                    f"{plan.path(shard)} was whole, and cannot be read for the manifest; check its "
                    "disk, and run the same command again"
                )

    with short_lock(plan.folder):
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

    def __init__(self, plan: ExportPlan, is_shown: bool) -> None:
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

    def count(self, features: ImageFeatures | FailedImage) -> None:
        """One more image, in this process."""
        if isinstance(features, FailedImage):
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
