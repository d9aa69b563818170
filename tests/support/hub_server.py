"""Run a fake Hugging Face Hub on the loopback interface, with faults on demand. The real client
talks to a real HTTP server: resolve (HEAD, GET, ranges), the model API, and a second server on
another port for redirects of large files, as on the Hub. The server records requests and answers.
One class describes every fault.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?")
LARGE = ".safetensors"  # LFS files: the etag is the sha256, and the CDN serves the content
CHUNK = 65_536


@dataclass
class Fault:
    """Describe a fault of requests for `file` (a pattern over "org/repo/file", or "api").

    The fault begins after `skip` such requests, and ends after `times` more (None: never). `method`
    selects the requests of one method. `ranges` selects the requests with a range (True) or without
    one (False). The fault has any of these effects:

    status, code, headers       answer with this HTTP status, X-Error-Code and headers
    cut                         close the connection after this share of the body
    drip                        wait this number of seconds before each 64 KiB
    flip                        change one bit of this byte of the file
    ignore_range                answer a request for a range with the complete file and status 200
    wrong_total                 add this number to the declared size of the file
    shift                       move the sent range by this number of bytes, and declare that range
    encoding                    declare this encoding of the body
    then                        call this function with the Hub before the answer
    """

    file: str = "*"
    skip: int = 0
    times: int | None = None
    method: str | None = None
    ranges: bool | None = None
    status: int | None = None
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: float | None = None
    drip: float = 0.0
    flip: int | None = None
    ignore_range: bool = False
    wrong_total: int = 0
    shift: int = 0
    encoding: str = ""
    then: "Callable[[Hub], None] | None" = None


@dataclass(frozen=True)
class Request:
    """Hold one request and its answer. `sent` counts the body's bytes. `cdn` is the second
    server."""

    method: str
    file: str
    revision: str
    range: tuple[int, int] | None
    status: int
    sent: int
    cdn: bool
    authorization: str | None


@dataclass
class Hub:
    """Hold the servers' files, faults and requests. Tests change the files and faults, and read the
    requests.

    `branches` maps "org/repo@main" to a commit; `commits` maps "org/repo@COMMIT" to a folder.
    """

    commits: dict[str, Path]
    branches: dict[str, str]
    faults: list[Fault] = field(default_factory=list)
    token: str | None = None  # every repository requires this token
    redirects: bool = False  # whether the second server serves large files
    licence: str = "apache-2.0"
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def folder(self, repo: str, revision: str) -> tuple[Path, str] | None:
        commit = self.branches.get(f"{repo}@{revision}", revision)
        folder = self.commits.get(f"{repo}@{commit}")
        return None if folder is None else (folder, commit)

    def has(self, repo: str) -> bool:
        return any(name.startswith(f"{repo}@") for name in self.commits)

    def fault(self, file: str, method: str, is_range: bool) -> Fault:
        """Return the first fault for this request, or a fault without effect."""
        with self.lock:
            for fault in self.faults:
                if (
                    not fnmatch(file, fault.file)
                    or fault.method not in (None, method)
                    or fault.ranges not in (None, is_range)
                ):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times is None or fault.times > 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault()

    def fetched(self) -> list[str]:
        """Return the sorted files whose bytes the server sent, each once."""
        return sorted({r.file for r in self.requests if r.method == "GET" and r.sent and r.file})

    def sent_bytes(self) -> int:
        """Return the bytes of all bodies."""
        return sum(request.sent for request in self.requests)


@lru_cache(maxsize=1024)
def _digests(path: Path, size: int, mtime: int) -> tuple[str, str]:
    content = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest(), git


def etag_of(path: Path) -> str:
    """Return the Hub's digest of a file: the sha256 of a large file, and git's sha1 of a small
    file."""
    status = path.stat()
    sha256, git = _digests(path, status.st_size, status.st_mtime_ns)
    return sha256 if path.name.endswith(LARGE) else git


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    is_cdn: ClassVar[bool]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.file, self.revision, self.sent, self.code = "", "", 0, 0
        self.range = self._requested_range()
        try:
            self._route(self.path.partition("?")[0])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed, or closed the connection
        finally:
            request = Request(
                self.command, self.file, self.revision, self.range, self.code, self.sent,
                self.is_cdn, self.headers.get("Authorization"),
            )  # fmt: skip
            with self.hub.lock:
                self.hub.requests.append(request)

    def _requested_range(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found:
            return int(found[1]), int(found[2]) + 1
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return (int(found[1]), 2**63) if found else None

    def _route(self, path: str) -> None:
        resolve, api = RESOLVE.fullmatch(path), API.fullmatch(path)
        if resolve is not None:
            repo, self.revision, self.file = resolve.groups()
        elif api is not None:
            repo, self.revision = api[1], api[2] or "main"
        else:
            return self._refuse(404, "")
        named = f"{repo}/{self.file}" if resolve else f"{repo}/api"
        fault = self.hub.fault(named, self.command, self.range is not None)
        if fault.then is not None:
            fault.then(self.hub)
        if fault.status is not None:
            found = self.hub.folder(repo, self.revision)
            commit = COMMIT if found is None else found[1]
            return self._refuse(fault.status, fault.code, fault.headers, commit=commit)
        if not self.hub.has(repo):
            return self._refuse(404, "RepoNotFound")
        is_known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.token is not None and not self.is_cdn and not is_known:
            return self._refuse(401, "GatedRepo")
        found = self.hub.folder(repo, self.revision)
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        folder, commit = found
        if api is not None:
            return self._list(repo, folder, commit)
        file = folder / self.file
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", commit=commit)
        if self.hub.redirects and file.name.endswith(LARGE) and not self.is_cdn:
            return self._redirect(file, repo, commit)
        return self._send(file, commit, fault)

    def _list(self, repo: str, folder: Path, commit: str) -> None:
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        document: dict[str, Any] = {"id": repo, "modelId": repo, "sha": commit}
        document |= {"siblings": [{"rfilename": name} for name in names], "tags": []}
        document |= {"cardData": {"license": self.hub.licence}}
        body = json.dumps(document).encode()
        self._start(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        self._write(body)

    def _redirect(self, file: Path, repo: str, commit: str) -> None:
        self._start(
            302,
            {
                "Location": f"{self.hub.cdn}/{repo}/resolve/{commit}/{self.file}?signature=1",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{etag_of(file)}"',
                "X-Linked-Size": file.stat().st_size,
                "Content-Length": 0,
            },
        )

    def _send(self, file: Path, commit: str, fault: Fault) -> None:
        size = file.stat().st_size
        headers: dict[str, Any] = {"ETag": f'"{etag_of(file)}"', "X-Repo-Commit": commit}
        if fault.encoding:
            headers["Content-Encoding"] = fault.encoding
        status, start, end = 200, 0, size
        if self.range is not None and not fault.ignore_range:
            status = 206
            start, end = self.range[0] + fault.shift, min(self.range[1] + fault.shift, size)
            if start >= end:
                self._refuse(416, "")
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size + fault.wrong_total}"
        with file.open("rb") as opened:
            opened.seek(start)
            body = bytearray(opened.read(end - start))
        if fault.flip is not None and start <= fault.flip % size < end:
            body[fault.flip % size - start] ^= 2
        headers["Content-Length"] = len(body) + (fault.wrong_total if status == 200 else 0)
        self._start(status, headers)
        if fault.cut is not None:
            self.close_connection = True
            self._write(body[: int(len(body) * fault.cut)], fault.drip)
        else:
            self._write(body, fault.drip)
            self.close_connection = self.close_connection or fault.wrong_total != 0

    def _start(self, status: int, headers: dict[str, Any]) -> None:
        self.code = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _write(self, body: bytes | bytearray, drip: float = 0.0) -> None:
        if self.command == "HEAD":
            return
        for at in range(0, len(body), CHUNK):
            if drip and self.hub.closing.wait(drip):
                return
            part = body[at : at + CHUNK]
            self.wfile.write(part)
            self.sent += len(part)

    def _refuse(
        self, status: int, code: str, more: dict[str, str] | None = None, *, commit: str = COMMIT
    ) -> None:
        headers: dict[str, Any] = {"X-Repo-Commit": commit, "Content-Length": 0, **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._start(status, headers)

    def log_message(self, format: str, *args: object) -> None:
        """Log no requests."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of killed clients."""


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[Hub]:
    """Run a Hub while the block runs. Afterwards no server listens at its endpoint."""
    hub = Hub(
        commits={f"{repo}@{COMMIT}": folder for repo, folder in repos.items()},
        branches={f"{repo}@main": COMMIT for repo in repos},
    )
    with ExitStack() as stack:
        addresses = []
        for is_cdn in (False, True):
            handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
            server = stack.enter_context(_Server(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            addresses.append(f"http://127.0.0.1:{server.server_address[1]}")
        stack.callback(hub.closing.set)
        hub.endpoint, hub.cdn = addresses
        yield hub
