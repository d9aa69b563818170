"""Recognise finished shards and saved segments, read manifest rows, and upload unsent shards."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vit.common.store_path import AnyPath, StorePath
from qwen_vit.errors import ExportError
from qwen_vit.export.manifest import ManifestRow, shard_rows
from qwen_vit.export.plan import ExportPlan
from qwen_vit.export.settings import SETTINGS
from qwen_vit.export.versions import adds_only_decoders, makers_in
from qwen_vit.feature_files.file import open_shard
from qwen_vit.feature_files.listed import is_made_by
from qwen_vit.feature_files.schema import shard_name
from qwen_vit.feature_files.segments import Segment, open_segments

__all__ = ["publish_unsent", "rows_of_saved", "segments_to_keep", "whole_shard"]

logger = logging.getLogger("qwen_vit")


def rows_of_saved(plan: ExportPlan, shard: int) -> list[ManifestRow]:
    """Read back the manifest rows of a shard that this run has just written."""
    rows = whole_shard(plan, shard)
    if rows is None:
        raise ExportError(
            "the shard disappeared or changed right after the export wrote it",
            name=str(plan.path(shard)),
            remedy="check the disk",
        )
    return rows


def whole_shard(
    plan: ExportPlan, shard: int, then: str = "the export writes it again"
) -> list[ManifestRow] | None:
    """Return a shard's manifest rows, or None if its file is missing or damaged.

    If the file is damaged, the function logs a warning with `then` as the remedy. For a file of
    another export, it raises ExportError.
    """
    if not plan.has(shard):
        return None
    return _rows_in(plan, shard, plan.path(shard), then)


def segments_to_keep(
    plan: ExportPlan, shard: int, firsts: Sequence[int], names: Sequence[str],
    path_of: Callable[[str], AnyPath | None],
) -> list[Segment]:  # fmt: skip
    """Return the segments whose rows this run's shard reuses. `names` are the shard's ids.

    This run must have the segments' settings and versions, because a shard records one version of
    each package. The exception is a decoder that was missing when an earlier run wrote the
    segments.
    """
    settings = plan.settings_of(shard)
    ours = makers_in(settings)

    def is_ours(metadata: Mapping[str, Any]) -> bool:
        return adds_only_decoders(makers_in(metadata), ours) and is_made_by(
            {**metadata, **ours}, settings, ()
        )

    return open_segments(path_of, shard, firsts, names, is_ours)


def publish_unsent(plan: ExportPlan, shard: int) -> None:
    """For a store, upload a shard that an earlier run left in `scratch`. Remove the file without an
    upload if it is damaged or belongs to another export."""
    path = plan.folder.scratch / shard_name(shard)
    if path == plan.path(shard) or not path.exists():
        return
    try:
        is_ours = _rows_in(plan, shard, path, "the export writes it again") is not None
    except ExportError:  # it belongs to an export that had this address before
        is_ours = False
    if is_ours:
        plan.folder.publish(path.name)
    path.unlink(missing_ok=True)


def _rows_in(plan: ExportPlan, shard: int, path: AnyPath, then: str) -> list[ManifestRow] | None:
    if isinstance(path, Path) and path.is_dir():
        raise ExportError(
            "a folder", name=str(path), expected="a feature file", remedy="move the folder away"
        )
    try:
        file = open_shard(path)
    except ExportError as error:
        if isinstance(path, StorePath) and isinstance(error.__context__, OSError):
            raise  # the store does not allow reading it
        logger.warning("%s", ExportError.of(error, remedy=then))
        return None
    items = plan.listing.shard(shard)
    failed = {error.id for error in file.errors}
    good = [item.id for item in items if item.id not in failed]
    first_line = plan.listing.first_line(shard)
    if (
        not plan.has_settings(shard, file.metadata)
        or list(file.ids) != good
        or len(good) + len(failed) != len(items)
    ):
        raise ExportError(
            "it belongs to a different export",
            name=str(path),
            expected=f"the settings of {SETTINGS} and the images of the listings from line "
            f"{first_line + 1}",
            remedy="move the file away",
        )
    return shard_rows(file, items, first_line)
