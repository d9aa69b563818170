"""Cache ranges of objects in a folder on this machine. Reading a cached range sends no request.

A range's file name is a hash of the address, the object's version and the range. A replaced object
has another version, so the cache never gives the bytes of the earlier object.
"""

import logging
import os
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from qwen_vit.common.arguments import check_local_path
from qwen_vit.common.atomic_file import atomic_file
from qwen_vit.common.storage import read_range
from qwen_vit.errors import ExportError

__all__ = ["CACHE_VARIABLE", "cache_folder", "read_cached"]

logger = logging.getLogger("qwen_vit")

CACHE_VARIABLE = "QWEN_VIT_STORE_CACHE"  # names the folder for a process and its children


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the cache, by default the folder that CACHE_VARIABLE names, or None.

    >>> cache_folder("cache")
    PosixPath('cache')
    """
    named = os.environ.get(CACHE_VARIABLE) if folder is None else folder
    return check_local_path("cache_dir", named, "a folder") if named else None


def read_cached(
    address: str, start: int, end: int, version: str | None, folder: Path | None
) -> bytes:
    """Return a range from `folder`, or read it like `read_range` and store it in `folder`.

    Without a folder or a version, the function stores nothing. If the function cannot store the
    range, it logs a warning, unless the previous warning was the same.
    """
    if folder is None or version is None or end <= start:
        return read_range(address, start, end, version)
    key = f"{address}\0{version}\0{start}-{end}".encode("utf-8", "surrogateescape")
    digest = sha256(key).hexdigest()
    path = folder / digest[:2] / digest[2:]
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if len(data) != end - start:
        data = read_range(address, start, end, version)
        _keep(data, path, folder)
    return data


def _keep(data: bytes, path: Path, folder: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(data)
    except (OSError, ExportError) as error:
        _warn(folder, error.fact if isinstance(error, ExportError) else error.strerror)


@lru_cache(1)
def _warn(folder: Path, reason: str | None) -> None:
    """Log a warning, unless the previous warning was the same."""
    is_variable = os.environ.get(CACHE_VARIABLE) == str(folder)
    check = CACHE_VARIABLE if is_variable else "the folder and its disk"
    logger.warning("the cache %s could not store bytes: %s; check %s", folder, reason, check)
