"""Find the images of inputs, in a fixed order."""

import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from qwen_vit.common.arguments import missing_remedy
from qwen_vit.common.storage import RemoteObject, is_remote
from qwen_vit.errors import TO_ENCODE, ExportError, ImageError, Wording, display_name, with_options
from qwen_vit.images.image import ADDRESS
from qwen_vit.images.refusals import address_remedy
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.lists import (
    JSON_SUFFIX,
    LIST_SUFFIXES,
    json_list_items,
    stdin_items,
    text_list_items,
)
from qwen_vit.inputs.overlap import Overlap
from qwen_vit.inputs.parquet import (
    PARQUET_SUFFIX,
    ParquetColumns,
    needs_column,
    parquet_items,
)
from qwen_vit.inputs.remote import listed_objects, remote_item
from qwen_vit.inputs.suffixes import count_left_out, suffix_of
from qwen_vit.inputs.tars import (
    COMPRESSED_TARS,
    MEDIA_SUFFIXES,
    TAR_SUFFIX,
    compressed_tar,
    tar_items,
)
from qwen_vit.inputs.unsupported import NOT_IMAGES, STDIN, not_images
from qwen_vit.inputs.urls import is_https

__all__ = [
    "STDIN", "check_inputs", "find_items", "is_missing", "warn_of_skipped",
]  # fmt: skip

logger = logging.getLogger("qwen_vit")

MAX_SUFFIXES_LOGGED = 5
# a search of a folder may return files with these suffixes
TAKEN_SUFFIXES = (*MEDIA_SUFFIXES, TAR_SUFFIX, *COMPRESSED_TARS, PARQUET_SUFFIX)
DEEP = re.compile(r"(?:^|(?<=/))\*\*(?:/+|$)")  # in a pattern: any number of folders
Identity: TypeAlias = tuple[int, int] | None  # of a folder
NOWHERE = (-1, -1)  # the identity of no folder
ALL_BELOW = re.compile(r"(?:^|/)\*\*(?:/+\*{1,2})*/*$")  # each match is an item


def find_items(
    inputs: Sequence[str],
    left_out: Counter[str] | None = None,
    *,
    must_exist: bool = True,
    columns: ParquetColumns | None = None,
    out: Path | None = None,
) -> Iterator[Item]:
    """Yield the images of files, folders, patterns, lists, tars and Parquet files, in input order.

    >>> [item.id for item in find_items(["tests/photographs/*.png"])]
    ['tests/photographs/astronaut.png', 'tests/photographs/chelsea.png']

    A file's id is its path as the caller passed it, normalised by pathlib. In a folder, the id is
    the path below the folder. In a tar, the id is the tar's name and the member's name. The
    function reads Parquet files only with `columns`. A row's id is the file's name and the row, or
    the value in the id column.

    A .txt or .lst list has one path per line. A .jsonl list has one object per line, with "path" or
    "source", and optionally "id". Paths in a list are relative to its folder. "-" reads a list from
    standard input, whose paths are relative to the current folder.

    The function searches folders to every depth, through links, in byte order of the names. In
    folders and tars, it skips files of other kinds, and counts them by extension in `left_out`.
    Neither a folder's search nor `**` in a pattern follows a link to a parent folder. A folder's
    search skips `out`, the folder of the results.

    With `must_exist=False`, a missing path or a web address becomes an item, and the function does
    not open it. With `must_exist=False`, an input folder that cannot be listed becomes an item with
    `error`. A problem below an input always does.

    Raises ExportError if an input contains an image of another input. The function does not check
    lists or addresses in object storage.
    """
    left_out = Counter() if left_out is None else left_out
    _check_alone(inputs, columns)
    overlap, skip = Overlap(inputs), NOWHERE if out is None else _identity(str(out)) or NOWHERE
    reported: set[str] = set()  # unreadable folders; several patterns may reach one
    for given in inputs:
        if not must_exist and is_missing(given):
            yield Item(given, given)
            continue
        if not must_exist and os.path.isdir(given) and (refused := _listing_error(given, given)):
            yield Item.failed(given, given, refused)
            continue
        for item in overlap.checked(given, _input_items(given, left_out, columns, skip)):
            if item.error is not None and item.error[0] == "unreadable":
                if item.source in reported:
                    continue
                reported.add(item.source)
            yield item


def is_missing(given: str) -> bool:
    """Return whether an input is a path that does not exist or cannot be reached, such as a link to
    itself. A web address counts as such a path, but a pattern, standard input and an address in
    object storage do not."""
    is_pattern = glob.has_magic(given) and not is_https(given)  # a query starts with "?"
    is_path = not (is_pattern or given == STDIN or is_remote(given))
    return is_path and not os.path.exists(given)


def check_inputs(inputs: Sequence[str], columns: ParquetColumns | None = None) -> None:
    """Check each input up to its first image, except standard input.

    >>> check_inputs(["tests/photographs/rocket.jpg"])
    """
    _check_alone(inputs, columns)
    for given in inputs:
        if given != STDIN:  # standard input can be read only once
            next(_input_items(given, Counter(), columns), None)


