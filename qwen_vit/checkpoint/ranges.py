"""Fetch pieces of remote files into one local file: merged, in parallel, with retries.

This module does not use HTTP itself: the caller passes a function that opens a range of a file.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from qwen_vit.errors import HubError

__all__ = [
    "Opener",
    "Pace",
    "Piece",
    "RangeResponse",
    "RangesRefusedError",
    "TooSlowError",
    "TransferError",
    "fetch",
    "merge",
    "read",
]

logger = logging.getLogger("qwen_vit")

PART_BYTES = 64 * 2**20  # for one request
CONNECTIONS = 8
ATTEMPTS = 6  # consecutive attempts without any bytes
SLOW_ATTEMPTS = 3
PATIENCE_S, MIN_BYTES_A_SECOND = 30.0, 1_000
MAX_WAIT_S = 300.0  # the period in which the Hub counts requests


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """Describe an open range: its bytes in chunks, and the whole file's size and version."""

    chunks: Iterable[bytes]
    file_bytes: int
    version: str | None = None


# (file, first byte, byte after the last) -> that range, cut off at the end of the file
Opener = Callable[[str, int, int], AbstractContextManager[RangeResponse]]


class RangesRefusedError(Exception):
    """Report that the server supports no ranges for this file, or sent the wrong bytes."""


class TransferError(Exception):
    """Report that a transfer did not start or ended early. A retry may start after `wait_s`.

    `cause` is the client's error for a server's response, TooSlowError for a slow server, and None
    for a broken connection.
    """

    def __init__(
        self, message: str, *, wait_s: float | None = None, cause: Exception | None = None
    ) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Piece:
    """Describe the bytes of `file` from `start` up to `end`, and their offset `to` in the copy."""

    file: str
    start: int
    end: int
    to: int


class TooSlowError(HubError):
    """Report that a server sends fewer than 1,000 bytes a second on average."""


class Pace:
    """Check the average speed, because a read timeout tolerates a server that sends a byte every
    few seconds."""

    def __init__(self, name: str) -> None:
        self._name, self._bytes, self._begin = name, 0, time.monotonic()

    def count(self, n_bytes: int) -> None:
        """Raise TooSlowError if more than 30 s have passed with fewer than 1,000 bytes a second on
        average."""
        self._bytes += n_bytes
        seconds = time.monotonic() - self._begin
        if seconds > PATIENCE_S and self._bytes < seconds * MIN_BYTES_A_SECOND:
            raise TooSlowError(
                f"only {self._bytes} bytes arrived in {seconds:.0f} s",
                name=self._name,
                remedy="check the network and any mirror, and try again",
            )


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """Join consecutive pieces that are adjacent in the file and in the copy. Drop empty pieces.

    >>> merge([Piece("a", 0, 4, 100), Piece("a", 4, 6, 104), Piece("a", 8, 9, 106)])
    [Piece(file='a', start=0, end=6, to=100), Piece(file='a', start=8, end=9, to=106)]
    """
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.file, last.end) == (piece.file, piece.start)
            and last.to + last.end - last.start == piece.to
        ):
            merged[-1] = replace(last, end=piece.end)
        elif piece.end > piece.start:
            merged.append(piece)
    return merged


def read(open_range: Opener, file: str, start: int, end: int) -> tuple[bytes, int]:
    """Return one small range, cut off at the file's end, and the file's size."""
    received = bytearray(end - start)

    def keep(chunk: bytes, place: int) -> None:
        received[place : place + len(chunk)] = chunk

    file_bytes = _fetch_piece(Piece(file, start, end, 0), open_range, keep, threading.Event())
    return bytes(received[: max(0, file_bytes - start)]), file_bytes


def fetch(
    pieces: Iterable[Piece],
    open_range: Opener,
    descriptor: int,
    progress: Callable[[int], object],
) -> None:
    """Write each piece at its offset in an open file, in parallel.

    If a piece fails, the function stops the others and raises the piece's error, such as
    RangesRefusedError or TransferError.
    """
    stop, counting = threading.Event(), threading.Lock()

    def write(chunk: bytes, place: int) -> None:
        view = memoryview(chunk)
        while view:
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
        with counting:
            progress(len(chunk))

    def fetch_part(part: Piece) -> None:
        file_bytes = _fetch_piece(part, open_range, write, stop)
        if file_bytes < part.end and not stop.is_set():  # missing bytes would remain zeros
            raise RangesRefusedError(f"{part.file} ends after {file_bytes} bytes")

    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="qwen-vit-download") as pool:
        parts = [
            pool.submit(fetch_part, part) for piece in merge(pieces) for part in split_piece(piece)
        ]
        try:
            done, _ = wait(parts, return_when=FIRST_EXCEPTION)
            for part in done:
                part.result()
        finally:  # also at an interrupt: no thread first finishes a whole part
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def split_piece(piece: Piece) -> Iterator[Piece]:
    """Cut a piece into parts of at most PART_BYTES, the size of one request.

    >>> [part.to for part in split_piece(Piece("a", 0, PART_BYTES + 1, 100))]
    [100, 67108964]
    """
    for start in range(piece.start, piece.end, PART_BYTES):
        end = min(start + PART_BYTES, piece.end)
        yield Piece(piece.file, start, end, piece.to + start - piece.start)


def _fetch_piece(
    piece: Piece, open_range: Opener, write: Callable[[bytes, int], None], stop: threading.Event
) -> int:
    """Fetch a piece, and return the file's size. Resume after an interruption, but raise
    TransferError after six attempts in a row without bytes, or three slow attempts."""
    position, end, failures, file_bytes = piece.start, piece.end, 0, 0
    slow = 0  # attempts
    while position < end and not stop.is_set():
        try:
            with open_range(piece.file, position, end) as opened:
                pace = Pace(piece.file)
                file_bytes = opened.file_bytes
                end = min(end, file_bytes)
                for chunk in opened.chunks:
                    if stop.is_set():
                        break
                    if position + len(chunk) > end:
                        raise RangesRefusedError("more bytes arrived than were requested")
                    write(chunk, piece.to + position - piece.start)
                    position += len(chunk)
                    failures = 0
                    pace.count(len(chunk))
            if position < end and not stop.is_set():
                raise TransferError(f"the connection closed {end - position} bytes early")
        except TooSlowError as error:
            slow += 1
            if slow == SLOW_ATTEMPTS:
                raise TransferError(error.fact, cause=error) from None
        except TransferError as error:
            failures += 1
            if failures == ATTEMPTS:
                raise
            pause = 2.0 ** (failures - 1) if error.wait_s is None else error.wait_s
            pause = min(pause, MAX_WAIT_S)
            logger.warning("%s: %s; trying again in %.0f s", piece.file, error, pause)
            _rest(pause, stop)
    return file_bytes


def _rest(seconds: float, stop: threading.Event) -> None:
    stop.wait(seconds)
