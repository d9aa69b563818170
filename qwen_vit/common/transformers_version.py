"""The versions of transformers that the package works with, in one place."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from qwen_vit.errors import ArgumentError

__all__ = ["MIN_TRANSFORMERS", "require_transformers"]

# The first whose `generate` takes precomputed image features. Versions newer than the tested ones
# are accepted: this package uses little of them.
MIN_TRANSFORMERS = "5.18"


def require_transformers(purpose: str, *, alternative: str = "") -> None:
    """Raise ArgumentError, with the version found, unless transformers is installed and new enough.

    `purpose` names what needs it, for the message. `alternative` is another way, if one exists.
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
        remedy=remedy + ", or " + alternative if alternative else remedy,
    )
