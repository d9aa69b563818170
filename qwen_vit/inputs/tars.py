"""A tar -> the images in it, each with the place of its bytes."""

import os
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from qwen_vit.errors import display_name
from qwen_vit.inputs.listing import Item

__all__ = ["COMPRESSED_TARS", "IMAGE_SUFFIXES", "TAR_SUFFIX", "suffix_of", "tar_items"]

# What is taken from a folder or a tar, by its name. Those after AVIF cannot be decoded
# here: they are listed all the same, so that such images are reported, not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".pnm", ".tga"),
)
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # files begin so
TAR_BLOCK = 512
END_OF_TAR = bytes(TAR_BLOCK)
DAMAGED_TAR = (tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError)  # its own, too


def tar_items(path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
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


def _members(file: BinaryIO, path: str, name: str, left_out: Counter[str]) -> Iterator[Item]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it would keep every one
            if member.isdir():
                continue
            if suffix_of(member.name) not in IMAGE_SUFFIXES:
                left_out[suffix_of(member.name)] += 1
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


def _begins_with(path: str, starts: tuple[bytes, ...]) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)
    except OSError:
        return False


class _GoesOnError(Exception):
    """A tar's end mark is not the end of its file."""


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()
