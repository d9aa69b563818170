"""Access object storage through fsspec: addresses, listings and byte ranges.

`s3://`, `gs://` and `az://` need the extras `s3`, `gs` and `az`. `hf://` needs huggingface_hub.
Tests run against an S3 server with injected faults, and against emulators of GCS and Azure where
these are installed.
"""

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from qwen_vit.common.installation import install_command
from qwen_vit.errors import UnreadableError

__all__ = [
    "BLOCK_BYTES",
    "MAGIC",
    "RemoteObject",
    "ReplacedError",
    "files_of",
    "find_object",
    "has_bucket",
    "is_remote",
    "is_s3",
    "is_store",
    "list_names",
    "list_objects",
    "match_objects",
    "open_object",
    "os_errors",
    "read_range",
    "service_code",
    "storage_errors",
]

REMOTE = re.compile(r"(s3|s3a|gs|gcs|az|abfs|hf)://", re.IGNORECASE)
MAGIC = re.compile(r"[*?[]")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}
S3_SETTINGS = {
    "connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "max_attempts": 5},
}  # fmt: skip
BLOCK_BYTES = 2**22  # read ahead of a streamed file
BUFFER_BYTES = 2**16


NUMBERS: dict[type[OSError], int] = {  # for errors without a number
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}


class ReplacedError(OSError):
    """Report that an object has changed since it was listed."""


class RemoteObject(NamedTuple):
    """Describe one object: its address, its size in bytes, and a version that changes with its
    content, or None if the store gives no version."""

    address: str
    size: int
    version: str | None


def is_remote(path: str) -> bool:
    """Return whether a path is an address in object storage.

    >>> is_remote("s3://bucket/a.jpg"), is_remote("a.jpg"), is_remote("https://host/a.jpg")
    (True, False, False)
    """
    return REMOTE.match(path) is not None


def find_object(address: str) -> RemoteObject | None:
    """Return the object of this address, or None for a folder. Raises OSError if neither exists, or
    if the store reports an error."""
    files, path = files_of(address)
    with os_errors():
        info = _info(files, path)
        return None if info["type"] == "directory" else _object(address, info)


def list_objects(folder: str) -> Iterator[RemoteObject]:
    """Yield the objects below a folder, to every depth, in byte order of their names.

    For S3, the function lists page by page, in constant memory.
    """
    files, path = files_of(folder)
    scheme = folder[: folder.index("://") + 3]
    with os_errors():
        if is_s3(files):
            yield from _list_s3(files, scheme, path.rstrip("/") + "/")
            return
        found = files.find(path, detail=True)
        for name in sorted(found, key=lambda each: each.encode("utf-8", "surrogateescape")):
            yield _object(scheme + name.removeprefix(scheme), found[name])


def list_names(folder: str) -> set[str]:
    """Return the names directly in a folder. A folder's name ends in a slash.

    A missing folder has no names.
    """
    files, path = files_of(folder)
    with os_errors():
        if is_s3(files):
            start = path.rstrip("/") + "/"
            pages = _pages_of_s3(files, start, Delimiter="/")
            found = (
                entry[key]
                for page in pages
                for kind, key in (("Contents", "Key"), ("CommonPrefixes", "Prefix"))
                for entry in page.get(kind, ())
            )
            below = start.partition("/")[2]
            return {name.removeprefix(below) for name in found} - {""}
        try:
            listed = files.ls(path, detail=True)
        except FileNotFoundError:
            return set()
        return {
            info["name"].rstrip("/").rpartition("/")[2] + "/" * (info["type"] == "directory")
            for info in listed
        }


def match_objects(pattern: str) -> Iterator[RemoteObject]:
    """Yield the objects that a pattern with `*`, `?`, `[...]` or `**` matches, in byte order of
    their names."""
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    magic = MAGIC.search(pattern)
    fixed = pattern[: magic.start() if magic else len(pattern)]
    matches = re.compile(glob_translate(pattern)).match
    for found in list_objects(fixed[: fixed.rindex("/")]):
        if matches(found.address):
            yield found