def warn_of_skipped(left_out: Counter[str]) -> None:
    if left_out:
        kinds = left_out.most_common(MAX_SUFFIXES_LOGGED)
        named = ", ".join(
            f"{count} {display_name(suffix) if suffix else 'without any'}"
            for suffix, count in kinds
        )
        more = ", ..." if len(left_out) > len(kinds) else ""
        logger.warning("skipped files without an image or video extension: %s%s", named, more)


def _check_alone(inputs: Sequence[str], columns: ParquetColumns | None) -> None:
    """Reject inputs that are all Parquet files, if no column is given. Reject a single input of an
    unsupported kind, such as .csv."""
    if columns is None and all(given.lower().endswith(PARQUET_SUFFIX) for given in inputs):
        for path in (path for given in inputs for path in [given, *glob.iglob(given)]):
            if os.path.isfile(path):
                raise needs_column(path)
    if len(inputs) == 1 and os.path.isfile(inputs[0]):
        if suffix_of(inputs[0]) in NOT_IMAGES:
            raise not_images(inputs[0])
        if inputs[0].lower().endswith(COMPRESSED_TARS):
            raise ExportError.of(compressed_tar(inputs[0]))


def _input_items(
    given: str, left_out: Counter[str], columns: ParquetColumns | None, skip: Identity = NOWHERE
) -> Iterator[Item]:
    if given == STDIN:
        yield from stdin_items()
        return
    if is_remote(given):
        yield from _remote_items(given, left_out, columns)
        return
    if ADDRESS.match(given):
        remedy = address_remedy(given)
        if is_https(given):
            remedy = with_options("list it in a .txt file, and pass its host as {}", "allow_urls")
            remedy += TO_ENCODE
        raise ExportError("an address, not a file", name=given[:80], remedy=remedy)
    if os.path.lexists(given) or not glob.has_magic(given):
        yield from _path_items(given, left_out, columns, skip, may_be_list=True)
        return
    unreadable: dict[str, Item] = {}
    matches = sorted(set(_matches(given, unreadable)), key=os.fsencode)
    if not matches and not unreadable:
        raise ExportError("no file matches", name=given, remedy="check the pattern")
    folders: set[Path] = set()
    for match in matches:
        is_folder = os.path.isdir(match)
        is_taken = is_folder or match.lower().endswith(TAKEN_SUFFIXES)
        if is_taken and not folders.isdisjoint(Path(match).parents):
            continue  # its folder is the input
        if is_folder:
            if ALL_BELOW.search(given):
                continue
            folders.add(Path(match))
        yield from _path_items(match, left_out, columns, skip, may_be_list=False)
    yield from unreadable.values()


def _remote_items(
    given: str, left_out: Counter[str], columns: ParquetColumns | None
) -> Iterator[Item]:
    for name, found, is_named in listed_objects(given):
        lower, address = found.address.lower(), found.address
        inside = name if name != address else os.path.basename(address)
        if lower.endswith((TAR_SUFFIX, *COMPRESSED_TARS)):
            yield from _versioned(tar_items(address, inside, left_out), found)
        elif lower.endswith(PARQUET_SUFFIX) and (columns is not None or is_named):
            if columns is None:
                raise needs_column(address)
            yield from _versioned(parquet_items(address, inside, columns), found)
        elif is_named and lower.endswith(JSON_SUFFIX):
            yield from json_list_items(address)
        elif is_named and lower.endswith(LIST_SUFFIXES):
            yield from text_list_items(address)
        elif is_named or suffix_of(address) in MEDIA_SUFFIXES:
            yield remote_item(name, found)
        else:
            count_left_out(left_out, address)


def _versioned(items: Iterator[Item], found: RemoteObject) -> Iterator[Item]:
    """Add an object's version to the items in the object, so that reading from a replaced object is
    an error."""
    return (replace(item, version=found.version) for item in items)


