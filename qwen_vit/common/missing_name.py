"""Describe a name that a collection lacks, and suggest a similar name or an existing one."""

import difflib
from collections.abc import Collection
from itertools import accumulate, islice

from qwen_vit.errors import plural

__all__ = ["missing_name"]

# A program may look up many missing names, so the search takes at most a few milliseconds.
MAX_ENDINGS, MAX_SIMILAR = 10_000, 200
MAX_PAIRS = 200_000  # of characters: difflib takes quadratic time for long names


def missing_name(wanted: str, where: object, names: Collection[str], verb: str = "contains") -> str:
    """Return the message of a KeyError for a collection of named images.

    >>> print(missing_name("p7.jpg", "a.safetensors", ["im/p6.jpg", "im/p7.jpg"]))
    'p7.jpg' is not in a.safetensors, which contains 2 images. Did you mean 'im/p7.jpg'?
    >>> print(missing_name("nope", "a.safetensors", ["im/p6.jpg", "im/p7.jpg"]))
    'nope' is not in a.safetensors, which contains 2 images, such as 'im/p6.jpg'
    """
    fact = f"{wanted!r} is not in {where}, which {verb} {plural(len(names), 'image')}"
    end = _last_part(wanted)
    close = next((each for each in islice(names, MAX_ENDINGS) if _last_part(each) == end), None)
    if close is None:
        similar = difflib.get_close_matches(wanted, _first_names(wanted, names), 1)
        close = similar[0] if similar else None
    if close is not None:
        return f"{fact}. Did you mean {close!r}?"
    return f"{fact}, such as {next(iter(names))!r}" if names else fact


def _first_names(wanted: str, names: Collection[str]) -> list[str]:
    first = list(islice(names, MAX_SIMILAR))
    n_pairs = accumulate(len(wanted) * len(each) for each in first)
    return [each for each, n in zip(first, n_pairs, strict=True) if n <= MAX_PAIRS]


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]
