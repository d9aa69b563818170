"""`python -m qwen_vit` is `qwen-vit`."""

import sys

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C while torch is imported ends it as any other one does."""
    try:
        from qwen_vit.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
