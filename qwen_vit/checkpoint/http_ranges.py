"""Read JSON and ranges of files over HTTP with the Hub's client, and reject inexact responses.

The HTTP clients of huggingface_hub 1 and 2 differ, so this module uses only shared names. It
imports the client inside functions, because the import reads environment variables.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qwen_vit.checkpoint.ranges import RangeResponse, RangesRefusedError, TransferError
from qwen_vit.common.strict_json import MAX_JSON_BYTES
from qwen_vit.errors import HubError

__all__ = ["fetch_json", "open_http_range"]

CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
SECONDS_LEFT = re.compile(r";\s*t=(\d+)")
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
NO_RANGES = (405, 416, 501)


@contextmanager
def open_http_range(
    url: str, start: int, end: int, token: str | bool | None, version: str | None = None
) -> Iterator[RangeResponse]:
    """Request bytes `start` to `end` of a file, as `ranges.Opener` defines.

    With the `version` of an earlier response, the function rejects a response of another version.

    Raises RangesRefusedError if the server does not send exactly the requested range. Raises
    TransferError for a broken connection, and for a status that a retry may change. Raises HubError
    if the server has another version, and the client's own error for other statuses.
    """
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=token, library_name="qwen_vit")
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    if version is not None and not version.startswith("W/"):
        headers["If-Range"] = version
    try:
        # The client follows redirects and sends the token to no other host.
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if "If-Range" in headers and response.status_code == 200:
                raise _changed(url)
            file_bytes = _check_range(response, start, end)
            found = response.headers.get("ETag")
            if version is not None and found != version:
                raise _changed(url)
            yield RangeResponse(response.iter_raw(), file_bytes, found)
    except HTTPError as error:
        if getattr(error, "response", None) is not None:
            raise  # a retry would not change this answer: _check_range has raised for the others
        raise TransferError(f"{type(error).__name__}: {error}") from error


def fetch_json(url: str, token: str | bool | None, *, deadline_s: float) -> Any:
    """Return a JSON document of at most MAX_JSON_BYTES that arrives before the deadline."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=token, library_name="qwen_vit")
    headers |= {"Accept-Encoding": "identity"}
    body, end = bytearray(), time.monotonic() + deadline_s
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=deadline_s
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_JSON_BYTES or time.monotonic() > end:
                raise HubError(
                    f"{len(body)} bytes of JSON arrived within {deadline_s:g} s",
                    name=url,
                    expected=f"a whole document of at most {MAX_JSON_BYTES} bytes",
                )
    return json.loads(body)


def _changed(url: str) -> HubError:
    return HubError(
        "changed on the server during the download",
        name=url,
        expected="one version of the file",
        remedy="try again, or download whole files (qwen-vit download MODEL --full)",
    )


def _check_range(response: Any, start: int, end: int) -> int:
    """Return the size of the whole file. Raise an error unless the headers announce exactly the
    requested bytes, cut off at the end of the file."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    status, headers = response.status_code, response.headers
    if status in NO_RANGES:
        raise RangesRefusedError(f"HTTP {status}")
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        if status in TRY_AGAIN:
            left = SECONDS_LEFT.search(headers.get("RateLimit", ""))
            wait_s = left[1] if left and status == 429 else headers.get("Retry-After", "")
            wait = float(wait_s) + 1 if wait_s.isdigit() else None
            raise TransferError(f"HTTP {status}", wait_s=wait, cause=error) from error
        raise
    if status != 206:
        size = headers.get("Content-Length", "unknown")
        raise RangesRefusedError(
            f"the server ignores ranges and sends the whole file ({size} bytes)"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise RangesRefusedError(f"the server encodes ranges as {headers['Content-Encoding']}")
    found = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        raise RangesRefusedError("the server does not state which range it sends")
    first, last, file_bytes = map(int, found.groups())
    if (first, last) != (start, min(end, file_bytes) - 1):
        raise RangesRefusedError(
            f"the server sends bytes {first} to {last} instead of {start} to {end - 1}"
        )
    return file_bytes
