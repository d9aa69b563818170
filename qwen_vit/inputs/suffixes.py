"""List the video extensions, return a file's extension, and count skipped files by extension."""

import os
from collections import Counter

__all__ = ["VIDEO_SUFFIXES", "count_left_out", "suffix_of"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def suffix_of(name: str) -> str:
    """Return the extension in lower case.

    >>> suffix_of("a/B.JPG"), suffix_of("a.b/c")
    ('.jpg', '')
    """
    return os.path.splitext(name)[1].lower()


def count_left_out(left_out: Counter[str], name: str) -> None:
    """Count a skipped file by its extension, except a file whose name begins with "readme",
    "license" or "licence", in upper or lower case.

    >>> counts = Counter()
    >>> for name in ("a/README.md", "LICENSE", "a/notes.md"):
    ...     count_left_out(counts, name)
    >>> counts
    Counter({'.md': 1})
    """
    if not os.path.basename(name).lower().startswith(("readme", "license", "licence")):
        left_out[suffix_of(name)] += 1
