"""List the images of an export's inputs, and write the listing to a file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qwen_vit.common.atomic_file import TEMPORARY_SUFFIX
from qwen_vit.export.options import ExportOptions
from qwen_vit.inputs.find import find_items, warn_of_skipped
from qwen_vit.inputs.listing import Listing
from qwen_vit.inputs.pages import page_items
from qwen_vit.inputs.unsupported import no_image_found
from qwen_vit.inputs.unused import UnusedOptions

__all__ = ["list_inputs"]


def list_inputs(inputs: Sequence[str], scratch: Path, options: ExportOptions, out: Path) -> Listing:
    """List the inputs without the export's folder `out`, and write the listing to a temporary file
    of this part."""
    number, count = options.part
    left_out: Counter[str] = Counter()
    path = scratch / f".listing-{number}-of-{count}{TEMPORARY_SUFFIX}"
    unused = UnusedOptions(
        columns=options.columns, limits=options.limits, video=options.video.changed,
        as_video=options.as_video, pages=options.pages, exif=options.exif,
    )  # fmt: skip
    items = unused.watch(find_items(inputs, left_out, columns=options.columns, out=out))
    if options.pages == "all":
        items = page_items(items, options.limits)
    listing = Listing.save(path, items, options.shard_size)
    warn_of_skipped(left_out)
    if listing.n_images == 0:
        path.unlink()
        raise no_image_found(inputs, left_out)
    unused.warn()
    return listing
