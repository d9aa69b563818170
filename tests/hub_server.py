"""A minimal Hugging Face Hub on the loopback interface: enough for hf_hub_download, and no more."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What the server holds, and what it was asked for; tests change the one and read the other.

    `status` answers every request of a repository with (HTTP status, X-Error-Code or "").
    """

    repos: dict[str, Path]
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut_short: set[str] = field(default_factory=set)  # "repo/file": it breaks half-way
    fetched: list[str] = field(default_factory=list)  # files that were downloaded
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        match = RESOLVE.fullmatch(self.path.partition("?")[0])
        if match is None:
            return self._refuse(404, "")
        repo, revision, file = match.groups()
        if repo in self.hub.status:
            return self._refuse(*self.hub.status[repo])
        if repo not in self.hub.repos:
            return self._refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        path = self.hub.repos[repo] / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return None
        if f"{repo}/{file}" in self.hub.cut_short:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        self.hub.fetched.append(file)
        self.wfile.write(content)
        return None

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[Hub]:
    """A hub that runs while the block does; afterwards nothing listens at its endpoint."""
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
