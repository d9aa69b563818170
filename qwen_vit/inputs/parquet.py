"""List the images of a Parquet file, one per row, with ids from a column or from row numbers."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.storage import is_remote
from qwen_vit.errors import (
    TO_ENCODE,
    ArgumentError,
    ExportError,
    ImageError,
    display_name,
    with_options,
)
from qwen_vit.inputs.listing import MAX_NAME_BYTES, Item
from qwen_vit.inputs.parquet_file import (
    cannot_read,
    check_images,
    holds_images,
    open_parquet_file,
    parquet_file,
    type_of,
)
from qwen_vit.inputs.parquet_pages import CheckedPages
from qwen_vit.inputs.remote import refuse

__all__ = [
    "PARQUET_SUFFIX", "ParquetColumns", "check_ids", "ids_of_groups", "needs_column",
    "parquet_items",
]  # fmt: skip

PARQUET_SUFFIX = ".parquet"
OWN_COLUMNS = {"id_bytes", "grid_t"}  # of a table of features, and of an export's manifest
MAX_ID_PAGE_BYTES = 2**26
MANY_ID_BYTES = 2**28  # of all ids, which can share long beginnings; a larger file may have more
MANY_ROWS = 100_000  # a file of fewer bytes may have them: rows of nulls, or of one image


@dataclass(frozen=True, slots=True)
class ParquetColumns:
    """Name the image column of a Parquet file and, if chosen, its id column.

    >>> ParquetColumns.of("image", None)
    ParquetColumns(image='image', id=None)
    >>> ParquetColumns.of(None, "key")
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: id_column="key" is given, but no column of images. Pass \
column as well.
    """

    image: str
    id: str | None = None

    @classmethod
    def of(cls, image: str | None, id: str | None) -> "ParquetColumns | None":
        for name, value in (("column", image), ("id_column", id)):
            if value is not None and (not isinstance(value, str) or not value):
                fact = with_options("{} is {value}", name, value=short_repr(value))
                raise ArgumentError(fact, expected="the name of a column")
        if image is None and id is not None:
            raise ArgumentError(
                with_options("{} is given, but no column of images", ("id_column", id)),
                remedy=with_options("pass {} as well", "column"),
            )
        return None if image is None else cls(image, id)


def parquet_items(path: str, name: str, columns: ParquetColumns) -> Iterator[Item]:
    """Yield the rows of a Parquet file. The function reads only the footer and the id column.

    An id is `name:row`, with rows counted from 0, or the value in the id column. A problem of the
    file's content becomes an item with an error.
    """
    try:
        with open_parquet_file(path, name) as file:
            pages = CheckedPages(file)
            parquet = parquet_file(pages)
            schema = parquet.schema_arrow
            check_images(schema, columns.image, name)
            n_bytes = _size(file)
            _check_rows(parquet.metadata, n_bytes, name)
            if columns.id is not None:
                check_ids(schema, columns.id, name)
                groups = range(parquet.metadata.num_row_groups)
                ids = ids_of_groups(parquet, pages, columns.id, groups)
                most = max(MANY_ID_BYTES, n_bytes)
                yield from _items_with_ids(ids, path, name, columns.image, columns.id, most)
                return
            for row in range(parquet.metadata.num_rows):
                yield Item(f"{name}:{row}", path, row=row, column=columns.image)
    except ImageError as error:
        named = error if error.name else ImageError.of(error, name=name, code=error.code)
        yield Item.failed(name, path, named)
    except (ExportError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - pyarrow raises many kinds for a damaged file
        if is_remote(path) and isinstance(error, OSError) and error.errno is not None:
            raise refuse(path, error) from None
        yield Item.failed(name, path, cannot_read(name, error))


def _size(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


def _check_rows(metadata: Any, n_bytes: int, name: str) -> None:
    """Raise ImageError if the number of rows exceeds both MANY_ROWS and the file's size in bytes,
    or differs from the row groups' total.

    The number comes only from the footer, so a few bytes may claim any number of rows.
    """
    groups = (metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
    if metadata.num_rows != sum(groups):
        raise cannot_read(
            name, ValueError("its number of rows differs from the sum of its row groups")
        )
    if metadata.num_rows > max(MANY_ROWS, n_bytes):
        raise ImageError(
            f"a Parquet file of {metadata.num_rows:,} rows in {n_bytes:,} bytes",
            name=name,
            expected=f"at most one row per byte, or {MANY_ROWS:,} rows",
            remedy="keep one row of each image",
            code="slow",
        )


def needs_column(path: str) -> ExportError:
    columns: list[str] = []
    is_own = False
    try:
        with open_parquet_file(path, path) as file:
            schema = parquet_file(file).schema_arrow
            is_own = OWN_COLUMNS.issubset(schema.names)
            columns = [field.name for field in schema if holds_images(field.type)]
    except Exception:  # noqa: BLE001 - a damaged file is reported once its column is named
        columns = []
    if is_own:
        return ExportError(
            "a table of features, without images",
            name=path,
            expected="images, or a Parquet file with a column of images",
            remedy="pass the images, or pass the feature file or the export to `qwen-vit show`",
        )
    found = ", ".join(map(display_name, columns))
    return ExportError(
        "a Parquet file whose column of images is not named",
        name=path,
        expected=f"the name of one of its columns of images: {found}" if found else
        "the name of its column of images",
        remedy=with_options("pass {}", ("column", columns[0]) if columns else "column")
        + TO_ENCODE,
    )  # fmt: skip


def ids_of_groups(
    parquet: Any, pages: CheckedPages, column: str, groups: Iterable[int]
) -> Iterator[Any]:
    """Yield the values of the id column in these row groups, row by row.

    A batch has one row, because rows can repeat one long id, and pyarrow copies it for each row.
    """
    for group in groups:
        pages.expect(parquet, group, column, MAX_ID_PAGE_BYTES)
        for batch in parquet.iter_batches(
            1, row_groups=[group], columns=[column], use_threads=False
        ):
            yield from batch.column(column).to_pylist()


def _items_with_ids(
    ids: Iterator[Any], path: str, name: str, column: str, id_column: str, most: int
) -> Iterator[Item]:
    left = most
    for row, value in enumerate(ids):
        if value is None or value == "":
            missing = ImageError(
                f"its id in column {id_column} is {'null' if value is None else 'empty'}",
                name=f"{name}:{row}",
                remedy="fill that column, or use another column as the ids",
                code="null",
            )
            yield Item.failed(f"{name}:{row}", path, missing)
        elif (n_bytes := len(str(value).encode())) > MAX_NAME_BYTES:
            too_long = ImageError(
                f"its id in column {id_column} has {n_bytes:,} bytes",
                name=f"{name}:{row}",
                expected=f"at most {MAX_NAME_BYTES:,}",
                remedy="shorten it, or use another column as the ids",
                code="damaged",
            )
            yield Item.failed(f"{name}:{row}", path, too_long)
        elif (left := left - n_bytes) < 0:
            raise ImageError(
                f"its first {row + 1:,} ids in column {id_column} have {most - left:,} bytes",
                expected=f"at most {most:,}",
                remedy="shorten them, or use another column as the ids",
                code="slow",
            )
        else:
            recorded = None if is_remote(path) else id_column  # a store has versions
            yield Item(str(value), path, row=row, column=column, id_column=recorded)


def check_ids(schema: Any, column: str, name: str) -> None:
    """Raise ExportError unless exactly one column has this name and contains text or whole
    numbers."""
    import pyarrow as pa  # type: ignore[import-untyped]

    kind = type_of(schema, column, name)
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_id = (
        pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_integer(plain)
    )
    if not is_id:
        raise ExportError(
            f"column {display_name(column)} contains {kind}",
            name=name,
            expected="ids: text or whole numbers",
            remedy=with_options("pass another {}, or none", "id_column"),
        )
