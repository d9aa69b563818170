"""Inputs -> the images to export: in one order, each with an id and a place to read it from.

Files, folders, patterns, lists of paths and tars become a listing, one JSON object a line, which an
export freezes in its folder: `{"id": ..., "source": ...}`, for an image inside a tar with `offset`
and `size` in bytes, so that it can be read again without searching for it.
"""

import codecs
import errno
import glob
import hashlib
import json
import os
import re
import stat
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeGuard

from qwen_vit.common.atomic_file import atomic_file
from qwen_vit.common.strict_json import is_integer, parse_json, short_repr
from qwen_vit.errors import IMAGE_CODES, CheckpointError, ExportError, ImageError, display_name
from qwen_vit.images.image import ADDRESS, ImageLimits
from qwen_vit.images.load import read_image_file

__all__ = ["Item", "Listing", "check_inputs", "find_items", "read_item", "read_listing"]

# What is taken from a folder or a tar, by its name. Those after AVIF cannot be decoded
# here: they are listed all the same, so that such images are reported, not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".pnm", ".tga"),
)
LIST_SUFFIXES = (".txt", ".lst")
JSON_SUFFIX = ".jsonl"
NO_IMAGES = {".csv", ".json", ".parquet", ".pdf", ".tsv", ".xml", ".yaml", ".yml", ".zip"}
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # files begin so
TAKEN_SUFFIXES = (*IMAGE_SUFFIXES, TAR_SUFFIX, *COMPRESSED_TARS)  # from a folder
TAR_BLOCK = 512
MAX_FILE = 2**63 - 1  # bytes
DEEP = re.compile(r"(?:^|(?<=/))\*\*(?:/+|$)")  # in a pattern: any number of folders
ALL_BELOW = re.compile(r"(?:^|/)\*\*(?:/+\*{1,2})*/*$")  # what is in a match is one by itself
END_OF_TAR = bytes(TAR_BLOCK)
DAMAGED_TAR = (tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError)  # its own, too

