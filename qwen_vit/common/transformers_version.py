"""The versions of transformers that the package works with, in one place."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from qwen_vit.errors import ArgumentError

__all__ = ["MIN_TRANSFORMERS", "require_transformers"]

# The first whose `generate` takes precomputed image features. Newer ones than those that
# pyproject.toml and the README name are let through: what is used of them is little.
MIN_TRANSFORMERS = "5.18"


def require_transformers(purpose: str, *, alternative: str = "") -> None:
    """Raise ArgumentError, with the version found, unless transformers is there and new enough.

    `purpose` is what needs it, for the message; `alternative` is another way, if there is one.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        fact = "transformers is not installed"
    else:
        if Version(found).release >= Version(MIN_TRANSFORMERS).release:
            return
        fact = f"transformers {found} is too old"
    remedy = "run pip install 'qwen-vit[hf]'"
    raise ArgumentError(
        fact,
        expected=f"{MIN_TRANSFORMERS} or newer, which {purpose} needs",
        remedy=f"{remedy}, or {alternative}" if alternative else remedy,
    )
