"""Derive a file's kind from its name."""

import os

__all__ = ["VIDEO_SUFFIXES", "suffix_of"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def suffix_of(name: str) -> str:
    """Return the extension in lower case.

    >>> suffix_of("a/B.JPG"), suffix_of("a.b/c")
    ('.jpg', '')
    """
    return os.path.splitext(name)[1].lower()
