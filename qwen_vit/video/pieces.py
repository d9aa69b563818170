"""Pass videos' pieces from loader threads to the caller's thread, in bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Generator

from qwen_vit.images.frames import Decoded
from qwen_vit.images.memory import decoding_memory

__all__ = ["PieceMemory", "PieceStream"]

MAX_AHEAD_BYTES = 2**29  # decoded bytes of one video, about those of 115,200 tokens
ALL_AHEAD_BYTES = 2**31  # decoded bytes of all videos: ten clips of 720p and 60 s
SHARE = 2  # of the memory for decoding, at most half
POLL_S = 0.1  # seconds between checks whether the caller has cancelled


class PieceMemory:
    """Hold the number of decoded bytes that wait for the encoder, and a condition for changes."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.changed = threading.Condition()

    def has_room(self) -> bool:
        return self.n_bytes < min(ALL_AHEAD_BYTES, decoding_memory.total // SHARE)


class PieceStream:
    """Decode the pieces of one video in a thread while another thread encodes earlier pieces.

    The thread pauses while MAX_AHEAD_BYTES of decoded pieces wait, so memory does not depend on the
    video's length. It also pauses while the videos that share its `memory` together fill that
    memory. The video whose pieces the encoder is taking does not wait for others, and every video
    may always have one decoded piece. With `is_ahead=False`, no thread decodes ahead, and `pieces`
    decodes each piece on request.
    """

    def __init__(
        self,
        first: Decoded,
        rest: Generator[Decoded, None, None],
        *,
        is_ahead: bool,
        memory: PieceMemory | None = None,
    ) -> None:
        self._rest, self._is_ahead = rest, is_ahead
        self._memory = PieceMemory() if memory is None else memory
        self._changed = self._memory.changed
        self._ready: deque[Decoded] = deque()
        self._bytes = 0
        self._is_taken = self._is_over = self._is_cancelled = False
        self._error: BaseException | None = None
        self._put(first)

    def decode(self, is_closed: Callable[[], bool]) -> None:
        """Decode the remaining pieces; `pieces` raises the errors."""
        try:
            while self._wait_for_room(is_closed) and (piece := next(self._rest, None)) is not None:
                self._put(piece)
        except BaseException as error:  # noqa: BLE001 - raised where the pieces are taken
            self._error = error
        finally:
            self._rest.close()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def pieces(self) -> Generator[Decoded, None, None]:
        """Yield every piece, in order. Raises the decoder's error after the pieces before it."""
        try:
            while True:
                with self._changed:
                    self._is_taken = True
                    while not self._ready and self._is_ahead and not self._is_over:
                        self._changed.wait()
                    piece = self._ready.popleft() if self._ready else None
                    if piece is not None:
                        self._count(-piece.n_bytes)
                if piece is None and self._error is not None:
                    raise self._error
                if piece is None and not self._is_ahead:
                    piece = next(self._rest, None)
                if piece is None:
                    return
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        with self._changed:
            self._is_cancelled = True
            self._ready.clear()
            self._count(-self._bytes)
        if not self._is_ahead:
            self._rest.close()

    def _put(self, piece: Decoded) -> None:
        with self._changed:
            if not self._is_cancelled:
                self._ready.append(piece)
                self._count(piece.n_bytes)

    def _count(self, n_bytes: int) -> None:
        self._bytes += n_bytes
        self._memory.n_bytes += n_bytes
        self._changed.notify_all()

    def _wait_for_room(self, is_closed: Callable[[], bool]) -> bool:
        """Wait until the thread may decode another piece. Return False after `cancel`, or if
        `is_closed` returns True."""
        with self._changed:
            while not (self._has_room() or self._is_cancelled or is_closed()):
                self._changed.wait(POLL_S)
            return not (self._is_cancelled or is_closed())

    def _has_room(self) -> bool:
        # the encoder waits for this video's next piece: other videos must not stop it
        if not self._ready:
            return True
        return self._bytes < MAX_AHEAD_BYTES and (self._is_taken or self._memory.has_room())
