"""Whether progress is shown: on a terminal, unless the package's warnings are off."""

import logging
import sys

__all__ = ["shows_progress"]


def shows_progress() -> bool:
    """Whether a progress bar goes to stderr.

    `-q` of the command line sets the level of the package's logger to ERROR.
    """
    return sys.stderr.isatty() and logging.getLogger("qwen_vit").isEnabledFor(logging.WARNING)
