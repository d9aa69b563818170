"""Write an export's manifest as Parquet or as JSON lines, with a row for each image of its shards.

The export computes the manifest from the shards and the listings, so it can write the manifest
again at any time.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from operator import attrgetter
from typing import Any, BinaryIO

from qwen_vit.common.atomic_file import atomic_file
from qwen_vit.common.store_path import AnyPath
from qwen_vit.export.folder import ChangedError, ExportFolder
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.schema import EMBEDS
from qwen_vit.feature_files.tables import id_bytes, unicode_text, whole_numbers_in_pandas
from qwen_vit.inputs.listing import Item

__all__ = ["ManifestRow", "load_arrow", "shard_rows", "write_manifest"]

PARQUET, JSON_LINES = "manifest.parquet", "manifest.jsonl"
ROWS_IN_A_GROUP = 4_096  # of Parquet, at least: the writer has one group in memory


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """Describe the outcome of one image. `index` is the image's line number, counted from 0 across
    all listings.

    `kind` is "image" or "video". For a failed image, the kind depends on the extension, and is
    "image" for a row of a Parquet file. `status` is "ok" or "error". The image's features are the
    rows `row_begin` to `row_end` - 1 of `shard`. Sizes are in pixels and the grid is in patches.
    `sha256` is the hash of the image's or video's encoded bytes.
    """

    index: int
    id: str
    source: str
    kind: str
    status: str
    shard: str
    row_begin: int | None = None
    row_end: int | None = None
    tokens: int | None = None
    grid_t: int | None = None
    grid_h: int | None = None
    grid_w: int | None = None
    height: int | None = None
    width: int | None = None
    sha256: str | None = None
    notes: str | None = None
    rows_sha256: str | None = None
    error_stage: str | None = None
    error_code: str | None = None
    error_message: str | None = None


def shard_rows(file: FeatureFile, items: Sequence[Item], first: int) -> list[ManifestRow]:
    """Return the manifest rows in the order of `items`. `first` is the line number of the first
    item."""
    facts, shard = file.metadata, file.path.name
    places = {name: place for place, name in enumerate(file.ids)}
    errors = {error.id: error for error in file.errors}
    patches_per_row = facts["patches_per_row"]  # None for one row per image
    grids = file.image_grid_thw.tolist()
    tokens = [1 if patches_per_row is None else math.prod(g) // patches_per_row for g in grids]
    ends = [0, *accumulate(tokens)]
    rows = []
    for index, item in enumerate(items, start=first):
        if item.id in errors:
            error = errors[item.id]
            rows.append(
                ManifestRow(
                    index, item.id, item.source, "video" if item.is_video else "image", "error",
                    shard, error_stage=error.stage, error_code=error.code,
                    error_message=error.message,
                )
            )  # fmt: skip
            continue
        place = places[item.id]
        image, (t, h, w) = facts["images"][place], grids[place]
        height, width = image["size_px"]
        rows.append(
            ManifestRow(
                index, item.id, item.source, image["kind"], "ok", shard, ends[place],
                ends[place + 1], tokens[place], t, h, w, height, width, image["sha256"],
                ", ".join(image["notes"]), image["rows_sha256"][EMBEDS],
            )
        )  # fmt: skip
    return rows


def load_arrow() -> bool:
    """Import pyarrow, and return whether it is installed. Call this function before decoding,
    so that the memory budget for decoding excludes pyarrow's memory."""
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        return False
    pyarrow.array([""])  # the first conversion imports pandas, if installed, which takes memory
    return True


def write_manifest(
    folder: ExportFolder, shards: Callable[[], Iterable[Sequence[ManifestRow]]]
) -> AnyPath:
    """Write the rows of `shards`, in order, as Parquet if pyarrow is installed, and else as JSON
    lines.

    If another machine writes the manifest at the same time, the function writes the manifest again
    from all shards that exist then. Parquet stores only Unicode. The function therefore escapes
    invalid bytes of an id or source, and `id_bytes` contains the original bytes of such an id.
    """
    has_arrow = load_arrow()
    name, other = (PARQUET, JSON_LINES) if has_arrow else (JSON_LINES, PARQUET)
    while True:
        version = folder.version(name)  # read the version before listing the shards
        with atomic_file(folder.scratch / name) as file:
            if has_arrow:
                _write_parquet(file, shards())
            else:
                for rows in shards():
                    for row in rows:
                        file.write(json.dumps(asdict(row)).encode() + b"\n")
        try:
            folder.publish_version(name, version)
            break
        except ChangedError:
            continue
    folder.remove(other)  # written by a run with other packages installed
    return folder / name


def _write_parquet(file: BinaryIO, shards: Iterable[Sequence[ManifestRow]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        field.name: pa.int64() if field.type in (int, int | None) else pa.string()
        for field in fields(ManifestRow)
    }
    schema = whole_numbers_in_pandas(pa.schema([*columns.items(), ("id_bytes", pa.binary())]))
    with pq.ParquetWriter(file, schema) as writer:
        for rows in _row_groups(shards):
            writer.write_table(pa.Table.from_pydict(_as_columns(rows), schema))


def _row_groups(shards: Iterable[Sequence[ManifestRow]]) -> Iterator[list[ManifestRow]]:
    """Join the rows of small shards, because the writer keeps facts about every group in memory."""
    rows: list[ManifestRow] = []
    for shard in shards:
        rows += shard
        if len(rows) >= ROWS_IN_A_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _as_columns(rows: Sequence[ManifestRow]) -> dict[str, list[Any]]:
    columns = {
        field.name: [
            unicode_text(value) if isinstance(value, str) else value
            for value in map(attrgetter(field.name), rows)
        ]
        for field in fields(ManifestRow)
    }
    return {**columns, "id_bytes": [id_bytes(row.id) for row in rows]}