def open_object(
    address: str, block_bytes: int = BLOCK_BYTES, version: str | None = None
) -> BinaryIO:
    """Open an object for reading, in blocks. On S3, a read raises an error if the object was
    replaced.

    Raises ReplacedError if the object has another version, and OSError for other failures.
    """
    files, path = files_of(address)
    with os_errors():
        info = _info(files, path)
        if version is not None and _version(info) != version:
            raise ReplacedError(errno.ESTALE, "replaced after the listing")
        opened = files.open(
            path, "rb", block_size=block_bytes, cache_type="readahead", size=info["size"]
        )
        if is_s3(files):
            _only_version(opened, path, info["size"], _version(info))
    return io.BufferedReader(_ObjectFile(opened), BUFFER_BYTES)


def read_range(address: str, start: int, end: int, version: str | None = None) -> bytes:
    """Return the bytes from `start` to `end`, on S3 with one request.

    Raises ReplacedError if the object has another version, and OSError for other failures.
    """
    if end <= start:
        return b""
    files, path = files_of(address)
    with os_errors():
        if is_s3(files):
            data = _range_of_s3(files, path, start, end, version)
        else:
            data = files.cat_file(path, start=start, end=end)
            if version is not None and _version(files.info(path)) != version:
                raise ReplacedError(errno.ESTALE, "replaced after the listing")
    if len(data) != end - start:
        raise OSError(errno.EIO, f"only {len(data)} of {end - start} requested bytes arrived")
    return data


def storage_errors(error: OSError, doing: str = "read") -> tuple[str, str, str]:
    """Return the fact, the remedy and an image code for an error of this module.

    `doing` is the failed operation: "read" or "written".

    >>> storage_errors(FileNotFoundError())
    ('does not exist', 'check the address', 'missing')
    """
    code = service_code(error)
    if isinstance(error, ReplacedError):
        return "was replaced after the listing", "export it into a new folder", "changed"
    if code == "NoSuchBucket":
        return "its bucket does not exist", "check the address", "missing"
    if isinstance(error, FileNotFoundError):
        return "does not exist", "check the address", "missing"
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"):
        remedy = "renew them, and run the same command again"
        return "the credentials have expired", remedy, "unreadable"
    if isinstance(error, PermissionError):
        reason = f" ({error.strerror})" if error.strerror else ""
        remedy = "check the credentials and the bucket's policy"
        return f"access is denied{reason}", remedy, "unreadable"
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EINVAL:
        return f"is not a valid address ({reason.rstrip('.')})", "check the address", "missing"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and endpoint in reason:
        return f"cannot be {doing} ({reason})", "check AWS_ENDPOINT_URL", "unreadable"
    return f"cannot be {doing} ({reason})", "try again later", "unreadable"


