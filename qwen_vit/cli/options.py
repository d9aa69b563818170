"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "FILE",
    "NAME",
    "device_option",
    "dtype_option",
    "json_option",
    "model_argument",
    "model_option",
    "on_error_option",
    "pixel_options",
    "source_options",
]

NAME = click.Path(readable=False, path_type=str)  # what cannot be read is skipped like any other
FILE = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])

model_argument = click.argument("model")
model_option = click.option(
    "--model", required=True, help="Hub repository, local folder, or 'tiny'."
)
dtype_option = click.option(
    "--dtype", default="auto", show_default=True, help="bfloat16 or float32."
)
on_error_option = click.option(
    "--on-error", type=click.Choice(["skip", "raise"]), default="skip", show_default=True
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def device_option(help: str = "cuda, cuda:1 or cpu.") -> Callable[[Command], Command]:
    """The option that says where to compute."""
    return click.option("--device", default="auto", show_default=True, help=help)


def pixel_options(command: Command) -> Command:
    """The options that bound the size of an image."""
    for side, word in (("max", "Largest"), ("min", "Smallest")):  # the last is listed first
        help = f"{word} height x width after resizing."
        command = click.option(f"--{side}-pixels", type=int, help=help)(command)
    return command


def source_options(command: Command) -> Command:
    """The options that say which checkpoint, for every command that opens one."""
    options = (
        click.option("--revision", help="Branch, tag or commit on the Hub."),
        click.option("--cache-dir", type=FILE, help="Instead of HF_HUB_CACHE ($HF_HOME/hub)."),
        click.option("--local-files-only", is_flag=True, help="Never ask the network."),
    )
    for option in reversed(options):
        command = option(command)
    return command
