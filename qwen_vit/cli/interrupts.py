"""End the process at Ctrl-C while a command starts or Python exits. This module imports quickly."""

import os
import signal

from qwen_vit.cli.exit_codes import EXIT_INTERRUPTED

__all__ = ["exit_at_interrupts", "raise_at_interrupts"]


def exit_at_interrupts() -> None:
    """Let Ctrl-C end the process with exit code 130 and one line.

    A background job still ignores Ctrl-C. The function keeps a handler that the caller has set.
    """
    _replace(signal.default_int_handler, _exit_at_once)


def raise_at_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, after `exit_at_interrupts`."""
    _replace(_exit_at_once, signal.default_int_handler)


def _replace(handler: object, by: "signal._HANDLER") -> None:
    if signal.getsignal(signal.SIGINT) is handler:
        try:
            signal.signal(signal.SIGINT, by)
        except ValueError:  # only the main thread may set a handler
            return


def _exit_at_once(*_: object) -> None:
    # do not raise: numpy and torch catch exceptions of their imports and continue half imported
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
