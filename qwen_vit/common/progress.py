"""Decide whether to show progress: only on a terminal, and only if the package logs warnings."""

import logging
import sys

__all__ = ["shows_progress"]


def shows_progress() -> bool:
    return sys.stderr.isatty() and logging.getLogger("qwen_vit").isEnabledFor(logging.WARNING)
