"""Convert stored features to a NumPy array, or to a table for pandas, Parquet or datasets.

A table has a row per image. The module reads images in order, so a table on disk needs memory for
only one batch of rows. The rows are float32, because neither Arrow nor NumPy has bfloat16. float32
represents every bfloat16 value exactly.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_vit.common.arguments import check_local_path
from qwen_vit.common.atomic_file import atomic_file, check_target
from qwen_vit.common.installation import install_command
from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.feature_files.schema import EMBEDS, METADATA_KEY, rows_by_tensor
from qwen_vit.features import UNKNOWN_SIZE, ImageFeatures

__all__ = [
    "id_bytes", "to_datasets", "to_numpy", "to_pandas", "unicode_text", "whole_numbers_in_pandas",
    "write_parquet",
]  # fmt: skip

EMBEDS_COLUMN = "embeds"
WHOLE_NUMBERS = ("grid_t", "grid_h", "grid_w", "height", "width")
BATCH_BYTES, BATCH_IMAGES = 2**25, 4_096  # of float32 rows at a time; about three copies exist
DENSE_IMAGES = 8  # at a time in datasets; for vectors, its default of 1,000
EMPTY = "choose at least one image that has features"


class StoredImages(Protocol):
    """Define the part of `Features` that a table needs. A higher module defines `Features`."""

    metadata: dict[str, Any]
    path: AnyPath

    def __iter__(self) -> Iterator[ImageFeatures]: ...
    def content(self) -> Any: ...


def to_numpy(features: StoredImages) -> NDArray[np.float32]:
    n_rows, parts = 0, []
    for image in features:
        n_rows += len(image.embeds)
        parts.append(image.embeds)  # a view of the file
    if not parts:
        raise ExportError("contains no image", name=str(features), remedy=EMPTY)
    rows = np.empty((n_rows, parts[0].shape[1]), np.float32)
    end = 0
    for part in parts:
        end += len(part)
        rows[end - len(part) : end] = part.float().numpy()
    return rows


def to_pandas(features: StoredImages) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise _missing("pandas", "pandas", error) from None
    records = [_record(image) for image in features]
    names = list(records[0]) if records else ["id", *WHOLE_NUMBERS, "notes", EMBEDS_COLUMN]
    columns: dict[str, Any] = {}
    for name in names:
        values = [record[name] for record in records]
        dtype = "Int64" if name in WHOLE_NUMBERS else object
        columns[name] = pd.Series(values, dtype=dtype)
    # ids may have bytes that are not Unicode, so they are plain Python strings
    index = pd.Index(columns.pop("id"), dtype=object, name="id")
    return pd.DataFrame(columns).set_index(index)


def write_parquet(
    features: StoredImages, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    try:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise _missing("pyarrow", "arrow", error) from None
    path = check_target("path", path, ".parquet")
    _refuse_source(path, features.path)
    images = iter(features)
    first = next(images, None)
    if first is None:
        raise ExportError("contains no image", name=str(features), remedy=EMPTY)
    schema = _arrow_schema(features, first)
    # the lower half of a bfloat16's float32 is zero, and these bytes compress to almost nothing
    rows = [name for name in schema.names if name == EMBEDS_COLUMN or name.startswith("layer_")]
    leaves = [_leaf(schema.field(name)) for name in rows]
    with (
        atomic_file(path, overwrite=overwrite) as file,
        pq.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=False, use_byte_stream_split=leaves,
            write_statistics=["id"],
        ) as writer,
    ):  # fmt: skip
        for batch in _batches([first], images):
            writer.write_batch(_record_batch(batch, schema))
    return path


def _refuse_source(path: Path, source: AnyPath) -> None:
    """Raise ExportError if a table at `path` would replace the features that it is made of."""
    is_local = isinstance(source, Path) and os.path.exists(path) and os.path.exists(source)
    if is_local and path.samefile(source):  # type: ignore[arg-type]
        raise ExportError(
            "to_parquet reads the features from this file",
            name=str(path),
            remedy="pass another path",
        )


def to_datasets(features: StoredImages, *, cache_dir: str | os.PathLike[str] | None = None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", "datasets", error) from None
    first = next(iter(features), None)
    if first is None:
        raise ExportError("contains no image", name=str(features), remedy=EMPTY)
    schema = _arrow_schema(features, first)
    is_dense = first.output != "mean" or bool(first.layers)
    return datasets.Dataset.from_generator(
        _dataset_rows,
        features=datasets.Features.from_arrow_schema(schema.remove_metadata()),
        cache_dir=None
        if cache_dir is None
        else str(check_local_path("cache_dir", cache_dir, "a folder")),
        # datasets names its cache by a hash of these values, because the path does not identify
        # content
        gen_kwargs={"features": features, "content": repr(features.content())},
        **({"writer_batch_size": DENSE_IMAGES} if is_dense else {}),
    )


def _dataset_rows(features: StoredImages, content: str) -> Iterator[dict[str, Any]]:
    for image in features:
        yield _unicode_record(image)


def _record(image: ImageFeatures) -> dict[str, Any]:
    rows = {name: part.float().numpy() for name, part in rows_by_tensor(image).items()}
    embeds = rows.pop(EMBEDS)
    t, h, w = image.grid_thw
    height, width = image.size_px if image.size_px != UNKNOWN_SIZE else (None, None)
    return {
        "id": image.id, "grid_t": t, "grid_h": h, "grid_w": w, "height": height, "width": width,
        "notes": list(image.notes), EMBEDS_COLUMN: embeds[0] if image.output == "mean" else embeds,
        **rows,
    }  # fmt: skip


def _unicode_record(image: ImageFeatures) -> dict[str, Any]:
    record = _record(image)
    return {**record, "id": unicode_text(image.id), "id_bytes": id_bytes(image.id)}


def _arrow_schema(features: StoredImages, first: ImageFeatures) -> Any:
    import pyarrow as pa

    vector = pa.list_(pa.float32())
    rows = {name: pa.list_(vector) for name in rows_by_tensor(first) if name != EMBEDS}
    facts = {
        name: value
        for name, value in features.metadata.items()
        if name not in ("ids", "images", "errors")
    }
    fields = {
        "id": pa.string(),
        **dict.fromkeys(WHOLE_NUMBERS, pa.int64()),
        "notes": pa.list_(pa.string()),
        EMBEDS_COLUMN: vector if first.output == "mean" else pa.list_(vector),
        **rows,
        "id_bytes": pa.binary(),
    }
    schema = whole_numbers_in_pandas(pa.schema(list(fields.items())))
    return schema.with_metadata(
        {**schema.metadata, METADATA_KEY: json.dumps(facts, sort_keys=True)}
    )


def _leaf(field: Any) -> str:
    """Return Parquet's name for the values of a column of lists."""
    name, kind = field.name, field.type
    while hasattr(kind, "value_type"):
        name, kind = f"{name}.list.element", kind.value_type
    return str(name)


