"""Test that large, slow or changed HTTP bodies end in time, with an error that gives the cause."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.checkpoint import ranges
from qwen_vit.checkpoint.bounded_progress import bounded_progress
from qwen_vit.checkpoint.http_ranges import fetch_json
from qwen_vit.checkpoint.ranges import Pace, RangeResponse, TooSlowError, TransferError
from qwen_vit.errors import HubError
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.hub_server import COMMIT, Fault, serving
from tests.support.hub_worker import running_worker


def test_weights_that_change_between_two_ranges_are_not_mixed(tmp_path: Path) -> None:
    """A fault once joined values of two versions with equal shapes, and stored the result."""
    for name, seed in (("first", 0), ("second", 1)):
        write_checkpoint(tmp_path / name, SMALL, seed=seed)
    with serving({}) as hub:
        key = f"org/tiny@{COMMIT}"
        hub.commits[key], hub.branches["org/tiny@main"] = tmp_path / "first", COMMIT

        def upload(running: Any) -> None:
            running.commits[key] = tmp_path / "second"

        hub.faults.append(Fault("*.safetensors", ranges=True, skip=2, times=1, then=upload))
        with running_worker(tmp_path / "home", hub.endpoint) as worker:
            done = worker("load", model="org/tiny", cache_dir=tmp_path / "cache", part_bytes=4096)
    assert done.get("kind") == "HubError", done
    assert "changed on the server" in done["message"]
    assert "--full" in done["message"]


@contextmanager
def serving_json(parts: Iterator[bytes], **headers: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
            except OSError:
                pass

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def test_a_document_is_read_whole() -> None:
    with serving_json(iter([b'{"a":', b" 1}"])) as url:
        assert fetch_json(url, None, deadline_s=5.0) == {"a": 1}


def test_an_endless_document_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vit.checkpoint.http_ranges.MAX_JSON_BYTES", 100_000)
    with (
        serving_json(iter(lambda: b" " * 50_000, b"")) as url,
        pytest.raises(HubError, match="bytes of JSON"),
    ):
        fetch_json(url, None, deadline_s=5.0)


def test_a_server_that_drips_bytes_reaches_the_deadline() -> None:
    def drip() -> Iterator[bytes]:
        while True:
            time.sleep(0.02)
            yield b" "

    begin = time.monotonic()
    with serving_json(drip()) as url, pytest.raises(HubError, match=r"0\.2 s"):
        fetch_json(url, None, deadline_s=0.2)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize(("limit", "total"), [(100, 4 * 10**10), (100, None), (None, 100)])
def test_a_file_above_the_size_limit_is_not_written(limit: int | None, total: int | None) -> None:
    def download() -> None:
        with bounded_progress("config.json", limit)(total=total, disable=True) as bar:
            for _ in range(5):
                bar.update(60)

    with pytest.raises(HubError, match=r"config\.json: .* bytes or more"):
        download()
    with bounded_progress("config.json", 100)(total=90, disable=True) as bar:
        bar.update(90)


def test_a_rate_of_a_few_bytes_a_second_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    slow, fast = Pace("slow"), Pace("fast")
    for _ in range(6):
        now[0] += 5
        slow.count(1)
        fast.count(10_000)
    now[0] += 5
    fast.count(10_000)
    with pytest.raises(TooSlowError, match="slow: only 7 bytes arrived in 35 s"):
        slow.count(1)


def test_a_download_from_a_slow_server_ends_after_three_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranges, "PATIENCE_S", -1.0)
    monkeypatch.setattr(ranges, "MIN_BYTES_A_SECOND", 10**12)
    opened = []

    @contextmanager
    def open_range(file: str, start: int, end: int) -> Iterator[RangeResponse]:
        opened.append(start)
        yield RangeResponse([b"x"], 100)

    with pytest.raises(TransferError) as caught:
        ranges.read(open_range, "a", 0, 100)
    assert opened == [0, 1, 2]
    assert isinstance(caught.value.cause, HubError)
