"""Export images to shards of features, in a folder that a later run can resume.

An export first writes its listing, and does not change it afterwards. Line i of the first listing
belongs to shard i // shard_size. A shard is a feature file whose bytes depend only on the images,
the listing and the settings. It exists completely or not at all, and contains the features or the
error of each of its images. The missing shards are therefore the remaining work. Any worker can
write them, at any time, in any order.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.atomic_file import WriteError
from qwen_vit.common.prefetch import thread_count
from qwen_vit.common.store_path import AnyPath, PathOrAddress, as_path
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, plural, with_options
from qwen_vit.export.background import StageTimer
from qwen_vit.export.ec_cache import CacheWriter
from qwen_vit.export.estimate import Estimate, estimate_plan
from qwen_vit.export.lock import short_lock
from qwen_vit.export.manifest import ManifestRow, load_arrow, write_manifest
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan, open_export
from qwen_vit.export.progress import Progress
from qwen_vit.export.records import REST
from qwen_vit.export.result import ExportCounts, ExportReport
from qwen_vit.export.resume import options_or_recorded
from qwen_vit.export.retry import FailingRun
from qwen_vit.export.shards import export_shards
from qwen_vit.export.stop import StopSignals
from qwen_vit.export.whole_shards import whole_shard

__all__ = ["export_features", "hint_resume", "load_encoder", "make_manifest", "warn_of_idle"]

logger = logging.getLogger("qwen_vit")


def export_features(
    encoder: VisionEncoder,
    inputs: Sequence[str | os.PathLike[str]] | None,
    folder: PathOrAddress,
    options: ExportOptions | None = None,
    *,
    confirm: Callable[[Estimate], None] | None = None,
    show_progress: bool = False,
    decode_threads: int | None = None,
    ec_cache: str | os.PathLike[str] | None = None,
    stop: StopSignals | None = None,
) -> ExportReport:
    """Export images and videos into a folder of shards.

    >>> encoder = VisionEncoder.from_pretrained("tiny")  # doctest: +SKIP
    >>> export_features(encoder, ["tests/photographs"], "features").exported  # doctest: +SKIP
    3

    After an interrupt, a second call writes the missing shards. Read the folder with
    `load_features`.

    Args:
        encoder: the encoder of the images and videos.
        inputs: paths of images, videos, folders, patterns, tars, Parquet files and lists. None
            resumes with the images in the export's listing.
        folder: a new or empty folder, or an export to resume. The folder may be an address such as
            "s3://bucket/features".
        options: how to encode and store the images. None selects `ExportOptions()`, or the recorded
            options if `inputs` is None.
        confirm: a function that receives an estimate before the first shard, and may raise an
            error. The export does not call the function if a shard of the part exists.
        show_progress: show a progress bar on a terminal, or a line per minute in a log.
        decode_threads: threads that read and decode. [default: one per two cores, 2 to 16, but 1 on
            a single core]
        ec_cache: a folder for vLLM's encoder cache, which the export writes after each shard. See
            `integrations.vllm.write_ec_cache`.
        stop: a handler of signals. The first signal ends the export after the batch in progress,
            and a second one ends it at once.

    Returns:
        A report that counts the images of the part and the folder's shards.

    Raises:
        KeyboardInterrupt: An interrupt ended the export, which saved the encoded images for the
            next run.
        ExportError: The folder contains other files or another export, another process writes to
            it, or a file cannot be read or written. An input cannot be listed or contains an image
            of another input, no image is found, two images share an id, or `max_failures`
            consecutive images failed.
        ImageError: An image failed, with on_error="raise".
        ArgumentError: `encoder` or `options` has the wrong type, `inputs` is empty or not a list of
            paths, or `decode_threads` is outside 1 to 1,000. The encoder lacks a layer of
            `options.layers`, or `ec_cache` is given without output="merged".
    """
    if not hasattr(encoder, "image_config"):
        raise ArgumentError(
            f"encoder is {short_repr(encoder)}",
            expected="a VisionEncoder",
            remedy="load an encoder with VisionEncoder.from_pretrained",
        )
    if not isinstance(options, ExportOptions | None):
        raise ArgumentError(f"options is {short_repr(options)}", expected="ExportOptions or None")
    options = options_or_recorded(options, inputs, folder)
    thread_count(decode_threads)  # these two raise before a folder exists
    RowFormat.of(encoder, options)
    load_arrow()
    clock = StageTimer(REST)
    with open_export(encoder, inputs, as_path(folder, "folder"), options) as plan, hint_resume():
        counts = ExportCounts(plan.listing.current)
        warn_of_idle(len(plan.all_shards), options.part[1], "parts")
        cache = None if ec_cache is None else CacheWriter(plan, ec_cache)
        if confirm is not None and not plan.has_any():
            confirm(estimate_plan(encoder, plan))
        stop = stop or StopSignals()
        with (
            Progress(plan, show_progress) as progress,
            FailingRun(plan) as run,
            stop.accepted(),
        ):
            for done in export_shards(
                encoder, plan, plan.shards, on_image=progress.count, decode_threads=decode_threads,
                clock=clock, is_stopped=stop.is_requested,
            ):  # fmt: skip
                progress.skip(done.n_kept)
                if cache is not None:
                    cache.add(done)
                counts.count(plan, done)
                run.add(done)
        return counts.report(plan, make_manifest(plan), clock.seconds())


@contextmanager
def hint_resume() -> Iterator[None]:
    """Add to the error of a failed write that the same command resumes the export."""
    try:
        yield
    except WriteError as error:
        error.remedy += " Then run the same command again, which keeps finished shards."
        raise


def load_encoder(
    model: str | os.PathLike[str], options: ExportOptions, *, device: str = "auto", **loading: Any
) -> VisionEncoder:
    """Load an encoder. A GPU computes in `options.dtype`, if given, and a CPU in float32.

    >>> load_encoder("tiny", ExportOptions(dtype="bfloat16"), device="cpu").dtype
    torch.float32
    """
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    dtype = "auto" if is_cpu or options.dtype is None else options.dtype
    return VisionEncoder.from_pretrained(model, device=device, dtype=dtype, **loading)


def warn_of_idle(n_shards: int, n_workers: int, workers: str) -> None:
    if n_shards < n_workers:
        logger.warning(
            "%s for %d %s: lower %s so that no process is idle",
            plural(n_shards, "shard"), n_workers, workers, with_options("{}", "shard_size"),
        )  # fmt: skip


def make_manifest(plan: ExportPlan) -> AnyPath:
    """Write one manifest of all readable shards, including the shards of other parts.

    The manifest contains the current row of each image.
    """

    def shards() -> Iterator[list[ManifestRow]]:
        existing = plan.existing()
        for shard in plan.all_shards:
            then = "the manifest omits this shard: run its part again"
            rows = whole_shard(plan, shard, then) if shard in existing else None
            if rows is not None:
                yield plan.listing.current.rows(shard, rows)
            elif shard in plan.shards:
                raise ExportError(
                    "it was complete, but cannot be read for the manifest",
                    name=str(plan.path(shard)),
                    remedy="check the disk and run the same command again",
                )

    with short_lock(plan.folder.scratch):
        return write_manifest(plan.folder, shards)
