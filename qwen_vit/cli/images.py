"""Find the images that `encode` and `show` receive, and encode one image at a time."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vit.cli.checks import check_distinct, check_not_input, check_paths
from qwen_vit.cli.console import print_skipped, warn_of_ignored
from qwen_vit.common.progress import shows_progress

if TYPE_CHECKING:
    from qwen_vit.encoder import VisionEncoder
    from qwen_vit.features import FailedImage, ImageFeatures
    from qwen_vit.images.image import ExifPolicy, ImageLimits
    from qwen_vit.inputs.listing import Item
    from qwen_vit.loading import ImageLoader, LoadedImage, OnError
    from qwen_vit.video.options import VideoOptions

__all__ = ["encode_one_by_one", "list_images", "load_encoder", "warn_of_pixels"]


logger = logging.getLogger("qwen_vit")


def warn_of_pixels(items: "Sequence[Item]") -> None:
    """Warn of pixel limits if they apply to no input, because every input is a video."""
    if items and all(item.is_video for item in items):
        warn_of_ignored(("min_pixels", "max_pixels"), "every input has the extension of a video")


def list_images(
    inputs: Sequence[str],
    out: Path | None = None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    limits: "ImageLimits | None" = None,
    pages: str = "first",
    **decoding: Any,
) -> "list[Item]":
    """Return the images of files, folders, patterns, tars, lists, and "-" for standard input.

    `pages="all"` lists every page and frame. The function logs a warning for options that apply to
    no image.
    """
    from qwen_vit.images.image import ImageLimits
    from qwen_vit.inputs.find import find_items, is_missing, warn_of_skipped
    from qwen_vit.inputs.pages import page_items
    from qwen_vit.inputs.parquet import ParquetColumns
    from qwen_vit.inputs.unsupported import no_image_found
    from qwen_vit.inputs.unused import UnusedOptions

    check_paths(inputs)
    left_out: Counter[str] = Counter()
    columns = ParquetColumns.of(column, id_column)
    # if no path exists, fail before loading a model; otherwise skip the missing ones
    must_exist = all(map(is_missing, inputs))
    unused = UnusedOptions(columns=columns, limits=limits, pages=pages, **decoding)
    found = unused.watch(find_items(inputs, left_out, must_exist=must_exist, columns=columns))
    items = list(found if pages == "first" else page_items(found, limits or ImageLimits()))
    warn_of_skipped(left_out)
    if not items:
        raise no_image_found(inputs, left_out)
    unused.warn()
    warn_of_pixels(items)
    check_distinct([item.id for item in items], items)
    if out is not None:
        check_not_input(out, (item.source for item in items))
    return items


def load_encoder(model: str, **loading: Any) -> "VisionEncoder":
    from qwen_vit.encoder import VisionEncoder

    start = time.perf_counter()
    encoder = VisionEncoder.from_pretrained(model, **loading)
    logger.info("loaded %r in %.1f s", encoder, time.perf_counter() - start)
    return encoder


def encode_one_by_one(
    encoder: "VisionEncoder",
    items: "Sequence[Item]",
    on_error: "OnError",
    exif: "ExifPolicy" = "apply",
    *,
    limits: "ImageLimits | None" = None,
    video: "VideoOptions | None" = None,
    as_video: bool = False,
    **options: Any,
) -> "Iterator[tuple[ImageFeatures | FailedImage, float]]":
    """Yield each image's features or error, and the milliseconds from its file to its features.

    Features are in CPU memory, because encoding needs the GPU's memory. With on_error="raise", the
    function raises the ImageError of the first failed image.
    """
    from tqdm import tqdm

    from qwen_vit.common.tensors import all_finite
    from qwen_vit.errors import ImageError
    from qwen_vit.features import FailedImage, VideoFeatures, not_finite

    loader = _loader(encoder, exif, limits, video, as_video)
    for item in tqdm(items, unit="image", file=sys.stderr, disable=not shows_progress()):
        start = time.perf_counter()
        size_px = None
        result: ImageFeatures | FailedImage
        try:
            loaded, digest = _load(item, loader)
            size_px = loaded.size_px
            if loaded.patches is None:
                raise loaded.error or not_finite(item.id)
            encoded = encoder.encode(loaded.patches, **options)
            if not all(map(all_finite, (encoded.embeds, *encoded.layers.values()))):
                raise not_finite(item.id)
            kept = replace(
                encoded, id=item.id, size_px=size_px, notes=loaded.notes, sha256=digest,
                embeds=encoded.embeds.cpu(),
                layers={block: rows.cpu() for block, rows in encoded.layers.items()},
            )  # fmt: skip
            result = kept if loaded.timing is None else VideoFeatures.of(kept, loaded.timing)
        except ImageError as error:
            if on_error == "raise":
                raise
            failed = FailedImage(item.id, error.without_frames())
            result = failed if size_px is None else replace(failed, size_px=size_px)
            print_skipped(error.text(in_shell=True))
        yield result, 1000 * (time.perf_counter() - start)


def _loader(
    encoder: "VisionEncoder",
    exif: "ExifPolicy",
    limits: "ImageLimits | None",
    video: "VideoOptions | None",
    as_video: bool,
) -> "ImageLoader":
    from qwen_vit.common.prefetch import core_count
    from qwen_vit.images.image import ImageLimits
    from qwen_vit.images.picture import resizes_on
    from qwen_vit.loading import ImageLoader
    from qwen_vit.video.options import VideoLimits, VideoOptions

    return ImageLoader(
        encoder.config, encoder.image_config, "auto", limits or ImageLimits(), "skip",
        VideoLimits(), exif, core_count(), video or VideoOptions(), as_video,
        on_gpu=resizes_on(encoder.device),
    )  # fmt: skip


def _load(item: "Item", loader: "ImageLoader") -> "tuple[LoadedImage, str]":
    """Return an image or video, and the SHA-256 of its bytes."""
    from qwen_vit.inputs.pages import as_page
    from qwen_vit.inputs.read import read_item
    from qwen_vit.video.items import open_video_item, video_of_item

    if item.is_video:
        with open_video_item(item, loader.video_limits) as (file, digest):
            return loader.load_video(video_of_item(item, loader.video), item.id, file), digest
    data = read_item(item, loader.limits)
    return loader.load(as_page(data, item), item.id), sha256(data).hexdigest()
