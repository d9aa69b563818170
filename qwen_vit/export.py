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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, ImageError
from qwen_vit.export_estimate import Estimate, estimate_plan
from qwen_vit.export_plan import (
    LISTING,
    SETTINGS,
    ExportOptions,
    Plan,
    RowForm,
    open_export,
    target_size,
)
from qwen_vit.feature_files import FeatureFile, load_features
from qwen_vit.features import FeatureSpool, ImageFeatures
from qwen_vit.finite import all_finite
from qwen_vit.folder_lock import hold_moment
from qwen_vit.image import ImageLimits, load_image
from qwen_vit.listing import Item, read_item, shown
from qwen_vit.manifest import ManifestRow, load_arrow, shard_rows, write_manifest

__all__ = [
    "Breaker",
    "ExportReport",
    "export_features",
    "export_shard",
    "load_encoder",
    "make_manifest",
    "whole_shard",
]

logger = logging.getLogger("qwen_vit")

FAILURES_TOLD = 20


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
    embeds: Tensor | None = None
    stage: str = "read"
    error: ImageError | None = None


def export_shard(
    encoder: VisionEncoder,
    plan: Plan,
    shard: int,
    *,
    breaker: Breaker | None = None,
    on_image: Callable[[ImageFeatures], None] = lambda features: None,
) -> list[ManifestRow]:
    """Make one shard, unless it is there, and return its rows of the manifest.

    Nothing but the encoder, the plan and the shard's number goes in, and nothing but the shard is
    written, so any worker may do it. Batches never cross a shard. `on_image` sees each image when
    it is done. Raises ExportError where the shard cannot be written, or `breaker` stops it.
    """
    rows = whole_shard(plan, shard)
    if rows is not None:
        return rows
    items = plan.listing.shard(shard)
    breaker = breaker or Breaker(plan.options.max_failures)
    facts: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    form = RowForm.of(encoder, plan.options)
    with FeatureSpool(plan.path(shard), form.width, form.dtype) as spool:
        for image in _encode(encoder, items, plan.options, breaker):
            embeds = None if image.embeds is None else _finish(image, image.embeds, form)
            if embeds is not None:
                spool.add(image.item.id, embeds, image.grid_thw)
                facts.append(
                    {
                        "sha256": image.sha256, "size_px": image.size_px, "notes": image.notes,
                        "source": image.item.source,
                    }
                )  # fmt: skip
            elif image.error is not None:
                errors.append(
                    {
                        "id": image.item.id, "stage": image.stage, "code": image.error.code,
                        "message": str(image.error),
                    }
                )  # fmt: skip
                if plan.options.on_error == "raise":
                    raise image.error
            breaker.count_done(image.error)
            on_image(ImageFeatures(image.item.id, embeds, image.grid_thw, error=image.error))
        spool.save(
            {
                **plan.settings,
                "errors": errors,
                "images": facts,
                "patches_per_row": form.patches_per_row,
            }
        )
    rows = whole_shard(plan, shard)
    if rows is None:
        raise ExportError(
            f"{plan.path(shard)} is gone, or damaged, right after it was written; check its disk"
        )
    return rows


def whole_shard(plan: Plan, shard: int) -> list[ManifestRow] | None:
    """A shard's rows, or None where it is not there, or torn. Raises ExportError for a strange one.

    Its size must be the one that its header promises, its settings the plan's, and its images and
    errors, together, those of the listing.
    """
    path = plan.path(shard)
    if not path.exists():
        return None
    try:
        file = load_features(path)
        if not isinstance(file, FeatureFile):
            raise ExportError(f"{path} is a folder, expected a feature file; move it away")
    except ExportError as error:
        logger.warning("%s: it is made again", str(error).rpartition(";")[0])
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
    encoder: VisionEncoder, items: Sequence[Item], options: ExportOptions, breaker: Breaker
) -> Iterator[_Image]:
    """Every image in order, with its embeddings or its error; one batch at a time."""
    under_way: deque[_Image] = deque()

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for item in items:
            image = _Image(item)
            under_way.append(image)
            rgb = _load(image, encoder.image_config, options.limits)
            breaker.count_read(image.error)
            if rgb is not None:
                yield rgb

    output: Literal["patch", "merged"] = "patch" if options.output == "patch" else "merged"
    encoded = encoder.encode_iter(pixels(), on_error="skip", output=output, layout="HWC")
    for number, features in enumerate(encoded):
        while under_way[0].error is not None:
            yield under_way.popleft()
        image = under_way.popleft()
        image.embeds, image.grid_thw = features.embeds, features.grid_thw or (0, 0, 0)
        if features.error is not None:  # the encoder was given pixels, which have no name
            message = str(features.error).replace(f"image {number} ", f"{shown(image.item.id)} ", 1)
            image.error = ImageError(message, code=features.error.code)
        yield image
    yield from under_way


