"""Check that tars and Parquet files still have the listed images at their listed places."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TypeAlias

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import ExportError, display_name, plural
from qwen_vit.export.folder import OTHER_FOLDER
from qwen_vit.images.pages import page_id
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import ParquetColumns, parquet_items
from qwen_vit.inputs.tars import tar_items

__all__ = ["errors_of_moved"]

_Place: TypeAlias = tuple[int | None, int | None]


def errors_of_moved(items: Iterable[Item], id_column: str | None) -> dict[str, ExportError]:
    """Return an error for each tar or Parquet file with another image at the place of an item.

    A listing has the offset of an image in its tar, and the row of an image in its Parquet file. If
    another program writes the file again in another order, these places have other images. Objects
    in object storage need no check, because each read compares their versions.
    """
    errors: dict[str, ExportError] = {}
    for source, group in groupby(items, key=lambda item: item.source):
        inside = [each for each in group if not each.is_file and each.error is None]
        if not inside or is_remote(source):
            continue
        moved: list[tuple[Item, str]] = []
        with suppress(ExportError):  # such as a lost column: a read reports it
            moved = list(_moved(inside, id_column))
        if moved:
            item, now = moved[0]
            place = f"byte {item.offset}" if item.row is None else f"row {item.row}"
            errors[source] = ExportError(
                f"{place} had the image {display_name(item.id)} when the export listed it, and has "
                f"{display_name(now) or 'no image'} now; {plural(len(moved), 'image')} moved",
                name=source,
                expected="the order that the export listed",
                remedy="restore the file; to start a new export, " + OTHER_FOLDER,
            )
    return errors


def _moved(items: Sequence[Item], id_column: str | None) -> Iterator[tuple[Item, str]]:
    """Yield the items whose place has another image, with this image's name.

    The function yields nothing if the file cannot be listed, because a read reports this error.
    """
    source = items[0].source
    if items[0].row is None:
        found = tar_items(source, "", Counter())
    elif id_column is not None:
        found = parquet_items(source, "", ParquetColumns(str(items[0].column), id_column))
    else:  # an id is the number of a row
        return
    names: dict[_Place, str] = dict.fromkeys(map(_place, items), "")
    for each in found:
        if each.error is not None and not each.id:
            return
        if _place(each) in names:
            names[_place(each)] = each.id
    for item in items:
        name = names[_place(item)]
        id = name if item.page is None else page_id(name, item.page)
        is_same = item.id == id if item.row is not None else item.id.endswith(id)
        if not (name and is_same):
            yield item, name.lstrip("/")


def _place(item: Item) -> _Place:
    return item.offset, item.row
