"""Write data to stdout, and all other output to stderr.

The level of the package's logger sets the amount of output to stderr. The option -q sets ERROR, and
-v sets INFO.
"""

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

import click
from click.core import ParameterSource

from qwen_vit.errors import ExportError, QwenVitError, Wording, one_line

__all__ = [
    "command_again",
    "flags_in_logs",
    "flush_logs",
    "is_quiet",
    "is_verbose",
    "open_missing_streams",
    "print_data",
    "print_error",
    "print_log",
    "print_skipped",
    "set_verbosity",
    "warn_of_ignored",
]

LEVELS = {-1: logging.ERROR, 0: logging.NOTSET, 1: logging.INFO}
logger = logging.getLogger("qwen_vit")


def _spell_flags(record: logging.LogRecord) -> bool:
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
    """Spell options as flags in log lines while the block runs."""
    logger.filters.insert(0, _spell_flags)  # insert it before the filter that formats the arguments
    try:
        yield
    finally:
        logger.removeFilter(_spell_flags)


def set_verbosity(verbosity: int) -> None:
    """Set the log level: -1 for errors, 0 also for warnings, 1 also for details."""
    logger.setLevel(LEVELS[verbosity])
    if verbosity < 0:  # the Hub's client reads the variable when Python imports it
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def is_quiet() -> bool:
    return not logger.isEnabledFor(logging.WARNING)


def is_verbose() -> bool:
    return logger.isEnabledFor(logging.INFO)


def open_missing_streams() -> None:
    """Discard the output to stdout or stderr if the stream was closed before Python started, for
    example by `2>&-`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the process's life


def print_data(text: str) -> None:
    """Write data to stdout. A reader that stops early, such as `head`, is not an error."""
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
    """Write a line to stderr above any progress bar, unless the user passed --quiet."""
    if not is_quiet():
        _write_log(text)


def print_skipped(text: str) -> None:
    """Write a line about a failed image, even with --quiet."""
    _write_log(f"skipped: {text}")


def print_error(text: str) -> None:
    _write_log(f"error: {text}")


def _write_log(text: str) -> None:
    # without tqdm there is no progress bar, and importing tqdm is slow
    loaded = sys.modules.get("tqdm")
    above_bars = loaded.tqdm.external_write_mode(file=sys.stderr) if loaded else nullcontext()
    with suppress(OSError), above_bars:
        click.echo(one_line(text), err=True)


def warn_of_ignored(names: Sequence[str], reason: str) -> None:
    """Log the options among these names that the user passed, because they have no effect."""
    source = click.get_current_context().get_parameter_source
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        logger.warning("ignored %s: %s", " and ".join(given), reason)


def command_again() -> str:
    """Return this command for a page that it wrote, so that readers can replace the page."""
    words = ["qwen-vit", *sys.argv[1:]]
    return shlex.join(words if "--overwrite" in words else [*words, "--overwrite"])


def flush_logs() -> None:
    """Write the buffered lines of stderr, or drop them."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Drop the buffer of a stream that failed, because Python would exit with 120 otherwise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