def _load(image: _Image, config: ImageConfig, limits: ImageLimits) -> NDArray[np.uint8] | None:
    """An image's pixels, or None and its error."""
    item = image.item
    try:
        image.stage = "read" if item.error is None else "list"
        data = read_item(item, limits)
        image.sha256 = sha256(data).hexdigest()
        image.stage = "decode"
        rgb = load_image(data, name=item.id, limits=limits)
        image.size_px, image.notes = (rgb.height, rgb.width), rgb.notes
        target_size(rgb.height, rgb.width, config, item.id)  # refuses it under its name
    except ImageError as error:
        # without its traceback, whose frames hold the file's bytes
        image.error = ImageError(str(error), code=error.code)
        return None
    except MemoryError:
        message = f"{shown(item.id)} does not fit into memory; free some, or leave it out"
        image.error = ImageError(message, code="memory")
        return None
    image.stage = "encode"
    return rgb.pixels


def _finish(image: _Image, embeds: Tensor, form: RowForm) -> Tensor | None:
    """What is stored of an image's embeddings, on the CPU; None, and its error, if not finite."""
    if form.patches_per_row is None:
        embeds = embeds.float().mean(dim=0, keepdim=True)
    stored = embeds.to("cpu", form.dtype)
    if all_finite(stored):
        return stored
    image.error = ImageError(
        f"{shown(image.item.id)}: its embeddings hold NaN or infinity; check the checkpoint with "
        "`qwen-vit info`, and try --dtype float32",
        code="not-finite",
    )
    return None


# All of it


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did: the images of its part, whoever exported them, and this run's share.

    `failed` counts images by the code of their error; `resumed` those that were there already.
    `bytes` are those of the part's shards.
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

    def to_json(self) -> dict[str, Any]:
        """The same for a JSON document."""
        return {**asdict(self), "folder": str(self.folder), "manifest": str(self.manifest)}


def export_features(
    encoder: VisionEncoder,
    inputs: Sequence[str],
    folder: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    confirm: Callable[[Estimate], None] | None = None,
    show_progress: bool = False,
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
    options, start = options or ExportOptions(), time.monotonic()
    exported = n_rows = n_bytes = resumed = 0
    failed: Counter[str] = Counter()
    load_arrow()
    with open_export(encoder, inputs, Path(folder), options) as plan:
        if confirm is not None and not any(plan.path(shard).exists() for shard in plan.shards):
            confirm(estimate_plan(encoder, plan))
        breaker = Breaker(options.max_failures)
        with _Progress(plan, show_progress) as progress:
            for shard in plan.shards:
                before = progress.done
                rows = export_shard(encoder, plan, shard, breaker=breaker, on_image=progress.count)
                if progress.done == before:
                    progress.skip(len(rows))
                    resumed += len(rows)
                good = [row for row in rows if row.status == "ok"]
                failed.update(row.error_code or "" for row in rows if row.status != "ok")
                exported += len(good)
                n_rows += sum(row.tokens or 0 for row in good)
                n_bytes += plan.path(shard).stat().st_size
        manifest = make_manifest(plan)
    return ExportReport(
        plan.folder, manifest, plan.n_images, exported, dict(failed.most_common()), resumed, n_rows,
        n_bytes, round(time.monotonic() - start, 3),
    )  # fmt: skip


def load_encoder(
    model: str | os.PathLike[str], options: ExportOptions, *, device: str = "auto", **loading: Any
) -> VisionEncoder:
    """Load an encoder: a GPU computes in the type that is stored, a CPU in float32."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    dtype = "auto" if is_cpu or options.dtype is None else options.dtype
    return VisionEncoder.from_pretrained(model, device=device, dtype=dtype, **loading)


def make_manifest(plan: Plan) -> Path:
    """Write the manifest of every shard that is there, those of other parts too."""
    shards = (whole_shard(plan, shard) for shard in range(len(plan.listing.starts)))
    with hold_moment(plan.folder):
        return write_manifest(plan.folder, (rows for rows in shards if rows is not None))


class _Progress:
    """A bar on a terminal; the first failures are told in either case."""

    def __init__(self, plan: Plan, is_shown: bool) -> None:
        self.bar = tqdm(
            total=plan.n_images, unit="image", file=sys.stderr, disable=not is_shown, smoothing=0
        )
        self.done = self.tokens = self.bytes = self.failed = 0
        self.start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, features: ImageFeatures) -> None:
        self.done += 1
        if features.embeds is not None:
            self.tokens += len(features.embeds)
            self.bytes += features.embeds.nbytes
        else:
            self.failed += 1
            self._tell(f"skipped: {features.error}")
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
