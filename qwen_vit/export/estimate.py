"""How large an export will be, and how long it will take, from the images' headers."""

import io
import math
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan, plan_dry_run
from qwen_vit.features import ImageFeatures
from qwen_vit.images.decode import DECODERS
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.patches import smart_resize
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item

__all__ = ["Estimate", "estimate_export", "estimate_plan", "target_size"]

SAMPLE = 1_000  # images, for a plan
IMAGES_TIMED = 8
SLOW_S = 5.0  # an image that takes so long is timed alone
HEAD_BYTES = 2**16  # of an image in a tar; most formats have the size there
BYTES_BESIDE_ROWS = 500  # an image's ids, hashes and sizes in its shard's header


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an export will take, from the images' headers.

    Attributes:
        images, rows, bytes: those of the whole export.
        unreadable: images without a readable header, or of more pixels than are allowed.
        seconds: the time of the encoder; None where no image was timed.
        is_sample: whether a sample of the images stands for all of them.
    """

    images: int
    unreadable: int
    rows: int
    bytes: int
    seconds: float | None
    is_sample: bool = False


def estimate_export(
    encoder: VisionEncoder,
    inputs: Sequence[str],
    options: ExportOptions | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> Estimate:
    """Count images, rows and bytes from every image's header, and time a few; nothing is written.

    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> estimate_export(encoder, ["tests/images/rocket.jpg"]).rows
    345

    Raises ExportError for inputs that an export would refuse and, if `folder` is given, for a
    folder that it could not write or resume.
    """
    options = options or ExportOptions()
    where = None if folder is None else Path(folder)
    with plan_dry_run(encoder, inputs, where, options) as plan:
        items = (item for shard in plan.shards for item in plan.listing.shard(shard))
        bar = tqdm(
            items, total=plan.n_images, unit="image", file=sys.stderr, disable=not show_progress
        )
        return _estimate(encoder, bar, options)


def estimate_plan(encoder: VisionEncoder, plan: ExportPlan) -> Estimate:
    """Estimate a plan from a sample of its images, without the time."""
    sample = plan.listing.spread(SAMPLE)
    found = _estimate(encoder, sample, plan.options, is_timed=False)
    scale = plan.n_images / len(sample)
    return Estimate(
        plan.n_images,
        round(found.unreadable * scale),
        round(found.rows * scale),
        round(found.bytes * scale),
        None,
        is_sample=scale > 1,
    )


def target_size(height: int, width: int, config: ImageConfig, name: str) -> tuple[int, int]:
    """The size in pixels at which an image is encoded.

    >>> target_size(100, 200, ImageConfig.from_json({}), "a.jpg")
    (112, 196)

    Raises ImageError for an image that has none, such as one of a ratio above 200.
    """
    return smart_resize(
        height,
        width,
        factor=config.patch_px * config.merge_size,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        name=name,
    )


def _estimate(
    encoder: VisionEncoder, items: Iterable[Item], options: ExportOptions, *, is_timed: bool = True
) -> Estimate:
    config, form = encoder.image_config, RowFormat.of(encoder, options)
    images = unreadable = rows = patches = 0
    timed: list[Item] = []
    for item in items:
        images += 1
        size = _size_in_header(item, options.limits)
        if size is None:
            unreadable += 1
            continue
        try:
            height, width = target_size(*size, config, item.id)
        except ImageError:  # a ratio above 200
            unreadable += 1
            continue
        n = height * width // config.patch_px**2
        patches += n
        rows += form.count(n)
        if images & (images - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: from the front to the end
            timed.append(item)
    return Estimate(
        images,
        unreadable,
        rows,
        rows * form.width * form.dtype.itemsize + images * BYTES_BESIDE_ROWS,
        _seconds(encoder, timed, patches, options.limits) if is_timed else None,
    )


def _seconds(
    encoder: VisionEncoder, timed: Sequence[Item], patches: int, limits: ImageLimits
) -> float | None:
    """What all patches take, extrapolated from a few images, after one that warms up."""
    images: list[bytes] = []
    for item in timed[-IMAGES_TIMED:]:
        with suppress(ImageError):
            images.append(read_item(item, limits))
    for chosen in (images[:1], images):
        start = time.monotonic()
        done = encoder.encode(chosen, on_error="skip")
        seconds = time.monotonic() - start
        if seconds > SLOW_S:
            break
    encoded = sum(math.prod(each.grid_thw) for each in done if isinstance(each, ImageFeatures))
    return round(seconds * patches / encoded, 3) if encoded else None


def _size_in_header(item: Item, limits: ImageLimits) -> tuple[int, int] | None:
    """Height and width by the file's header, before any rotation: the tokens are the same."""
    if item.size is not None and item.size > HEAD_BYTES:  # in a tar, of which little is read
        size = _open_header(replace(item, size=HEAD_BYTES), limits)
        if size is not None:
            return size
    return _open_header(item, limits)


def _open_header(item: Item, limits: ImageLimits) -> tuple[int, int] | None:
    try:
        with ExitStack() as stack:
            file: BinaryIO
            if item.offset is None and item.error is None:
                if not stat.S_ISREG(os.stat(item.source).st_mode):
                    return None
                file = stack.enter_context(open(item.source, "rb"))
            else:
                file = io.BytesIO(read_item(item, limits))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # a decoder's, about a doubtful header
            image = stack.enter_context(Image.open(file, formats=tuple(DECODERS)))
            is_allowed = image.height * image.width <= limits.max_pixels
            return (image.height, image.width) if is_allowed else None
    except Exception:  # noqa: BLE001 - plug-ins raise anything; encoding it reports the error
        return None
