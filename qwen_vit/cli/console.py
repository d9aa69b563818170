"""What the commands write: data to stdout, everything else to stderr.

How much goes to stderr is the level of the package's logger: -q sets it to ERROR, -v to INFO.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

import click

from qwen_vit.errors import ExportError, QwenVitError, Wording, one_line

__all__ = [
    "flags_in_logs",
    "flush_logs",
    "is_quiet",
    "is_verbose",
    "open_missing_streams",
    "print_data",
    "print_error",
    "print_log",
    "set_verbosity",
]

LEVELS = {-1: logging.ERROR, 0: logging.NOTSET, 1: logging.INFO}
logger = logging.getLogger("qwen_vit")


def _spell_flags(record: logging.LogRecord) -> bool:
    """A filter that spells options in a log line as flags, in errors and in wordings."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            each.text(in_shell=True)
            if isinstance(each, QwenVitError)
            else each.shell
            if isinstance(each, Wording)
            else each
            for each in record.args
        )
    return True


@contextmanager
def flags_in_logs() -> Iterator[None]:
    """Let log lines name flags while the block runs."""
    logger.filters.insert(0, _spell_flags)  # before the filter that makes a line of its arguments
    try:
        yield
    finally:
        logger.removeFilter(_spell_flags)


def set_verbosity(verbosity: int) -> None:
    """Set how much is logged: -1 errors alone, 0 warnings too, 1 details too."""
    logger.setLevel(LEVELS[verbosity])
    if verbosity < 0:  # the Hub's client reads it when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def is_quiet() -> bool:
    """Whether errors alone are logged, and no progress."""
    return not logger.isEnabledFor(logging.WARNING)


def is_verbose() -> bool:
    """Whether details are logged, and tables are whole."""
    return logger.isEnabledFor(logging.INFO)


def open_missing_streams() -> None:
    """Open a stream that was closed before Python started, as by `2>&-`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the process's life


def print_data(text: str) -> None:
    """Write data to stdout; a reader that stops early, such as `head`, changes nothing.

    Raises ExportError if stdout cannot be written.
    """
    try:
        click.echo("\n".join(map(one_line, text.split("\n"))))
    except OSError as error:
        _discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise ExportError(
                f"standard output could not be written ({error.strerror})",
                remedy="check its target",
            ) from None


def print_log(text: str) -> None:
    """Write a line to stderr, above a progress bar, unless only errors are logged."""
    if not is_quiet():
        _write_log(text)


def print_error(text: str) -> None:
    """Write an error to stderr, with the prefix that every error has."""
    _write_log(f"error: {text}")


def _write_log(text: str) -> None:
    """Write a line to stderr; if it cannot be written, nothing stops."""
    loaded = sys.modules.get("tqdm")  # no bar without it, and importing it takes a while
    above_bars = loaded.tqdm.external_write_mode(file=sys.stderr) if loaded else nullcontext()
    with suppress(OSError), above_bars:
        click.echo(one_line(text), err=True)


def flush_logs() -> None:
    """Write what stderr still holds, or drop it."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Drop what a stream that failed still holds: Python would exit with 120 because of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
