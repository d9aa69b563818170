"""Check stored features: every file, every row and every recorded digest."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import Any

from qwen_vit.common.store_path import as_path
from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ExportError, UnreadableError, display_name, plural
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.listed import listings_of
from qwen_vit.feature_files.read import FeatureFolder, open_features
from qwen_vit.feature_files.schema import RESUME, REWRITE_SHARD, rows_by_tensor, shard_name
from qwen_vit.feature_files.writer import rows_sha256

__all__ = ["Verification", "verify_features"]


@dataclass(frozen=True, slots=True)
class Verification:
    """Count the stored features that a check read, and list the problems that it found.

    Attributes:
        images: the number of images that the check read, without superseded images.
        digests: how many of `images` have a recorded sha256, with which the check compared the
            rows.
        superseded: the number of images that a later listing replaced or withdrew. The check also
            read their features.
        saved: how many of `images` are saved in unfinished shards.
        to_do: the number of images that the export has still to encode.
        failed: the number of failed images, by error code, without superseded images.
        is_damaged: whether the check found a problem other than missing shards.
        problems: one sentence per problem.
    """

    images: int
    rows: int
    digests: int
    superseded: int
    saved: int
    to_do: int
    failed: dict[str, int]
    is_damaged: bool
    problems: tuple[str, ...]


def verify_features(
    path: str | Path, *, on_image: Callable[[], Any] = lambda: None
) -> Verification:
    """Read and check every row of a feature file or an export folder.

    >>> verify_features("features.safetensors").problems  # doctest: +SKIP
    ()

    In each file, the headers, ids and offsets must be valid. Each image must have the number of
    rows that its grid implies. The rows must be finite and match the recorded digests. An export
    must also have all its shards, and its listings must match their recorded hashes.

    Raises ExportError if the file or folder is missing, cannot be read, has another schema, or is
    neither a feature file nor an export.
    """
    check = _Check(on_image)
    try:
        features = open_features(as_path(path))  # a cache would hide what the store has
        if isinstance(features, FeatureFolder):
            check.folder(features)
        else:
            check.file(features)
    except UnreadableError:
        raise
    except ExportError as error:
        check.problems.append(str(error))
    return Verification(
        check.images, check.rows, check.digests, check.superseded, check.saved, check.to_do,
        dict(check.failed.most_common()), bool(check.problems),
        (*check.problems, *check.unfinished),
    )  # fmt: skip


class _Check:
    def __init__(self, on_image: Callable[[], Any]) -> None:
        self.images = self.rows = self.digests = self.superseded = self.saved = self.to_do = 0
        self.failed: Counter[str] = Counter()
        self.problems: list[str] = []
        self.unfinished: list[str] = []  # one sentence about missing shards
        self._on_image = on_image

    def folder(self, folder: FeatureFolder) -> None:
        listings = listings_of(folder.metadata, folder.path / "export.json")
        for listing in listings:
            with (folder.path / listing.name).open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != listing.sha256:
                    self.problems.append(
                        f"{listing.name}: its sha256 differs from the one in export.json"
                    )
        missing = 0
        for shard in range(listings[-1].shards.stop):
            if not (folder.path / shard_name(shard)).exists():
                missing += 1
                continue
            try:
                self.file(
                    folder.open_shard(shard), partial(folder.is_current, shard), REWRITE_SHARD
                )
            except ExportError as error:
                self.problems.append(str(error))
        before = self.images
        for shard, files in folder.segments.items():
            for file in files:
                self.file(file, partial(folder.is_current, shard))
        self.saved = self.images - before
        self.to_do = len(folder.listing) - self.images - self.failed.total()
        if missing:
            self.unfinished.append(f"{plural(missing, 'shard')} missing: {RESUME}")

    def file(
        self, file: FeatureFile, is_current: Callable[[str], bool] = lambda _: True,
        remedy: str = "write the file again",
    ) -> None:  # fmt: skip
        """Check a file, and count its images that are current."""
        per_row = file.metadata.get("patches_per_row")
        facts = file.metadata.get("images") or [{} for _ in file.ids]
        for name, features, entry in zip(file.ids, file, facts, strict=True):
            self._on_image()
            expected = 1 if per_row is None else math.prod(features.grid_thw) // per_row
            where = f"{display_name(file.path.name)}: {display_name(name)}"
            if "patches_per_row" in file.metadata and len(features.embeds) != expected:
                self.problems.append(
                    f"{where}: {len(features.embeds)} rows for a grid of {features.grid_thw}"
                )
            digests = entry.get("rows_sha256") or {}  # schema 1 has no digests
            for tensor, rows in rows_by_tensor(features).items():
                if not all_finite(rows):
                    self.problems.append(f"{where}: {tensor} contains NaN or infinity")
                if digests and digests.get(tensor) != rows_sha256(rows):
                    self.problems.append(
                        f"{where}: its rows of {tensor} changed after they were written; {remedy}"
                    )
            if is_current(name):
                self.images += 1
                self.rows += len(features.embeds)
                self.digests += bool(digests)
            else:
                self.superseded += 1
        self.failed.update(error.code for error in file.errors if is_current(error.id))