def _batches(
    first: Sequence[ImageFeatures], images: Iterable[ImageFeatures]
) -> Iterator[list[ImageFeatures]]:
    """Yield batches of at most `BATCH_IMAGES` images and `BATCH_BYTES`, or one larger image."""
    batch = list(first)
    n_bytes = sum(map(_table_bytes, batch))
    for image in images:
        if len(batch) == BATCH_IMAGES or n_bytes + _table_bytes(image) > BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
        batch.append(image)
        n_bytes += _table_bytes(image)
    yield batch


def _table_bytes(image: ImageFeatures) -> int:
    return 4 * sum(rows.numel() for rows in rows_by_tensor(image).values())


def _record_batch(images: Sequence[ImageFeatures], schema: Any) -> Any:
    import pyarrow as pa

    records = [_unicode_record(image) for image in images]
    columns = []
    for field in schema:
        values = [record[field.name] for record in records]
        is_rows = isinstance(values[0], np.ndarray)
        columns.append(_list_array(values) if is_rows else pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


def _list_array(arrays: Sequence[NDArray[np.float32]]) -> Any:
    """Convert 1D arrays to lists and 2D arrays to lists of lists, without Python objects.

    Arrow counts a batch's values in int32. `BATCH_BYTES` keeps their number far below 2^31.
    """
    import pyarrow as pa

    values = pa.array(np.concatenate([each.reshape(-1) for each in arrays]))
    if arrays[0].ndim == 2:
        width = arrays[0].shape[1]
        n_rows = sum(map(len, arrays))
        rows = np.arange(0, (n_rows + 1) * width, width, dtype=np.int32)[: n_rows + 1]
        values = pa.ListArray.from_arrays(rows, values)
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, values)


def whole_numbers_in_pandas(schema: Any) -> Any:
    """Return an Arrow schema for which pandas reads int64 columns as Int64, with missing values.

    Without the metadata of this schema, pandas converts a whole-number column with a missing value
    to floats.
    """
    columns = [
        {
            "name": field.name, "field_name": field.name, "pandas_type": "int64",
            "numpy_type": "Int64", "metadata": None,
        }
        for field in schema
        if str(field.type) == "int64"
    ]  # fmt: skip
    notes = {"index_columns": [], "column_indexes": [], "columns": columns}
    return schema.with_metadata({**(schema.metadata or {}), "pandas": json.dumps(notes)})


def unicode_text(text: str) -> str:
    r"""Return text as valid Unicode, which Arrow requires, with invalid bytes escaped.

    >>> print(unicode_text(os.fsdecode(b"caf\xe9.jpg")))
    caf\udce9.jpg
    """
    return text.encode("utf-8", "backslashreplace").decode()


def id_bytes(name: str) -> bytes | None:
    """Return the bytes of an id that is not Unicode, or None for other ids.

    >>> id_bytes("café.jpg"), id_bytes(os.fsdecode(b"caf\\xe9.jpg"))
    (None, b'caf\\xe9.jpg')
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape")
    return None


def _missing(package: str, extra: str, error: ImportError) -> ArgumentError:
    return ArgumentError(
        f"{package} cannot be imported ({error})",
        remedy=f"run {install_command(extra)}",
    )
