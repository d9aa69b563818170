"""An image of a listing -> its bytes, from its file or from inside its tar."""

import errno
import os
import stat
import time

from qwen_vit.errors import ImageError, display_name
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.load import read_image_file
from qwen_vit.inputs.listing import Item

__all__ = ["read_item"]

# A network disk that has a bad moment; anything else will not be better the next time.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN)
PAUSES_S = (0.1, 1.0)


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
