"""Imports that take long: Ctrl-C and missing packages while torch is imported."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from qwen_vit.cli.exit_codes import EXIT_INTERRUPTED
from qwen_vit.errors import ArgumentError

__all__ = ["slow_imports"]


@contextmanager
def slow_imports() -> Iterator[None]:
    """Import what a command needs: Ctrl-C in this block ends the process with exit code 130.

    >>> with slow_imports():
    ...     import torch

    Raises ArgumentError for a package that is not installed or cannot be imported.
    """
    # only the main thread may set a handler; another handler means that Ctrl-C is to be ignored
    is_default = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_default:
        signal.signal(signal.SIGINT, _exit_at_once)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ArgumentError(
            str(error), remedy="install the package into this Python: pip install -e ."
        ) from None
    except ImportError as error:  # its text says what to do
        raise ArgumentError(str(error)) from None
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_at_once(*_: object) -> NoReturn:
    # no exception: numpy and torch catch those of their own imports and continue half imported
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
