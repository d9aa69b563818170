"""List the images of a tar, each with the offset of its bytes."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from typing import BinaryIO

from qwen_vit.common.storage import is_remote, storage_errors
from qwen_vit.errors import ImageError, display_name
from qwen_vit.inputs.listing import MAX_NAME_BYTES, Item
from qwen_vit.inputs.remote import open_input
from qwen_vit.inputs.suffixes import VIDEO_SUFFIXES, count_left_out, suffix_of

__all__ = [
    "COMPRESSED_TARS", "DEFAULT_SUFFIXES", "IMAGE_SUFFIXES", "MEDIA_SUFFIXES", "TAR_SUFFIX",
    "check_member", "compressed_tar", "tar_items",
]  # fmt: skip

# The suffixes of images that qwen_vit decodes without an option or another package.
DEFAULT_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
)
# The suffixes of images in a folder or a tar. qwen_vit decodes the formats after AVIF only with an
# option, another package or a BMP header (.dib), or not at all. It reports such images and does not
# skip them.
IMAGE_SUFFIXES = (
    *DEFAULT_SUFFIXES,
    *(".dib", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".pbm", ".pgm"),
    *(".pnm", ".ppm", ".tga"),
)
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# first bytes of compressed files
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
TAR_BLOCK = 512
TAR_READ_AHEAD = 2**16  # for a remote tar, whose members are skipped
END_OF_TAR = bytes(TAR_BLOCK)
# Exceptions of tarfile for a damaged tar. A chain of pax headers causes a recursion.
DAMAGED_TAR = (
    tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


def tar_items(path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
    """Yield the images in a tar without reading them. A problem of the tar becomes an item with an
    error.

    A member's id is the tar's `name` and the member's name. The function skips members without an
    image or video extension, and counts them by extension in `left_out`.
    """
    try:
        if name.lower().endswith(COMPRESSED_TARS):
            raise compressed_tar(name)
        with open_input(path, name, "a tar", block_bytes=TAR_READ_AHEAD) as file:
            yield from _members(file, path, name, left_out)
    except ImageError as error:
        yield Item.failed(name, path, error)
    except OSError as error:
        if is_remote(path):
            fact, remedy, code = storage_errors(error)
            yield Item.failed(name, path, ImageError(fact, name=name, remedy=remedy, code=code))
            return
        unreadable = ImageError(
            f"cannot be read ({error.strerror})",
            name=name,
            remedy="check its permissions",
            code="unreadable",
        )
        yield Item.failed(name, path, unreadable)
    except DAMAGED_TAR as error:
        damaged = ImageError(
            f"a damaged tar ({error})", name=name, remedy="download the tar again", code="truncated"
        )
        is_compressed = _begins_with(path, COMPRESSED)
        yield Item.failed(name, path, compressed_tar(name) if is_compressed else damaged)


def compressed_tar(name: str) -> ImageError:
    return ImageError(
        "a compressed tar; members cannot be read by offset",
        name=name,
        remedy="unpack the tar",
        code="format",
    )


def _members(file: BinaryIO, path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
    headers = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            if member.size < 0:  # the next member cannot be found
                raise tarfile.ReadError(f"a member of {member.size} bytes")
            headers.n_bytes = 0
            tar.members.clear()
            if member.isdir():
                continue
            if suffix_of(member.name) not in MEDIA_SUFFIXES:
                count_left_out(left_out, member.name)
                continue
            inside = f"{name}/{member.name}"
            if member.isreg() and not member.issparse():
                header = None if is_remote(path) else _header_hash(headers.last)
                yield Item(inside, path, member.offset_data, member.size, header=header)
            else:
                special = ImageError(
                    "not a plain file in its tar, for example a link",
                    name=inside,
                    remedy="unpack the tar",
                    code="not-a-file",
                )
                yield Item.failed(inside, path, special)
        # tarfile stops at anything except a header, so a tar without an end marker is truncated
        file.seek(tar.offset)
        if file.read(TAR_BLOCK) != END_OF_TAR:
            raise tarfile.ReadError(f"no end marker at byte {tar.offset}")
        if any(map(any, iter(partial(file.read, TAR_BLOCK), b""))):  # such as two joined tars
            raise ImageError(
                "has data after its end marker, which qwen_vit does not read",
                name=name,
                remedy="unpack the tar",
                code="damaged",
            )


class _Headers:
    """Read a tar's headers up to a size limit, because tarfile sets none.

    The header of one member includes its long name and its pax records.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.n_bytes = 0  # of the next member
        self.last = b""  # the block before a member's data, after its long name and pax records
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read

    def read(self, size: int) -> bytes:
        self.n_bytes += size
        if self.n_bytes > MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a header of more than {MAX_NAME_BYTES} bytes")
        self.last = self._read(size)
        return self.last


def check_member(file: BinaryIO, item: Item) -> None:
    """Raise ImageError if an open tar has another member than the listed one at an item's offset.

    The block before a member's data has its name and size. The check leaves the file at the data.
    """
    if item.header is None or item.offset is None:  # a list gives an offset alone
        return
    file.seek(item.offset - TAR_BLOCK)
    if _header_hash(file.read(TAR_BLOCK)) != item.header:
        raise ImageError(
            f"its tar {display_name(item.source)} has changed: the listed member is not at byte "
            f"{item.offset}",
            name=item.id,
            remedy="restore the listed tar",
            code="missing",
        )


def _header_hash(block: bytes) -> str:
    """Return a hash of the name and the size in a tar's header, without times and owners."""
    name = block[:100] + (block[345:500] if block[257:263] == b"ustar\0" else b"")
    return blake2b(name + block[124:136], digest_size=8).hexdigest()


def _begins_with(path: str, starts: tuple[bytes, ...]) -> bool:
    try:
        with open_input(path, path, "a tar", block_bytes=TAR_READ_AHEAD) as file:
            return file.read(max(map(len, starts))).startswith(starts)
    except (OSError, ImageError):
        return False
