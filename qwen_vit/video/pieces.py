"""Pass a video's pieces from a loader thread to the caller's thread."""

import threading
from collections import deque
from collections.abc import Callable, Generator

from qwen_vit.images.patches import Patches

__all__ = ["PieceStream"]

MAX_AHEAD_BYTES = 2**29  # decoded bytes of one video, about the authors' total pixel limit
POLL_S = 0.1  # seconds between checks whether the caller has cancelled


class PieceStream:
    """Decode the pieces of one video in a thread while another thread encodes earlier pieces.

    The decoder is at most MAX_AHEAD_BYTES ahead, so memory does not depend on the video's length.
    With `is_ahead=False` there is no decoding thread. Then `pieces` decodes each piece on request.
    """

    def __init__(
        self, first: Patches, rest: Generator[Patches, None, None], *, is_ahead: bool
    ) -> None:
        self._rest, self._is_ahead = rest, is_ahead
        self._ready: deque[Patches] = deque([first])
        self._bytes = self.n_bytes = first.pixels.nbytes
        self._is_over = self._is_cancelled = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def decode(self, is_closed: Callable[[], bool]) -> None:
        """Decode the remaining pieces. `pieces` raises the errors."""
        try:
            while self._wait_for_room(is_closed) and (piece := next(self._rest, None)) is not None:
                with self._changed:
                    self._ready.append(piece)
                    self._bytes += piece.pixels.nbytes
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised where the pieces are taken
            self._error = error
        finally:
            self._rest.close()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def pieces(self) -> Generator[Patches, None, None]:
        """Yield every piece, in order. Raises the decoder's error after the earlier pieces."""
        try:
            while True:
                with self._changed:
                    while not self._ready and self._is_ahead and not self._is_over:
                        self._changed.wait()
                    piece = self._ready.popleft() if self._ready else None
                    if piece is not None:
                        self._bytes -= piece.pixels.nbytes
                        self._changed.notify_all()
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
        """Stop decoding, because the caller needs no more pieces."""
        with self._changed:
            self._is_cancelled = True
            self._ready.clear()
            self._changed.notify_all()
        if not self._is_ahead:
            self._rest.close()

    def _wait_for_room(self, is_closed: Callable[[], bool]) -> bool:
        """Wait until the thread may decode another piece. Return False after `cancel`."""
        with self._changed:
            while self._bytes >= MAX_AHEAD_BYTES and not (self._is_cancelled or is_closed()):
                self._changed.wait(POLL_S)
            return not (self._is_cancelled or is_closed())
