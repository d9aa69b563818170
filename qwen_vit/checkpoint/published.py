"""List the published checkpoints, and suggest full names for short or misspelt names."""

import difflib
import os
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "PACKAGED",
    "cached_repositories",
    "closest_names",
    "did_you_mean",
    "is_path",
    "packaged_weights",
    "published_checkpoints",
]

PACKAGED = ("tiny",)
MIN_PREFIX = 4  # common letters at the start of two names
# a repository in an address of the Hub or of a mirror
ADDRESS = re.compile(
    r"(?:https?://[^/]+/|hf://|(?:huggingface|hf)\.co/)([\w.-]+/[\w.-]+)", re.IGNORECASE
)
MIN_LIKENESS = 0.7  # of two names, by difflib; "qwen2-vl-7b" does not match "Qwen2.5-VL-7B"


def packaged_weights() -> Path:
    """Return `weights/` inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


@cache
def published_checkpoints() -> dict[str, dict[str, Any]]:
    """Return the entries of `published.toml` by repository.

    >>> published_checkpoints()["Qwen/Qwen2.5-VL-7B-Instruct"]["licence"]
    'Apache-2.0'
    """
    with open(packaged_weights() / "published.toml", "rb") as file:
        return {entry["repo"]: entry for entry in tomllib.load(file).get("checkpoint", [])}


def closest_names(name: str) -> list[str]:
    """Return the published and packaged checkpoints that a name may mean.

    >>> closest_names("7B"), closest_names("Qwen2.5-VL-7b-Instuct"), closest_names("tinny")
    (['Qwen/Qwen2.5-VL-7B-Instruct', 'Qwen/Qwen2.5-Omni-7B'], ['Qwen/Qwen2.5-VL-7B-Instruct'], \
['tiny'])
    >>> closest_names("tyni")  # the same letters in another order
    ['tiny']
    """
    wanted = name.lower().rstrip("/")
    known = [*([] if "/" in name else PACKAGED), *published_checkpoints()]
    if re.fullmatch(r"\d+b", wanted):  # only a size
        return [each for each in known if wanted in re.split("[/-]", each.lower())]
    spelt = {each.lower(): each for each in known}
    spelt |= {each.lower().rpartition("/")[2]: each for each in known}
    wanted = wanted if wanted in spelt else wanted.rpartition("/")[2]
    if wanted in spelt:
        return [spelt[wanted]]
    longer = dict.fromkeys(each for key, each in spelt.items() if key.startswith(wanted))
    if longer and len(wanted) >= MIN_PREFIX:
        return list(longer)[:3]
    swapped = [each for each in spelt if sorted(each) == sorted(wanted)]
    close = swapped or difflib.get_close_matches(wanted, spelt, 1, MIN_LIKENESS)
    return [spelt[each] for each in close]


def did_you_mean(name: str) -> str:
    """Return a question with the checkpoints that a name may mean, or an empty string.

    >>> did_you_mean("Qwen2.5-VL-7B"), did_you_mean("https://huggingface.co/owner/name/tree/main")
    ('did you mean Qwen/Qwen2.5-VL-7B-Instruct?', 'did you mean owner/name?')
    """
    address = ADDRESS.match(name)
    close = [each for each in closest_names(name) if each != name]
    close = [address[1]] if address else close
    return f"did you mean {' or '.join(close)}?" if close else ""


def is_path(name: str) -> bool:
    """Return whether a name can only be a path. A repository has one slash and no leading dot, and
    an address names a host.

    >>> is_path("./model"), is_path("models/qwen/7b"), is_path("Qwen/Qwen2.5-VL-7B-Instruct")
    (True, True, False)
    """
    if "://" in name or ADDRESS.match(name):
        return False
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def cached_repositories() -> list[str]:
    """Return the repositories in the Hub's cache, from the names of its folders.

    Shell completion uses this function, because the import of the Hub's client takes too long.
    """
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    parts = [name.split("--") for name in names if name.startswith("models--")]
    return ["/".join(part[1:]) for part in parts if len(part) == 3]
