"""Test listings of any length: constant memory, an end, progress messages, and Ctrl-C."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.common import storage
from qwen_vit.errors import ExportError
from qwen_vit.export.folder import LocalFolder
from qwen_vit.inputs import listing as listing_module
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item, Listing
from tests.support import kill_harness
from tests.support.export_stress import fake_encoder, tiny_png
from tests.support.s3_server import BUCKET, s3_server
from tests.support.store_stress import large_listing


def test_a_large_prefix_is_listed_in_little_memory(tmp_path: Path) -> None:
    """Run a part of `python -m tools.checks.soak listing`."""
    figures = large_listing(tmp_path, objects=50_000, real=1_200)
    assert figures["objects"] == 50_000


@pytest.mark.parametrize("kept", [0, 2, 10])
def test_a_repeated_id_is_found_at_any_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(listing_module, "IDS_KEPT", kept)
    items = [Item(name, f"/{place}/{name}") for place, name in enumerate("abcdbe")]
    with pytest.raises(ExportError, match="b: two images have this id, the second is /4/b"):
        Listing.save(tmp_path / "l", items, 3)
    assert list(tmp_path.iterdir()) == []


def test_ids_whose_hashes_collide_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_module, "hash", lambda _: 1, raising=False)
    items = [Item(name, f"/{name}") for name in "abc"]
    assert Listing.save(tmp_path / "l", items, 3).shard(0) == items


def test_a_repeated_first_id_ends_a_list_without_an_end(tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield Item("a", "/a")

    with pytest.raises(ExportError, match="a: two images have this id"):
        Listing.save(tmp_path / "l", endless(), 3)


def test_a_long_listing_reports_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = [Item(str(number), f"/{number}") for number in range(2_001)]
    Listing.save(tmp_path / "l", items, 512)
    assert caplog.messages == []
    monkeypatch.setattr(listing_module, "LINE_EVERY_S", -1.0)
    Listing.save(tmp_path / "l", items, 512)
    assert "still listing: 1,000 images so far" in caplog.messages


@pytest.mark.parametrize("token", ["same", None])
def test_a_store_whose_listing_never_ends_is_named(
    monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    """The server of this test always answers with the same page."""

    class Files:
        protocol = "s3"

        def call_s3(self, *_: Any, **__: Any) -> Any:
            return {"Contents": [], "IsTruncated": True, "NextContinuationToken": token}

    monkeypatch.setattr(storage, "files_of", lambda address: (Files(), address[5:]))
    monkeypatch.setattr("qwen_vit.inputs.remote.find_object", lambda _: None)
    with pytest.raises(ExportError, match="the store sends no next page of its listing"):
        list(find_items(["s3://bucket/photos/"]))


@pytest.mark.slow
def test_ctrl_c_ends_a_listing(tmp_path: Path) -> None:
    """The listing has 100 pages of 0.3 s. An interrupt in the middle leaves no file."""
    out = tmp_path / "out"
    with s3_server() as server:
        for number in range(100):
            server.put(f"p/{number:03}.png", tiny_png(number))
        server.page_keys = 1
        server.fault = lambda request: "slow" if "list-type" in request.query else None
        command = fake_encoder(tmp_path / "j", f"s3://{BUCKET}/p", "--out", out)
        process = kill_harness.start(command, tmp_path / "log")
        while sum("continuation-token" in each.query for each in server.requests) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        begin = time.monotonic()
        assert kill_harness.end_group(process, signal.SIGINT) == 130
        assert time.monotonic() - begin < 20
    assert "the export saved no image; run the same command again" in (tmp_path / "log").read_text()
    assert LocalFolder(out).names() <= {"lock"}