class _ObjectFile(io.RawIOBase):
    """Read an open object. Convert the errors of reads to OSErrors with a number."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with os_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def _list_s3(files: Any, scheme: str, path: str) -> Iterator[RemoteObject]:
    bucket = path.partition("/")[0]
    for page in _pages_of_s3(files, path):
        for entry in page.get("Contents", ()):
            if not entry["Key"].endswith("/"):  # a folder's marker
                address = f"{scheme}{bucket}/{entry['Key']}"
                yield RemoteObject(address, int(entry["Size"]), entry["ETag"])


def _pages_of_s3(files: Any, path: str, **more: str) -> Iterator[Any]:
    bucket, _, prefix = path.partition("/")
    while True:
        page = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        yield page
        if not page.get("IsTruncated"):
            return
        token = page.get("NextContinuationToken")
        if token in (None, more.get("ContinuationToken")):
            raise OSError(errno.EIO, "the store sends no next page of its listing")
        more["ContinuationToken"] = token


def _range_of_s3(files: Any, path: str, start: int, end: int, version: str | None) -> bytes:
    # needs no request, because the size is given
    file = files.open(path, "rb", size=end, cache_type="none")
    _only_version(file, path, end, version)
    data: bytes = file._fetch_range(start, end)
    return data


def _only_version(file: Any, path: str, size: int, version: str | None) -> None:
    """Limit an open S3 object to one version. None allows any version."""
    file.details = {"name": path, "size": size, "ETag": version}
    if version is not None:
        file.read_kw = {**file.read_kw, "IfMatch": version}


def _info(files: Any, path: str) -> Any:
    """Return a store's information about an object.

    S3 explains an error only in the response to a GET.
    """
    try:
        return files.info(path)
    except FileNotFoundError:
        raise
    except OSError:
        if is_s3(files):
            _range_of_s3(files, path, 0, 1, None)
        raise


def has_bucket(address: str) -> bool:
    """Return whether an address names a bucket.

    >>> has_bucket("s3://bucket/a.jpg"), has_bucket("s3://")
    (True, False)
    """
    return bool(address.partition("://")[2].partition("/")[0])


def files_of(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the address in that file system's form."""
    scheme, _, path = address.partition("://")
    if not has_bucket(address):
        raise OSError(errno.EINVAL, "names no bucket")
    files = _filesystem(scheme.lower())
    return files, path if is_s3(files) else files._strip_protocol(address)


@lru_cache
def _filesystem(scheme: str) -> Any:
    try:
        import fsspec  # type: ignore[import-untyped]

        settings = {"config_kwargs": S3_SETTINGS} if scheme in ("s3", "s3a") else {}
        # cached listings would hide another process's writes
        return fsspec.filesystem(scheme, use_listings_cache=False, **settings)
    except ImportError as error:
        command = install_command(EXTRAS[scheme]) if scheme in EXTRAS else "pip install fsspec"
        raise UnreadableError(
            f"{scheme}:// needs a package that is not installed ({error})",
            remedy=f"run {command}",
        ) from None


def is_s3(files: Any) -> bool:
    return is_store(files, "s3")


def is_store(files: Any, scheme: str) -> bool:
    protocol = files.protocol
    return scheme in ((protocol,) if isinstance(protocol, str) else protocol)


def _object(address: str, info: Any) -> RemoteObject:
    return RemoteObject(address, int(info["size"] or 0), _version(info))


def _version(info: Any) -> str | None:
    # GCS has ETags also, but its conditional writes take generations
    for key in ("generation", "ETag", "etag", "blob_id", "md5Hash", "content_md5"):
        if info.get(key):
            return str(info[key])
    return None


@contextmanager
def os_errors() -> Iterator[None]:
    """Convert every error of a store's packages to an OSError."""
    try:
        yield
    except (UnreadableError, ReplacedError):
        raise
    except Exception as error:
        kind = type(error).__name__
        if kind == "FileExpired":  # from s3fs
            raise ReplacedError(errno.ESTALE, "replaced after the listing") from error
        if kind in ("NoCredentialsError", "PartialCredentialsError"):  # from botocore
            raise PermissionError(errno.EACCES, "no credentials were found") from error
        reason = str(error).strip().partition("\n")[0] or kind
        if not isinstance(error, OSError):  # ValueError: from an invalid address
            number = errno.EINVAL if isinstance(error, ValueError) else errno.EIO
            raise OSError(number, reason) from error
        if error.errno is not None:
            raise
        for kind_of, number in NUMBERS.items():
            if isinstance(error, kind_of):
                raise kind_of(number, reason) from error
        raise OSError(errno.EIO, reason) from error


def service_code(error: BaseException | None) -> str:
    """Return the code that S3 gave for an error or one of its causes, or an empty string."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen.add(id(error))  # a retry can make a cycle of errors
        error = error.__cause__
    return ""
