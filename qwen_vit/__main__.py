"""Run `qwen-vit` as `python -m qwen_vit`."""

import sys

from qwen_vit.cli.exit_codes import EXIT_ERROR, EXIT_INTERRUPTED
from qwen_vit.cli.interrupts import exit_at_interrupts

__all__ = ["main"]


def main() -> None:
    """If click is missing, print one line with the remedy."""
    exit_at_interrupts()  # before all other imports, which take 0.1 s or more
    from qwen_vit.cli.imports import slow_imports
    from qwen_vit.errors import ArgumentError

    try:
        with slow_imports():
            from qwen_vit.cli.main import main as run
        exit_at_interrupts()  # until the command has imported its packages
        try:
            run()
        finally:
            exit_at_interrupts()  # while Python exits, which takes torch 0.1 s or more
    except ArgumentError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
