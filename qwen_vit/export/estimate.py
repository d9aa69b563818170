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

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.export.plan import ExportOptions, ExportPlan, RowFormat, plan_dry_run, target_size
from qwen_vit.features import ImageFeatures
from qwen_vit.images.decode import DECODERS
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item

__all__ = ["Estimate", "estimate_export", "estimate_plan"]

SAMPLE = 1_000  # images, for a plan
IMAGES_TIMED = 8
SLOW_S = 5.0  # an image that takes so long is judged by alone
HEAD_BYTES = 2**16  # of an image in a tar; most formats tell the size there
BYTES_BESIDE_ROWS = 500  # an image's ids, hashes and sizes in its shard's header


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an export will take, from the images' headers.

    `seconds` is None where no image was timed; `unreadable` images have no header that can be
    read, or one that promises more pixels than are allowed. A number that is counted on a sample
    is marked by `is_sample`.
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

    Raises ExportError for inputs that an export would refuse, and for `folder`, if it is given, as
    the one that would be written.
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
    """The same for a plan, from a sample of its images, without the time."""
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
    """What all patches take, judged by a few images, after one that warms up if it is quick."""
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
    """Height and width as the file's header has them, turned or not: the tokens are the same."""
    if item.size is not None and item.size > HEAD_BYTES:  # in a tar, of which little is read
        size = _opened(replace(item, size=HEAD_BYTES), limits)
        if size is not None:
            return size
    return _opened(item, limits)


def _opened(item: Item, limits: ImageLimits) -> tuple[int, int] | None:
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
            warnings.simplefilter("ignore")  # what a decoder would say of a doubtful header
            image = stack.enter_context(Image.open(file, formats=tuple(DECODERS)))
            is_allowed = image.height * image.width <= limits.max_pixels
            return (image.height, image.width) if is_allowed else None
    except Exception:  # noqa: BLE001 - plug-ins raise anything; encoding it says what is wrong
        return None
