"""Handle the signals that end an export: the first lets the batch in progress finish, and the
second does not."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any, Self

__all__ = ["SAVING", "StopSignals"]

SAVING = "saving encoded images; interrupt again to stop at once"


class StopSignals:
    """Handle Ctrl-C, SIGTERM and SIGHUP while the block runs.

    >>> with StopSignals() as stop:
    ...     stop.is_requested()
    False

    Within `accepted`, the first signal sets `is_requested`. Any other signal raises
    KeyboardInterrupt. The block keeps every handler that is not Python's default. The process
    therefore still ignores SIGHUP under nohup, and Ctrl-C in a shell's background job.
    """

    def __init__(self) -> None:
        self._is_requested = self._is_accepted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if current_thread() is main_thread():  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def is_requested(self) -> bool:
        return self._is_requested

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Let the first signal only set `is_requested`, which the block must check often."""
        self._is_accepted = True
        try:
            yield
        finally:
            self._is_accepted = False

    def _handle(self, *_: object) -> None:
        # end the line of the terminal's ^C, and of a print that the signal interrupts
        if os.isatty(2):
            os.write(2, b"\n")
        if not self._is_accepted or self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        os.write(2, f"{SAVING}\n".encode())
