"""`python -m qwen_vit` is `qwen-vit`."""

import os
import signal
import sys
from typing import NoReturn

__all__ = ["main"]

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line; Ctrl-C while torch is imported ends it as any other one does."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _stop)
    try:
        from qwen_vit.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"error: {error}; install the package into this Python: pip install -e .\n"
        )
        sys.exit(EXIT_ERROR)
    except ImportError as error:  # which says what to do
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_ERROR)
    signal.signal(signal.SIGINT, before)
    try:
        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


def _stop(*_: object) -> NoReturn:
    # no exception: numpy and torch catch those of their own imports, and go on half imported
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
