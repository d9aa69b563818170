"""Run the `qwen-vit` command: its group of commands, and its exit codes for errors.

Data goes to stdout. Progress and logs go to stderr. `exit_codes` lists the exit codes. Python
imports a command's module only for that command, and torch only for the command's body, so
`--help`, `--version` and usage errors respond at once. For speed, a command's module
imports only click and other modules that import quickly. Command bodies import the slow modules of
this folder, such as `text` and `describe`.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from qwen_vit import __version__
from qwen_vit.cli.console import (
    flags_in_logs,
    flush_logs,
    open_missing_streams,
    print_data,
    print_error,
    print_log,
    set_verbosity,
)
from qwen_vit.cli.exit_codes import EXIT_ERROR, EXIT_INTERRUPTED
from qwen_vit.cli.sections import PrintedHelp
from qwen_vit.errors import ExportError, QwenVitError

__all__ = ["cli", "main"]

COMMANDS = ("bench", "compare", "download", "encode", "export", "info", "show", "verify")
# how Python's threads, torch on a CPU, and C++ report that memory is full
FULL_MEMORY = re.compile(r"can't start new thread|can't allocate memory|bad_alloc")
OUT = re.compile(r"--out(?:put)?[-_]?(?:dir|directory|folder|file|path)")  # of other programs
MORE_MEMORY = "free some memory, or raise the memory limit, and run the same command again"


class _LazyGroup(PrintedHelp, click.Group):
    """Import a command's module, which is named after the command, only on request."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            return None
        command: click.Command = getattr(import_module(f"qwen_vit.cli.{cmd_name}"), cmd_name)
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        print_data(f"qwen-vit, version {__version__}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    commands=[click.Command(name) for name in COMMANDS],  # only names, for help and suggestions
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli() -> None:
    """Turn images into the embeddings that Qwen2.5-VL's language model reads.

    \b
    qwen-vit encode cat.jpg dog.png --model Qwen/Qwen2.5-VL-7B-Instruct --out features.safetensors
    qwen-vit info tiny

    \b
    Tab completes commands, options and models. For bash, add this line to ~/.bashrc:
      eval "$(_QWEN_VIT_COMPLETE=bash_source qwen-vit)"
    For zsh, add the line to ~/.zshrc with zsh_source. For fish, add to ~/.config/fish/config.fish:
      _QWEN_VIT_COMPLETE=fish_source qwen-vit | source
    """


def main() -> None:
    open_missing_streams()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").propagate = False  # the library prints its own messages
    set_verbosity(0)
    try:
        with flags_in_logs():
            cli.main(sys.argv[1:] or ["--help"], prog_name="qwen-vit", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        print_log("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        print_error(_usage_text(error))
        sys.exit(EXIT_ERROR)
    except QwenVitError as error:
        print_error(error.text(in_shell=True))
        sys.exit(EXIT_ERROR)
    except OSError as error:  # no other code expected this error of the operating system
        reason, name = error.strerror or str(error), str(error.filename or "")
        fact = f"cannot be used ({reason})" if name else reason
        remedy = "check its permissions and its disk" if name else "check the disk and the network"
        print_error(str(ExportError(fact, name=name, remedy=remedy)))
        sys.exit(EXIT_ERROR)
    except Exception as error:  # Python's exit code would be 1: finished, with inputs skipped
        if isinstance(error, MemoryError) or FULL_MEMORY.search(str(error)):
            print_error(str(QwenVitError("out of memory", remedy=MORE_MEMORY)))
            sys.exit(EXIT_ERROR)
        logging.getLogger("qwen_vit").exception("error: this should not happen; please report it")
        sys.exit(EXIT_ERROR)
    finally:
        flush_logs()


def _guess(error: click.UsageError, close: Sequence[str]) -> str | None:
    if not isinstance(error, click.NoSuchOption):
        return close[0] if close else None
    options = [] if error.ctx is None else error.ctx.command.params
    if OUT.fullmatch(error.option_name) and any("--out" in each.opts for each in options):
        return "--out"
    from difflib import get_close_matches

    # click also compares the dashes, and would suggest --pages for --nope
    names = get_close_matches(error.option_name[2:], [each[2:] for each in close], n=1)
    return f"--{names[0]}" if names else None


def _hints(error: click.UsageError) -> list[str]:
    if isinstance(error, click.NoSuchOption):
        files = [each for each in sys.argv[1:] if each.startswith("-") and os.path.lexists(each)]
        if files:
            return [f"For the file, pass ./{files[0]}."]
    guess = _guess(error, getattr(error, "possibilities", None) or [])
    return [f"Did you mean {guess}?"] if guess else []


def _usage_text(error: click.ClickException) -> str:
    # click's format_message would add all guesses, in alphabetical order
    text = error.message if hasattr(error, "possibilities") else error.format_message()
    text = " ".join(text.split())
    if not isinstance(error, click.UsageError):
        return text
    sentences = [text if text.endswith(tuple(".?!)")) else f"{text}.", *_hints(error)]
    # click's error about a missing value does not name the command
    named = ["qwen-vit", *(each for each in sys.argv[1:2] if each in COMMANDS)]
    path = " ".join(named) if error.ctx is None else error.ctx.command_path
    return " ".join([*sentences, f"See `{path} --help`."])
