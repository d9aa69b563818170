"""Find shards with failures that may be temporary, and remove the shards of a failing run."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.export.circuit_breaker import TrippedError
from qwen_vit.export.manifest import ManifestRow
from qwen_vit.export.plan import ExportPlan
from qwen_vit.export.records import DoneShard
from qwen_vit.feature_files.schema import shard_name
from qwen_vit.images.isolated import decode_in_child
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item
from qwen_vit.video.isolated import load_in_child
from qwen_vit.video.items import open_video_item

__all__ = ["FailingRun", "may_work_now"]

TRANSIENT = ("missing", "unreadable", "memory", "out-of-memory")


def may_work_now(plan: ExportPlan, shard: int, rows: Sequence[ManifestRow]) -> bool:
    """Return whether an image of a finished shard is readable now, after a possibly temporary
    error.

    A child process decodes an image whose error has the code "memory", because decoding may end the
    process.
    """
    current = plan.listing.current  # a later listing may have retried an image
    failed = [
        at
        for at, row in enumerate(rows)
        if row.error_code in TRANSIENT and current.has(shard, row.id)
    ]
    if not failed:
        return False
    items = plan.listing.shard(shard)
    return any(_works_now(items[at], str(rows[at].error_code), plan) for at in failed)


def _works_now(item: Item, code: str, plan: ExportPlan) -> bool:
    options, is_deadly = plan.options, code == "memory"  # it may have killed the process
    try:
        if item.is_video:
            with open_video_item(item, options.video_limits):
                pass
            if is_deadly:
                config = ImageConfig.from_json({**plan.settings["image_policy"], "resample": None})
                load_in_child(item, options.video, options.video_limits, config)
            return True
        data = read_item(item, options.limits)
        if is_deadly:
            decode_in_child(data, item.id, options.limits, page=item.page)
    except (ImageError, MemoryError):
        return False
    return True


class FailingRun:
    """Remove the shards of a series of consecutive failures, if the series stops the export.

    >>> with FailingRun(plan) as run:  # doctest: +SKIP
    ...     for done in export_shards(encoder, plan, plan.shards):
    ...         run.add(done)
    """

    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan
        self._shards: list[int] = []

    def add(self, done: DoneShard) -> None:
        """Add the shard to the series if all its images failed. Otherwise, end the series, and
        begin another if the shard's last image failed."""
        failed = [row.error_code is not None for row in done.rows]
        self._shards = [*self._shards, done.shard] if all(failed) else [done.shard][: failed[-1]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, TrippedError):
            _remove(self._plan, self._shards)


def _remove(plan: ExportPlan, shards: Sequence[int]) -> None:
    for shard in shards:
        plan.folder.remove(shard_name(shard))
