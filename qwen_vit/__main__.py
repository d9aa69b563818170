"""`python -m qwen_vit` is `qwen-vit`."""

import sys

__all__ = ["main"]

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line; Ctrl-C while torch is imported ends it as any other one does."""
    try:
        try:
            from qwen_vit.cli import main as run
        except ImportError as error:  # says what is missing, and what to install
            sys.stderr.write(f"error: {error}\n")
            sys.exit(EXIT_ERROR)
        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