def _path_items(
    path: str,
    left_out: Counter[str],
    columns: ParquetColumns | None,
    skip: Identity,
    *,
    may_be_list: bool,
) -> Iterator[Item]:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if may_be_list:  # the path was named: probably a typing error, not a lost image
            is_gone = isinstance(error, FileNotFoundError)
            reason = getattr(error, "strerror", error)
            raise ExportError(
                "does not exist" if is_gone else f"cannot be read ({reason})",
                name=path or repr(path),  # show an empty path in quotes
                remedy=missing_remedy(path),
            ) from None
        mode = stat.S_IFREG
    name, source = str(Path(path)), str(Path(path).absolute())
    lower = path.lower()
    if stat.S_ISDIR(mode):
        refused = _listing_error(path, name)
        if refused is None:
            yield from _folder_items(source, left_out, columns, skip)
        elif may_be_list:  # the folder was named: an export must not begin without it
            raise ExportError.of(refused)
        else:
            yield Item.failed(name, source, refused)
    elif not stat.S_ISREG(mode):
        yield Item(name, source)  # reading reports the kind of file without opening it
    elif lower.endswith((TAR_SUFFIX, *COMPRESSED_TARS)):
        yield from tar_items(source, os.path.basename(source), left_out)
    elif lower.endswith(PARQUET_SUFFIX):
        if columns is None:  # one of several inputs, as from a shell's `*`
            unnamed = needs_column(source)  # without options, because the listing stores its text
            remedy = "name that column" if isinstance(unnamed.remedy, Wording) else unnamed.remedy
            refusal = ImageError.of(unnamed, name=name, remedy=remedy, code="format")
            yield Item.failed(name, source, refusal)
            return
        yield from parquet_items(source, os.path.basename(source), columns)
    elif may_be_list and lower.endswith(JSON_SUFFIX):
        yield from json_list_items(source)
    elif may_be_list and lower.endswith(LIST_SUFFIXES):
        yield from text_list_items(source)
    else:
        yield Item(name, source)


def _matches(pattern: str, unreadable: dict[str, Item]) -> Iterator[str]:
    """Yield the paths that `glob` finds, including hidden paths. `**` skips links to parent
    folders.

    `unreadable` collects unreadable folders by path, because `glob` ignores them.
    """
    deep = DEEP.search(pattern)
    if deep is None:
        yield from _plain_matches(pattern, unreadable)
        return
    before, after = pattern[: deep.start()], pattern[deep.end() :]
    for start in _plain_matches(before, unreadable) if before else [""]:
        folders = [(start, frozenset[tuple[int, int] | None]())]
        while folders:
            folder, above = folders.pop()
            identity = _identity(folder or ".")
            if identity in above:
                continue
            if after:
                yield from _matches(glob.escape(folder) + after, unreadable)
            for item, is_folder in _entries(folder or ".", folder):
                if item.error is not None:
                    source = os.path.abspath(folder)
                    unreadable[os.path.normpath(folder)] = replace(item, source=source)
                    continue
                if not after:
                    yield item.id
                if is_folder:
                    folders.append((item.id + "/", above | {identity}))


def _plain_matches(pattern: str, unreadable: dict[str, Item]) -> Iterator[str]:
    """Yield the paths of a pattern without `**`, and collect unreadable folders."""
    above, last = os.path.split(pattern)
    while last or glob.has_magic(above):
        if glob.has_magic(last):  # glob searches the folders above it
            for folder in glob.iglob(above, include_hidden=True) if above else ["."]:
                name = os.path.normpath(folder)
                refused = _listing_error(folder, name) if os.path.isdir(folder) else None
                if refused is not None:
                    unreadable[name] = Item.failed(name, os.path.abspath(folder), refused)
        above, last = os.path.split(above)
    yield from glob.iglob(pattern, include_hidden=True)


def _folder_items(
    folder: str, left_out: Counter[str], columns: ParquetColumns | None, skip: Identity
) -> Iterator[Item]:
    """Yield items depth first, without recursion. The search follows no link to a parent folder,
    and skips the folder `skip`."""
    above = [skip, _identity(folder)]
    if above[0] == above[1]:
        return
    stack = [_entries(folder, "")]
    while stack:
        item, is_folder = next(stack[-1], (None, False))
        if item is None:
            stack.pop()
            above.pop()
        elif item.error is not None:
            yield item
        elif is_folder:
            identity = _identity(item.source)
            if identity not in above:
                above.append(identity)
                stack.append(_entries(item.source, item.id + "/"))
        elif item.id.lower().endswith((TAR_SUFFIX, *COMPRESSED_TARS)):
            yield from tar_items(item.source, item.id, left_out)
        elif columns is not None and item.id.lower().endswith(PARQUET_SUFFIX):
            yield from parquet_items(item.source, item.id, columns)
        elif suffix_of(item.id) in MEDIA_SUFFIXES:
            yield item
        else:
            count_left_out(left_out, item.id)


def _entries(folder: str, below: str) -> Iterator[tuple[Item, bool]]:
    """Return an item for each entry of a folder, and whether the entry is a folder. For an
    unreadable folder, return one failed item."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        name = below.rstrip("/") or "."
        return iter([(Item.failed(name, folder, _cannot_be_listed(name, error)), False)])
    return ((Item(below + entry.name, entry.path), _is_folder(entry)) for entry in entries)


def _listing_error(folder: str, name: str) -> ImageError | None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        return _cannot_be_listed(name, error)
    return None


def _cannot_be_listed(name: str, error: OSError) -> ImageError:
    return ImageError(
        f"cannot be listed ({error.strerror})",
        name=name,
        remedy="check its permissions",
        code="unreadable",
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: reading it fails with the reason
        return False


def _identity(folder: str) -> Identity:
    """Return a value that a folder and every link to it share, or None if `stat` fails."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