# A network disk that has a bad moment; anything else will not be better the next time.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN)
PAUSES_S = (0.1, 1.0)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a listing: its id, and the file that holds it.

    `source` is an absolute path; inside a tar, the image's bytes are `size` from `offset` on.
    `error` is the (code, message) of what was found wrong while listing.
    """

    id: str
    source: str
    offset: int | None = None
    size: int | None = None
    error: tuple[str, str] | None = None

    def to_json(self) -> str:
        """One line; names that are no Unicode keep their bytes as escaped surrogates."""
        facts: dict[str, Any] = {"id": self.id, "source": self.source}
        if self.offset is not None:
            facts |= {"offset": self.offset, "size": self.size}
        if self.error is not None:
            facts["error"] = self.error
        return json.dumps(facts)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        error = facts.get("error")
        return cls(
            facts["id"],
            facts["source"],
            facts.get("offset"),
            facts.get("size"),
            None if error is None else (error[0], error[1]),
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """A frozen listing: its file, how many images it names, and where each shard's lines begin."""

    path: Path
    n_images: int
    sha256: str
    shard_size: int
    starts: tuple[int, ...]  # bytes

    @classmethod
    def freeze(cls, path: Path, items: Iterable[Item], shard_size: int) -> Self:
        """Write the file whole or not at all. Raises ExportError where two images share an id."""
        digest, starts, position, count = hashlib.sha256(), [], 0, 0
        ids: set[str] = set()
        with atomic_file(path) as file:
            for count, item in enumerate(_without_os_errors(items), start=1):
                if item.id in ids:
                    where = "the second is" if item.offset is None else "the second is in"
                    raise ExportError(
                        f"two images would have the id {display_name(item.id)}, {where} "
                        f"{display_name(item.source)}; give each once, export the folder that "
                        "holds both, "
                        'or give a .jsonl list with an "id" for each'
                    )
                ids.add(item.id)
                if (count - 1) % shard_size == 0:
                    starts.append(position)
                line = item.to_json().encode() + b"\n"
                digest.update(line)
                position += file.write(line)
        return cls(path, count, digest.hexdigest(), shard_size, tuple(starts))

    def shard(self, index: int) -> list[Item]:
        """The images of one shard."""
        with self._opened() as file:
            file.seek(self.starts[index])
            lines = islice(file, self.shard_length(index))
            return [Item.from_json(json.loads(line)) for line in lines]

    def shard_length(self, index: int) -> int:
        """How many images a shard has: the last one may have fewer."""
        return min(self.shard_size, self.n_images - index * self.shard_size)

    def spread(self, count: int) -> list[Item]:
        """At most `count` images, evenly spread over the listing."""
        step = max(1, -(-self.n_images // count))
        with self._opened() as file:
            lines = islice(file, 0, None, step)
            return [Item.from_json(json.loads(line)) for line in lines]

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb") as file:
                yield file
        except OSError as error:
            raise ExportError(
                f"{self.path} cannot be read any more ({error.strerror}); whole shards are kept: "
                "run the same command again"
            ) from None


def read_listing(path: Path) -> Iterator[Item]:
    """The images of a frozen listing, in order."""
    with open(path, "rb") as file:
        for line in file:
            yield Item.from_json(json.loads(line))


def find_items(inputs: Sequence[str], left_out: Counter[str] | None = None) -> Iterator[Item]:
    """The images of files, folders, patterns, lists and tars, in the order given.

    >>> [item.id for item in find_items(["tests/images/*.png", "tests/images/rocket.jpg"])]
    ['tests/images/astronaut.png', 'tests/images/chelsea.png', 'tests/images/rocket.jpg']

    A file's id is the path as it was given; in a folder, the path below it; in a tar, the tar's
    name and the member's; in a list (.txt: a path a line; .jsonl: objects with "path" or "source",
    and "id"), what it says, with paths counted from the list's folder. Folders are searched to
    every depth, through links, in the order of their names' bytes; what has no image's suffix there
    is left out, and counted by suffix in `left_out`. Neither folders nor `**` in a pattern go
    through a link that leads back to where it lies.

    Raises ExportError for an input that is not there, an address, and a list that cannot be read.
    What is found broken below, such as a folder that may not be read, becomes an item with `error`.
    """
    left_out = Counter() if left_out is None else left_out
    _check_alone(inputs)
    reported: set[str] = set()  # folders that cannot be listed: several patterns may meet one
    for given in inputs:
        for item in _from_input(given, left_out):
            if item.error is not None and item.error[0] == "unreadable":
                if item.source in reported:
                    continue
                reported.add(item.source)
            yield item


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise ExportError for an input that is not there; looks no farther than its first image."""
    _check_alone(inputs)
    for given in inputs:
        next(_from_input(given, Counter()), None)


def _check_alone(inputs: Sequence[str]) -> None:
    """A list of a kind that is not read here; among others, it may be what a shell's `*` gave."""
    if len(inputs) == 1 and _suffix(inputs[0]) in NO_IMAGES and os.path.isfile(inputs[0]):
        raise ExportError(
            f"{display_name(inputs[0])} is no image, expected images, folders, tars or lists; a "
            "list is "
            '.txt with a path a line, or .jsonl with an "id" and a "path" a line'
        )


def _from_input(given: str, left_out: Counter[str]) -> Iterator[Item]:
    if ADDRESS.match(given):
        raise ExportError(f"{display_name(given)} is an address; download what is there first")
    if os.path.lexists(given) or not glob.has_magic(given):
        yield from _from_path(given, left_out, may_be_list=True)
        return
    unreadable: dict[str, Item] = {}
    matches = sorted(set(_matches(given, unreadable)), key=os.fsencode)
    if not matches and not unreadable:
        raise ExportError(f"no file matches {display_name(given)}; check the pattern")
    folders: set[Path] = set()
    for match in matches:
        is_folder = os.path.isdir(match)
        is_taken = is_folder or match.lower().endswith(TAKEN_SUFFIXES)
        if is_taken and not folders.isdisjoint(Path(match).parents):
            continue  # it came with the folder that it is in
        if is_folder:
            if ALL_BELOW.search(given):
                continue
            folders.add(Path(match))
        yield from _from_path(match, left_out, may_be_list=False)
    yield from unreadable.values()


def _from_path(path: str, left_out: Counter[str], *, may_be_list: bool) -> Iterator[Item]:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if may_be_list:  # it was given by name: a slip of the fingers, rather than a lost image
            reason = getattr(error, "strerror", error)
            raise ExportError(
                f"{display_name(path)} cannot be exported ({reason}); check the path"
            ) from None
        mode = stat.S_IFREG
    name, source = str(Path(path)), str(Path(path).absolute())
    lower = path.lower()
    if stat.S_ISDIR(mode):
        refused = _unlistable(path, name)
        if refused is None:
            yield from _from_folder(source, left_out)
        elif may_be_list:  # given by name: no export begins with nothing in place of it
            raise ExportError(refused)
        else:
            yield Item(name, source, error=("unreadable", refused))
    elif not stat.S_ISREG(mode):
        yield Item(name, source)  # reading it says what it is, without opening it
    elif lower.endswith((TAR_SUFFIX, *COMPRESSED_TARS)):
        yield from _from_tar(source, os.path.basename(source), left_out)
    elif may_be_list and lower.endswith(JSON_SUFFIX):
        yield from _from_json_list(source)
    elif may_be_list and lower.endswith(LIST_SUFFIXES):
        yield from _from_text_list(source)
    else:
        yield Item(name, source)


# Patterns


def _matches(pattern: str, unreadable: dict[str, Item]) -> Iterator[str]:
    """As `glob` finds them, hidden ones too; but `**` enters no folder that leads back to itself.

    Folders that cannot be listed, over which `glob` passes, are put into `unreadable`, by their
    paths.
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
    """Those of a pattern without `**`."""
    above, last = os.path.split(pattern)
    while last or glob.has_magic(above):
        if glob.has_magic(last):  # the folders above it are looked through
            for folder in glob.iglob(above, include_hidden=True) if above else ["."]:
                name = os.path.normpath(folder)
                refused = _unlistable(folder, name) if os.path.isdir(folder) else None
                if refused is not None:
                    source = os.path.abspath(folder)
                    unreadable[name] = Item(name, source, error=("unreadable", refused))
        above, last = os.path.split(above)
    yield from glob.iglob(pattern, include_hidden=True)


# Folders


def _from_folder(folder: str, left_out: Counter[str]) -> Iterator[Item]:
    """Depth first, without recursion; a folder that a link leads back into is not entered again."""
    above = [_identity(folder)]
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
            yield from _from_tar(item.source, item.id, left_out)
        elif _suffix(item.id) in IMAGE_SUFFIXES:
            yield item
        else:
            left_out[_suffix(item.id)] += 1


def _entries(folder: str, below: str) -> Iterator[tuple[Item, bool]]:
    """What a folder holds, and which of it are folders; asks the disk about links alone."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        name = below.rstrip("/") or "."
        refused = _cannot_be_listed(name, error)
        return iter([(Item(name, folder, error=("unreadable", refused)), False)])
    return ((Item(below + entry.name, entry.path), _is_folder(entry)) for entry in entries)


def _unlistable(folder: str, name: str) -> str | None:
    """What is told of a folder whose names cannot be read; None of any other."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        return _cannot_be_listed(name, error)
    return None


def _cannot_be_listed(name: str, error: OSError) -> str:
    return f"{display_name(name)} cannot be listed: {error.strerror}; check its permissions"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say: reading it will tell
        return False


def _identity(folder: str) -> tuple[int, int] | None:
    """What is the same for a folder and every link to it."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# Tars


class _GoesOnError(Exception):
    """A tar's end mark is not the end of its file."""


def _from_tar(path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
    """The images in a tar, without reading them; what is wrong with it is an item of its own."""

    def broken(code: str, text: str) -> Item:
        return Item(name, path, error=(code, f"{display_name(name)} {text}"))

    text = "is a compressed tar, in which no image can be found again; unpack it"
    compressed = broken("format", text)
    if name.lower().endswith(COMPRESSED_TARS):
        yield compressed
        return
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would block
            yield broken("not-a-file", "is no regular file, expected a tar; copy its content")
            return
        with open(path, "rb") as file:
            yield from _members(file, path, name, left_out)
    except OSError as error:
        yield broken("unreadable", f"cannot be read: {error.strerror}; check its permissions")
    except _GoesOnError:
        yield broken("damaged", "goes on after its end, where nothing is exported; unpack it")
    except DAMAGED_TAR as error:
        if _begins_with(path, COMPRESSED):
            yield compressed
            return
        yield broken("truncated", f"is a damaged tar ({error}); fetch it again")


def _begins_with(path: str, starts: tuple[bytes, ...]) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)
    except OSError:
        return False


def _members(file: BinaryIO, path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it would keep every one
            if member.isdir():
                continue
            if _suffix(member.name) not in IMAGE_SUFFIXES:
                left_out[_suffix(member.name)] += 1
                continue
            inside = f"{name}/{member.name}"
            if member.isreg() and not member.issparse():
                yield Item(inside, path, member.offset_data, member.size)
            else:
                message = (
                    f"{display_name(inside)} is no plain file in its tar, such as a link; unpack it"
                )
                yield Item(inside, path, error=("not-a-file", message))
        # tarfile takes anything that is no header for the end: without an end mark, it is cut
        file.seek(tar.offset)
        if file.read(TAR_BLOCK) != END_OF_TAR:
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
        if any(map(any, iter(partial(file.read, TAR_BLOCK), b""))):  # two that were joined, say
            raise _GoesOnError


# Lists


def _from_text_list(path: str) -> Iterator[Item]:
    for _, line in _lines(path):
        yield _listed(path, os.fsdecode(line), os.fsdecode(line))


def _from_json_list(path: str) -> Iterator[Item]:
    for number, line in _lines(path):
        where = f"{display_name(path)}, line {number}"
        try:
            facts = parse_json(line, source=where)
        except CheckpointError as error:
            raise ExportError(f"{str(error).rpartition(';')[0]}; correct that line") from None
        source = facts.get("path", facts.get("source"))
        name = facts.get("id", source)
        if not (_is_name(source) and _is_name(name)):
            raise ExportError(
                f"{where}: id is {short_repr(facts.get('id'))} and path {short_repr(source)}, "
                "expected text in "
                'quotes, as in {"id": "cat", "path": "images/cat.jpg"}; correct that line'
            )
        offset, size = facts.get("offset"), facts.get("size")
        if offset is not None and not (
            is_integer(offset)
            and is_integer(size)
            and min(offset, size) >= 0
            and offset + size <= MAX_FILE
        ):
            raise ExportError(
                f"{where}: offset is {short_repr(offset)} and size {short_repr(size)}, expected "
                "bytes in a tar; correct that line"
            )
        yield _listed(path, name, source, offset, size, _failure(facts.get("error")))


def _is_name(value: object) -> TypeGuard[str]:
    """Whether this is some text, or the bytes of a file name that Python holds as text."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, numbered from 1; a byte order mark in front is no part."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ExportError(
                            f"{display_name(path)} is UTF-16, expected UTF-8; save it so"
                        )
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except OSError as error:
        raise ExportError(
            f"{display_name(path)} cannot be read ({error.strerror}); check its permissions"
        ) from None


def _listed(
    path: str,
    name: str,
    source: str,
    offset: int | None = None,
    size: int | None = None,
    error: tuple[str, str] | None = None,
) -> Item:
    if not ADDRESS.match(source):  # which is reported when it is read
        source = str(Path(path).parent / source)
    return Item(name, source, offset, size, error)


def _failure(error: object) -> tuple[str, str] | None:
    """What an export's own listing says of an image; anything else there is somebody else's."""
    if not isinstance(error, list) or len(error) != 2:
        return None
    code, message = error
    is_ours = isinstance(code, str) and code in IMAGE_CODES and isinstance(message, str)
    return (code, message) if is_ours else None


def _without_os_errors(items: Iterable[Item]) -> Iterator[Item]:
    """An OSError of the inputs must not pass for one of the file that is being written."""
    try:
        yield from items
    except OSError as error:
        raise ExportError(
            f"{display_name(str(error.filename))} cannot be listed ({error.strerror}); check its "
            "disk"
        ) from None


# Reading


def read_item(item: Item, limits: ImageLimits) -> bytes:
    """An image's bytes; a disk that has a bad moment is asked again, twice.

    Raises ImageError, which names the id, for what cannot be read.
    """
    if item.error is not None:
        code, message = item.error
        raise ImageError(message, code=code)
    for pause_s in PAUSES_S:
        try:
            return _read(item, limits)
        except ImageError as error:
            cause = error.__context__
            if error.code == "missing" and item.source != item.id and item.offset is None:
                name = display_name(item.id)
                where = f"{name}: {display_name(item.source)} does not exist; check the path"
                raise ImageError(where, code=error.code) from None
            if not isinstance(cause, OSError) or cause.errno not in TRANSIENT:
                raise
        time.sleep(pause_s)
    return _read(item, limits)


def _read(item: Item, limits: ImageLimits) -> bytes:
    if item.offset is None or item.size is None:
        return read_image_file(item.source, item.id, limits)
    return _read_member(item, item.offset, item.size, limits)


def _read_member(item: Item, offset: int, size: int, limits: ImageLimits) -> bytes:
    name = display_name(item.id)
    if size > limits.max_file_bytes:
        raise ImageError(
            f"{name} has {size} bytes, at most {limits.max_file_bytes} are read; make it smaller",
            code="file-too-large",
        )
    tar = display_name(item.source)
    try:
        if not stat.S_ISREG(os.stat(item.source).st_mode):
            raise ImageError(f"{tar}, which held {name}, is no regular file", code="not-a-file")
        with open(item.source, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError:
        raise ImageError(
            f"{tar}, which held {name}, does not exist; put it back", code="missing"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ImageError(
            f"{tar}, which holds {name}, cannot be read: {reason}; check its permissions",
            code="unreadable",
        ) from None
    if len(data) < size:
        raise ImageError(
            f"{name} is cut: its tar ends after {len(data)} of {size} bytes; fetch the tar again",
            code="truncated",
        )
    return data
