"""Show the progress of an export with a progress bar on a terminal, or with lines in a log."""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qwen_vit.errors import ImageError
from qwen_vit.export.manifest import ManifestRow
from qwen_vit.export.plan import ExportPlan
from qwen_vit.feature_files.schema import n_bytes_of
from qwen_vit.features import FailedImage, ImageFeatures

__all__ = ["Progress"]

logger = logging.getLogger("qwen_vit")

LINE_EVERY_S = 60.0
MAX_FAILURES_LOGGED = 20


class _Lines:
    """Write whole lines to a log, because a log cannot overwrite a line as a terminal does. Ignore
    write errors, for example of a full disk."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            if line := text.strip():
                sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Do nothing, because the log already contains every line."""


class Progress:
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
        if isinstance(features, FailedImage):
            self._count(0, 0, features.error)
        else:
            n_bytes = n_bytes_of(features)
            self._count(len(features.embeds), n_bytes)

    def count_shard(self, rows: Sequence[ManifestRow], n_bytes: int) -> None:
        """Count a shard of another process."""
        for row in rows:
            self._count(row.tokens or 0, n_bytes // len(rows), row.error_message)

    def _count(self, tokens: int, n_bytes: int, error: ImageError | str | None = None) -> None:
        self.tokens += tokens
        self.bytes += n_bytes
        if error is not None:
            self.failed += 1
            self._log_failure(error)
        if not self.bar.disable:
            rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
            self.bar.set_postfix_str(
                f"{rate:,.0f} tokens/s, {self.bytes / 1e6:,.0f} MB, {self.failed} skipped",
                refresh=False,
            )
            self.bar.update()

    def skip(self, count: int) -> None:
        """Count images of earlier runs without changing the measured speed."""
        if not self.bar.disable:
            self.bar.initial += count
            self.bar.update(count)

    def _log_failure(self, error: ImageError | str) -> None:
        if self.failed > MAX_FAILURES_LOGGED + 1:
            return
        with logging_redirect_tqdm():
            if self.failed <= MAX_FAILURES_LOGGED:
                logger.error("skipped: %s", error)
            else:
                logger.error(
                    "skipped: more than %d images; the manifest lists all of them",
                    MAX_FAILURES_LOGGED,
                )
