"""Report the result of an export, counted by shard."""

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_vit.common.store_path import AnyPath
from qwen_vit.export.listings import CurrentImages
from qwen_vit.export.plan import ExportPlan
from qwen_vit.export.records import STAGES, DoneShard
from qwen_vit.feature_files.schema import shard_name

__all__ = ["ExportCounts", "ExportReport"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Count the images of an export's part, including the images of earlier runs.

    Attributes:
        folder: the export's path or address.
        manifest: the manifest's path or address.
        images: the number of images in the part.
        exported: the number of images with features.
        failed: the number of failed images, by error code.
        failed_earlier: the number of images that failed before this run.
        resumed: the number of images that earlier runs exported or failed to export.
        rows: the number of rows of the exported images.
        bytes: the number of bytes in the part's shards.
        seconds: the duration of this run after it listed the inputs, in seconds.
        waits: the seconds that this run waited for each stage.
        shards: the number of shards of all parts, whether they exist or not.
        shards_missing: the number of missing shards of all parts. Other parts may still write
            them.
    """

    folder: AnyPath
    manifest: AnyPath
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
    failed_earlier: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "folder": str(self.folder), "manifest": str(self.manifest)}


@dataclass(slots=True)
class ExportCounts:
    """Count the images, rows and bytes of an unfinished export. A later listing's images replace
    earlier ones in all counts except `bytes`."""

    current: CurrentImages

    exported: int = 0
    resumed: int = 0
    rows: int = 0
    bytes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_earlier: int = 0
    start: float = field(default_factory=time.monotonic)

    def count(self, plan: ExportPlan, done: DoneShard) -> None:
        rows = self.current.rows(done.shard, done.rows)
        good = [row for row in rows if row.status == "ok"]
        self.failed.update(row.error_code or "" for row in rows if row.status != "ok")
        kept = self.current.rows(done.shard, done.rows[: done.n_kept])
        self.resumed += len(kept)
        self.failed_earlier += sum(row.status != "ok" for row in kept)
        self.exported += len(good)
        self.rows += sum(row.tokens or 0 for row in good)
        self.bytes += plan.folder.size(shard_name(done.shard))

    def report(self, plan: ExportPlan, manifest: AnyPath, waits: dict[str, float]) -> ExportReport:
        return ExportReport(
            plan.folder.place, manifest, self.current.count(plan.shards), self.exported,
            dict(self.failed.most_common()), self.resumed, self.rows, self.bytes,
            round(time.monotonic() - self.start, 3),
            {stage: round(waits.get(stage, 0.0), 3) for stage in STAGES},
            len(plan.all_shards), len(plan.all_shards) - len(plan.existing()), self.failed_earlier,
        )  # fmt: skip
