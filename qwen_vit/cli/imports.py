"""Handle Ctrl-C and missing packages while a command imports slow packages."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from qwen_vit.cli.exit_codes import EXIT_INTERRUPTED
from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError

__all__ = ["slow_imports"]


@contextmanager
def slow_imports() -> Iterator[None]:
    """Handle Ctrl-C and missing packages while the block imports packages. Ctrl-C ends the process
    with exit code 130.

    >>> with slow_imports():
    ...     import torch

    Raises ArgumentError if a package is missing or cannot be imported.
    """
    # only the main thread may set a handler, and a background job must still ignore Ctrl-C
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
            str(error), remedy=f"install the package into this Python: {install_command()}"
        ) from None
    except ImportError as error:  # if Triton is missing, the text contains the remedy
        raise ArgumentError(str(error)) from None
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_at_once(*_: object) -> NoReturn:
    # do not raise: numpy and torch catch exceptions of their imports and continue half imported
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
