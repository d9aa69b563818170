"""Run the checks of `verify` and `info --verify`, and format the findings."""

import sys
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from qwen_vit.checkpoint import cache
from qwen_vit.checkpoint.hub import Source
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.cli.text import unfinished_text
from qwen_vit.common.progress import shows_progress
from qwen_vit.common.tensors import check_finite
from qwen_vit.errors import CheckpointError, one_line, plural
from qwen_vit.feature_files.verify import verify_features

__all__ = ["Findings", "verify_checkpoint", "verify_stored"]

MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Findings:
    """Describe the checks in words, and list the problems."""

    checked: str | dict[str, str]
    problems: tuple[str, ...]
    unfinished: str = ""  # the counts of an export whose only problem is missing shards
    failed: dict[str, int] | None = None  # the failed images of features, by error code

    @property
    def is_damaged(self) -> bool:
        """Return whether there is a problem other than missing shards."""
        return bool(self.problems) and not self.unfinished

    def to_json(self) -> dict[str, Any]:
        failed = {} if self.failed is None else {"images_failed": self.failed}
        return {"verified": self.checked, "problems": self.problems, **failed}

    def text(self) -> str:
        checked = self.checked
        if isinstance(checked, dict):
            checked = "; ".join(f"{name}: {how}" for name, how in checked.items())
        if not self.problems:
            return f"whole: {checked}"
        verdict = f"not complete: {self.unfinished}"
        if not self.unfinished:
            verdict = f"damaged: {plural(len(self.problems), 'problem')}"
        more = len(self.problems) - MAX_LISTED
        return "\n".join(
            [
                f"{verdict}; {checked}",
                *(f"  {one_line(problem)}" for problem in self.problems[:MAX_LISTED]),
                *([f"  and {more} more: --json lists all"] if more > 0 else []),
            ]
        )


def verify_checkpoint(source: Source) -> Findings:
    """Hash a checkpoint's files if hashes are recorded for it. Otherwise read every weight."""
    try:
        checked = cache.check(source.folder)
        if checked is not None:
            return Findings(checked, ())
        checkpoint = load_checkpoint(source.folder)
        for name, tensor in checkpoint.tensors.items():
            check_finite(tensor, checkpoint.locate(name))
    except CheckpointError as error:
        return Findings("the command stopped at the first problem", (error.text(in_shell=True),))
    return Findings("no hash is recorded for this folder; every weight was read and is finite", ())


def verify_stored(path: str) -> Findings:
    with tqdm(unit="image", file=sys.stderr, disable=not shows_progress()) as bar:
        found = verify_features(path, on_image=bar.update)
    with_digests = f"{found.digests:,} images" if found.digests < found.images else "all images"
    by_digest = "; no digests are recorded" * bool(found.images)
    if found.digests:
        by_digest = f"; {with_digests} compared with their digests"
    rows = f"{plural(found.images, 'image')}, {plural(found.rows, 'row')} read{by_digest}"
    n_failed = sum(found.failed.values())
    failed = f"; {plural(n_failed, 'image')} failed" * bool(n_failed)
    older = f"; also read {plural(found.superseded, 'superseded image')}" * bool(found.superseded)
    is_unfinished = bool(found.problems) and not found.is_damaged
    counts = unfinished_text(found.saved, found.to_do) if is_unfinished else ""
    return Findings(rows + failed + older, found.problems, counts, found.failed)
