"""Signals that end an export: it finishes its batch after the first, and stops at the second."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any, Self

__all__ = ["StopSignals"]

MESSAGE = b"\ninterrupted: saving encoded images; once more to stop at once\n"


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP, while the block runs.

    >>> with StopSignals() as stop:
    ...     stop.is_requested()
    False

    Within `accepted`, the first signal sets `is_requested`. Any other signal raises
    KeyboardInterrupt. A signal that was ignored before the block stays ignored: nohup ignores
    SIGHUP, and shells ignore Ctrl-C for background jobs.
    """

    def __init__(self) -> None:
        self._is_requested = self._is_accepted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if current_thread() is main_thread():  # no other thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def is_requested(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._is_requested

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """The block asks `is_requested` often and ends when it is True."""
        self._is_accepted = True
        try:
            yield
        finally:
            self._is_accepted = False

    def _handle(self, *_: object) -> None:
        if not self._is_accepted or self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        os.write(2, MESSAGE)  # print may be interrupted in the middle of a line of its own
