"""Handle Ctrl-C and missing packages while a command imports slow packages."""

from collections.abc import Iterator
from contextlib import contextmanager

from qwen_vit.cli.interrupts import exit_at_interrupts, raise_at_interrupts
from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError

__all__ = ["slow_imports"]


@contextmanager
def slow_imports() -> Iterator[None]:
    """Let Ctrl-C end the process with exit code 130 while the block imports packages.

    >>> with slow_imports():
    ...     import torch
    """
    exit_at_interrupts()
    try:
        yield
    except ModuleNotFoundError as error:
        raise ArgumentError(
            str(error), remedy=f"install the package into this Python: {install_command()}"
        ) from None
    except ImportError as error:  # if Triton is missing, the text contains the remedy
        raise ArgumentError(str(error)) from None
    finally:
        raise_at_interrupts()
