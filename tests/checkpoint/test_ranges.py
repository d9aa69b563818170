"""Test that ranges of files are merged, cut, fetched in parallel and written to their places."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vit.checkpoint import ranges
from qwen_vit.checkpoint.ranges import (
    Piece,
    RangeResponse,
    RangesRefusedError,
    TransferError,
    fetch,
    merge,
    read,
)

REST = ranges._rest
FILES = {"a": os.urandom(5_000), "b": os.urandom(3_000)}


class Source:
    """Open ranges of FILES in small chunks. Each of `breaks` ends a range after this number of
    bytes."""

    def __init__(self, breaks: list[int] | None = None) -> None:
        self.breaks = breaks or []
        self.opened: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    @contextmanager
    def open(self, name: str, start: int, end: int) -> Iterator[RangeResponse]:
        with self.lock:
            self.opened.append((name, start, end))
            stop = self.breaks.pop() if self.breaks else None
        yield RangeResponse(self._chunks(FILES[name][start:end], stop), len(FILES[name]))

    def _chunks(self, content: bytes, stop: int | None) -> Iterator[bytes]:
        for at in range(0, len(content), 100):
            if stop is not None and at >= stop:
                raise TransferError("cut")
            yield content[at : at + 100]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(ranges, "_rest", lambda seconds, _: waited.append(seconds))
    monkeypatch.setattr(ranges, "PART_BYTES", 1_000)
    return waited


@st.composite
def arrangements(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Return spans of the two files in any order, with adjacent destinations."""
    spans = []
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(FILES)))
        start = draw(st.integers(0, len(FILES[name])))
        spans.append((name, start, draw(st.integers(start, len(FILES[name])))))
        if draw(st.booleans()):  # and the bytes after it
            name, _, end = spans[-1]
            spans.append((name, end, draw(st.integers(end, len(FILES[name])))))
    return spans


@settings(max_examples=60, deadline=None)
@given(arrangements(), st.lists(st.integers(0, 900), max_size=8))
def test_every_byte_is_written_to_its_place_after_any_interruptions(
    spans: list[tuple[str, int, int]], breaks: list[int]
) -> None:
    pieces, expected = [], b""
    for name, start, end in spans:
        pieces.append(Piece(name, start, end, len(expected)))
        expected += FILES[name][start:end]
    arrived: list[int] = []
    with TemporaryDirectory() as folder, Path(folder, "file").open("wb+") as file:
        ranges.ATTEMPTS, before = 10, ranges.ATTEMPTS
        try:
            fetch(pieces, Source(breaks).open, file.fileno(), arrived.append)
        finally:
            ranges.ATTEMPTS = before
        file.seek(0)
        assert file.read() == expected
    assert sum(arrived) == len(expected)


def test_only_adjacent_ranges_become_one_request() -> None:
    pieces = [Piece("a", 0, 4, 9), Piece("a", 4, 6, 13), Piece("a", 6, 6, 15), Piece("b", 6, 8, 15)]
    assert merge(pieces) == [Piece("a", 0, 6, 9), Piece("b", 6, 8, 15)]
    scattered = [Piece("a", 0, 4, 0), Piece("a", 4, 6, 5)]
    assert merge(scattered) == scattered


def test_a_range_resumes_after_an_interruption_with_growing_waits(waits: list[float]) -> None:
    source = Source(breaks=[0, 0, 0, 300])
    content, size = read(source.open, "a", 100, 900)
    assert (content, size) == (FILES["a"][100:900], 5_000)
    assert source.opened == [("a", 100, 900), *[("a", 400, 900)] * 4]
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_six_interruptions_without_progress_are_an_error(waits: list[float]) -> None:
    source = Source(breaks=[0] * 9)
    with pytest.raises(TransferError, match="cut"):
        read(source.open, "a", 0, 10)
    assert len(source.opened) == 6
    assert sum(waits) == 31.0


def test_interruptions_with_progress_are_always_retried(waits: list[float]) -> None:
    content, _ = read(Source(breaks=[100] * 20).open, "a", 0, 3_000)
    assert content == FILES["a"][:3_000]
    assert waits == [1.0] * 20


def test_a_source_that_ends_early_without_an_error_is_an_interruption() -> None:
    starts: list[int] = []

    @contextmanager
    def short(name: str, start: int, end: int) -> Iterator[RangeResponse]:
        starts.append(start)
        yield RangeResponse([] if start else [b"x" * 4], 5_000)

    with pytest.raises(TransferError, match="closed 6 bytes early"):
        read(short, "a", 0, 10)
    assert starts == [0, *[4] * 5]


def test_a_range_beyond_the_end_is_cut_off_there() -> None:
    assert read(Source().open, "b", 2_990, 3_050) == (FILES["b"][2_990:], 3_000)


def test_a_file_that_ends_before_a_piece_does_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(RangesRefusedError, match="3000 by"):
        fetch([Piece("b", 2_990, 3_050, 0)], Source().open, file.fileno(), lambda _: None)


def test_the_first_refusal_stops_the_others(tmp_path: Path) -> None:
    class Refusing(Source):
        @contextmanager
        def open(self, name: str, start: int, end: int) -> Iterator[RangeResponse]:
            if start == 2_000:
                raise RangesRefusedError("no")
            with super().open(name, start, end) as opened:
                yield opened

    with (tmp_path / "file").open("wb") as file, pytest.raises(RangesRefusedError):
        fetch([Piece("a", 0, 5_000, 0)], Refusing().open, file.fileno(), lambda _: None)
    assert [t for t in threading.enumerate() if t.name.startswith("qwen-vit-download")] == []


def test_a_part_that_waits_for_its_next_attempt_does_not_delay_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_rest", REST)
    monkeypatch.setattr(ranges, "MAX_WAIT_S", 20.0)
    has_failed = threading.Event()

    @contextmanager
    def busy(name: str, start: int, end: int) -> Iterator[RangeResponse]:
        if start == 0:
            has_failed.set()
            raise TransferError("HTTP 429", wait_s=300.0)
        has_failed.wait()
        raise RangesRefusedError("no")
        yield

    begin = time.monotonic()
    with (tmp_path / "file").open("wb") as file, pytest.raises(RangesRefusedError):
        fetch([Piece("a", 0, 2_000, 0)], busy, file.fileno(), lambda _: None)
    assert time.monotonic() - begin < 10


def test_more_bytes_than_requested_are_refused() -> None:
    @contextmanager
    def generous(name: str, start: int, end: int) -> Iterator[RangeResponse]:
        yield RangeResponse([b"x" * (end - start + 1)], 5_000)

    with pytest.raises(RangesRefusedError, match="more bytes"):
        read(generous, "a", 0, 10)
