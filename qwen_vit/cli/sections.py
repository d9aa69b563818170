"""Divide a command's help into sections, because some commands have about 50 options."""

import os
from typing import Any

import click

from qwen_vit.cli.console import print_data
from qwen_vit.errors import ArgumentError

__all__ = ["SECTIONS", "SECTION_OF", "PrintedHelp", "SectionedCommand"]

SECTIONS = {
    "Input options": "--column --id-column --formats --pages --allow-urls --exif --as-video",
    "Size options": "--min-pixels --max-pixels",
    "Video options": (
        "--fps --n-frames --start --end --max-frames --max-frame-pixels --min-frame-pixels "
        "--sampling"
    ),
    "Compute options": "--device --dtype --quantization --decode-threads --ray",
    "Failure options": "--on-error --allow-failed --max-failures --retry-failed",
    "Hub options": "--revision --subfolder --cache-dir --local-files-only",
    "Message options": "--json --quiet --verbose --help",
}
SECTION_OF = {option: name for name, options in SECTIONS.items() for option in options.split()}


def _print_help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print_data(ctx.get_help())
        ctx.exit()


class PrintedHelp(click.Command):
    """Print the help like a command's results, for which a full disk is an error and a closed pipe
    is not."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _print_help
        return option


class SectionedCommand(PrintedHelp):
    """Print options that several commands share in sections, after the command's own options. Do
    not run in a deleted folder, where torch may end the process."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            os.getcwd()
        except FileNotFoundError:
            remedy = "change to another folder"
            raise ArgumentError("the current folder was deleted", remedy=remedy) from None
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {"Options": []}
        records |= {name: [] for name in SECTIONS}
        for option in self.get_params(ctx):  # an argument has no line: the usage names it
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                records[SECTION_OF.get(option.opts[-1], "Options")].append(record)
        for name, lines in records.items():
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)
