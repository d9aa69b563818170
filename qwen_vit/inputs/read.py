"""Read the bytes of a listed image from its file, tar, Parquet file or address."""

import errno
import os
import stat
import time

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import ImageError, display_name
from qwen_vit.images.image import ImageLimits, check_file_bytes
from qwen_vit.images.load import read_image_file
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet_rows import read_row
from qwen_vit.inputs.remote import read_object
from qwen_vit.inputs.tars import check_member
from qwen_vit.inputs.urls import is_https, read_url

__all__ = ["read_item"]

# Transient I/O errors, for example of a network disk. Other errors would happen again.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN)
PAUSES_S = (0.1, 1.0)


def read_item(item: Item, limits: ImageLimits) -> bytes:
    """Return an image's bytes. Try again up to twice after an I/O error in TRANSIENT, but not after
    the code "slow".

    >>> rocket = Item("rocket", "tests/photographs/rocket.jpg")
    >>> read_item(rocket, ImageLimits())[:3]
    b'\\xff\\xd8\\xff'
    """
    if item.error is not None:
        code, message = item.error
        raise ImageError(message, code=code)
    for pause_s in PAUSES_S:
        try:
            return _read(item, limits)
        except ImageError as error:
            cause = error.__context__
            if error.code == "missing" and item.source != item.id and item.is_file:
                fact = f"{display_name(item.source)} {error.fact}"
                raise ImageError(fact, name=item.id, remedy=error.remedy, code=error.code) from None
            is_transient = isinstance(cause, OSError) and cause.errno in TRANSIENT
            if not is_transient or error.code == "slow":  # it has had its time
                raise
        time.sleep(pause_s)
    return _read(item, limits)


def _read(item: Item, limits: ImageLimits) -> bytes:
    if item.row is not None:
        data = read_row(item)
        check_file_bytes(len(data), item.id, limits)
        return data
    if is_remote(item.source):
        return read_object(item, limits)
    if limits.allow_urls and is_https(item.source):
        return read_url(item.source, item.id, limits)
    if item.offset is None or item.size is None:
        return read_image_file(item.source, item.id, limits)
    return _read_member(item, item.offset, item.size, limits)


def _read_member(item: Item, offset: int, size: int, limits: ImageLimits) -> bytes:
    check_file_bytes(size, item.id, limits)
    tar = f"its tar {display_name(item.source)}"
    try:
        if not stat.S_ISREG(os.stat(item.source).st_mode):
            raise ImageError(
                f"{tar} is no longer a regular file",
                name=item.id,
                remedy="restore the tar",
                code="not-a-file",
            )
        with open(item.source, "rb") as file:
            check_member(file, item)
            file.seek(offset)
            data = file.read(size)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(
            f"{tar} does not exist", name=item.id, remedy="restore the file", code="missing"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ImageError(
            f"{tar} cannot be read ({reason})",
            name=item.id,
            remedy="check its permissions",
            code="unreadable",
        ) from None
    if len(data) < size:
        raise ImageError(
            f"{tar} ends after {len(data)} of the image's {size} bytes",
            name=item.id,
            remedy="download the tar again",
            code="truncated",
        )
    return data
