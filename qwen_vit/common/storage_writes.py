"""Write objects completely or not at all.

Conditional writes detect that another process has written an object. S3 and Azure support
`If-None-Match: *` for a new object, and `If-Match` for the next version of an object. GCS supports
`ifGenerationMatch` in both cases.
"""

import errno
import io
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from qwen_vit.common.storage import (
    files_of,
    find_object,
    is_s3,
    is_store,
    os_errors,
    service_code,
)

__all__ = ["PART_BYTES", "has_conditions", "put_bytes", "put_file", "remove_object", "written_s"]

PART_BYTES = 2**24  # of a multipart upload; several parts are in memory
# S3 rejects a conditional write that conflicts with another request in progress
RIVAL_PAUSES_S = (0.2, 1.0, 3.0)

AZURE = ("az://", "abfs://")
REFUSED = ("PreconditionFailed", "ConditionalRequestConflict")
UNMET = ("412", "404")  # 404: the object to replace is gone

Value = TypeVar("Value")


def put_file(address: str, path: Path, *, is_new: bool) -> None:
    """Upload a file. The object appears complete or not at all.

    With `is_new`, the function raises FileExistsError if the object exists. A store without
    conditional writes may replace the object instead.
    """
    files, place = files_of(address)
    options: dict[str, Any] = {"mode": "create" if is_new else "overwrite"}  # for s3fs and gcsfs
    if is_s3(files):
        options["chunksize"] = PART_BYTES
    elif address.lower().startswith(AZURE):
        options = {"overwrite": not is_new}
    _with_condition(lambda: files.put_file(str(path), place, **options))


def put_bytes(address: str, data: bytes, *, replaces: str | None = None) -> str | None:
    """Write a new small object, or replace the version `replaces`. Return the object's version.

    Without `replaces`, raises FileExistsError if the object exists. With `replaces`, raises
    FileExistsError if S3, GCS or Azure finds another version, or if GCS or Azure finds no object.
    FileExistsError can also mean that this call itself wrote the object, but that the response was
    lost before a retry.
    """
    files, place = files_of(address)
    _with_condition(lambda: _put(files, place, data, replaces))
    found = find_object(address)
    return None if found is None else found.version


def remove_object(address: str) -> None:
    files, place = files_of(address)
    with os_errors():
        try:
            files.rm_file(place)
        except FileNotFoundError:
            return


def has_conditions(address: str, data: bytes) -> bool:
    """Return whether the store rejects a conditional write of an object that already exists.

    The object must contain `data`. Some servers ignore the condition, and write `data` again.
    """
    files, place = files_of(address)
    try:
        _with_condition(lambda: _put(files, place, data, None))
    except FileExistsError:
        return True
    return False


def written_s(address: str) -> float:
    """Return the time of an object's last write, in seconds since 1970."""
    files, place = files_of(address)
    with os_errors():
        return float(files.modified(place).timestamp())


def _put(files: Any, place: str, data: bytes, replaces: str | None) -> None:
    bucket, _, key = place.partition("/")
    if is_s3(files):
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        files.call_s3("put_object", Bucket=bucket, Key=key, Body=io.BytesIO(data), **condition)
    elif replaces is None:
        files.pipe_file(place, data, mode="create")
    elif is_store(files, "gs"):
        with _unmet_conditions():
            _replace_in_gcs(files, bucket, key, data, replaces)
    elif is_store(files, "az"):
        from azure.core import MatchConditions

        with _unmet_conditions():
            files.pipe_file(
                place, data, etag=replaces, match_condition=MatchConditions.IfNotModified
            )
    else:
        files.pipe_file(place, data, mode="overwrite")


def _replace_in_gcs(files: Any, bucket: str, key: str, data: bytes, generation: str) -> None:
    """Replace a generation of an object, because gcsfs itself supports a condition only for new
    objects."""
    mark = secrets.token_hex(16)
    facts = json.dumps({"name": key})
    head = f"--{mark}\r\nContent-Type: application/json\r\n\r\n{facts}\r\n"
    head += f"--{mark}\r\nContent-Type: application/octet-stream\r\n\r\n"
    files.call(
        "POST", f"{files._location}/upload/storage/v1/b/{quote(bucket)}/o",
        uploadType="multipart", ifGenerationMatch=generation,
        headers={"Content-Type": f'multipart/related; boundary="{mark}"'},
        data=head.encode() + data + f"\r\n--{mark}--".encode(),
    )  # fmt: skip


@contextmanager
def _unmet_conditions() -> Iterator[None]:
    """Raise FileExistsError if GCS or Azure responds that a write's condition failed."""
    try:
        yield
    except Exception as error:
        status = getattr(error, "code", None) or getattr(error, "status_code", None)
        if str(status) in UNMET:
            raise FileExistsError(errno.EEXIST, "another process wrote it") from error
        raise


def _with_condition(put: Callable[[], Value]) -> Value:
    """Run a conditional write. If the condition fails, raise FileExistsError.

    After a conflict with a request in progress, the function tries at most three more times.
    """
    pauses_s = iter(RIVAL_PAUSES_S)
    while True:
        try:
            with os_errors():
                return put()
        except OSError as error:
            code = service_code(error)
            pause_s = next(pauses_s, None) if code == "ConditionalRequestConflict" else None
            if pause_s is None and (code in REFUSED or isinstance(error, FileExistsError)):
                raise FileExistsError(errno.EEXIST, "another process wrote it") from error
            if pause_s is None:
                raise
        time.sleep(pause_s)
