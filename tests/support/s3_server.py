"""Run moto's S3 server on loopback, with injected faults and counters of requests and bytes."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec  # type: ignore[import-untyped]
from moto.server import create_backend_app  # type: ignore[attr-defined]
from werkzeug.serving import WSGIRequestHandler, make_server

from qwen_vit.common import storage

BUCKET = "bucket"
ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message>'
    "<Resource>/</Resource><RequestId>1</RequestId></Error>"
)
STATUS = {
    "SlowDown": 503, "ServiceUnavailable": 503, "InternalError": 500, "ExpiredToken": 400,
    "AccessDenied": 403, "InvalidAccessKeyId": 403, "NoSuchBucket": 404, "NoSuchKey": 404,
}  # fmt: skip
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Request:
    """Hold one request that the server answered."""

    method: str
    path: str
    query: str
    range: str
    condition: str = ""  # of a write
    sent: int = 0  # bytes of the body


Fault = Callable[[Request], str | None]


@dataclass
class S3Server:
    """Hold a running server. `fault` names the fault of a request: an error code, "cut" or "slow".
    "cut-put" ends the connection in the middle of a request's body, and "lost" ends the connection
    after the server has executed the request. Listings omit the keys in `hidden`. With
    `ignores_conditions`, the server ignores the conditions of writes, like some real servers.
    """

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Fault = lambda _: None
    page_keys: int = 0  # keys in one page of a listing, or 0 for S3's 1,000
    hidden: Callable[[str], bool] | None = None
    ignores_conditions: bool = False

    def fail(self, code: str, times: int, where: Callable[[Request], bool] = bool) -> None:
        """Inject a fault into the next requests that `where` selects, this number of times."""
        left = [times]

        def fault(request: Request) -> str | None:
            if not where(request) or not left[0]:
                return None
            left[0] -= 1
            return code

        self.fault = fault

    @property
    def sent(self) -> int:
        """Return the bytes of all bodies of objects."""
        return sum(each.sent for each in self.requests if each.method == "GET" and not each.query)

    def put(self, key: str, data: bytes) -> None:
        """Write an object without counting the request."""
        before, self.fault = self.fault, lambda _: None
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.pipe_file(f"{BUCKET}/{key}", data)
        self.fault = before
        self.requests.clear()

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Return the objects below a prefix, by their names without the prefix, without counting
        the request."""
        before, self.fault = (self.fault, self.hidden), lambda _: None
        self.hidden = None
        files = fsspec.filesystem("s3", use_listings_cache=False)
        start = f"{BUCKET}/{prefix}/"
        found = {name.removeprefix(start): files.cat_file(name) for name in files.find(start)}
        self.fault, self.hidden = before
        return found

    def delete(self, prefix: str) -> None:
        """Remove the objects below a prefix."""
        before, self.fault = self.fault, lambda _: None
        files = fsspec.filesystem("s3", use_listings_cache=False)
        for name in files.find(f"{BUCKET}/{prefix}/"):
            files.rm_file(name)
        self.fault = before

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Copy a local folder to a prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())

    def __call__(self, app: Any, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        request = Request(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], query, environ.get("HTTP_RANGE", ""),
            environ.get("HTTP_IF_NONE_MATCH") or environ.get("HTTP_IF_MATCH") or "",
        )  # fmt: skip
        self.requests.append(request)
        fault = self.fault(request)
        if self.page_keys and "list-type=2" in query:
            environ["QUERY_STRING"] = f"{query}&max-keys={self.page_keys}"
        if fault == "cut-put":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            raise _closed(environ)
        if self.ignores_conditions and request.method == "PUT":
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        if fault not in (None, "cut", "slow", "lost"):
            body = ERROR.format(code=fault).encode()
            start(f"{STATUS[str(fault)]} {fault}", [("Content-Length", str(len(body)))])
            return [] if request.method == "HEAD" else [body]
        if fault == "lost":
            b"".join(app(environ, lambda *_: None))
            raise _closed(environ)
        if "list-type=2" in query and self.hidden is not None:
            return [self._without_hidden(app, environ, start)]
        body = b"".join(app(environ, start))
        request.sent = len(body)
        return self._pieces(body, fault)

    def _without_hidden(self, app: Any, environ: dict[str, Any], start: Any) -> bytes:
        """Return a listing without the newest keys, as from a store with stale listings."""
        answer: list[Any] = []
        text = b"".join(app(environ, lambda *parts: answer.extend(parts))).decode()
        for entry in re.findall("<Contents>.*?</Contents>", text, re.DOTALL):
            key = re.search("<Key>(.*?)</Key>", entry)
            if key is not None and self.hidden is not None and self.hidden(key[1]):
                text = text.replace(entry, "")
        headers = [each for each in answer[1] if each[0].lower() != "content-length"]
        start(answer[0], [*headers, ("Content-Length", str(len(text.encode())))])
        return text.encode()

    def _pieces(self, body: bytes, fault: str | None) -> Iterator[bytes]:
        half = len(body) // 2
        yield body[:half]
        if fault == "slow":
            time.sleep(0.3)
        if fault == "cut":
            raise ConnectionResetError("injected")
        yield body[half:]


def _closed(environ: dict[str, Any]) -> ConnectionResetError:
    """Close a connection without an answer."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionResetError("injected")


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server with one empty bucket, which s3fs finds by environment variables."""
    moto, server = create_backend_app("s3"), S3Server()
    application: Any = lambda environ, start: server(moto, environ, start)  # noqa: E731
    listening = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Quiet)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}):
        forget_stores()
        try:
            files = fsspec.filesystem("s3", use_listings_cache=False)
            files.call_s3("create_bucket", Bucket=BUCKET)
            server.requests.clear()
            yield server
        finally:
            listening.shutdown()
            thread.join()
            listening.server_close()
            forget_stores()
            reset_moto()


def forget_stores() -> None:
    """Drop the connections of earlier servers."""
    storage._filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def reset_moto() -> None:
    """Empty moto's buckets, which all servers of a process share."""
    from moto.backends import get_backend

    for account in get_backend("s3").values():
        for region in account.values():
            region.reset()
