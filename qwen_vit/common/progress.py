"""Decide whether to show progress: on a terminal, unless the package hides warnings."""

import logging
import sys

__all__ = ["shows_progress"]


def shows_progress() -> bool:
    return sys.stderr.isatty() and logging.getLogger("qwen_vit").isEnabledFor(logging.WARNING)
