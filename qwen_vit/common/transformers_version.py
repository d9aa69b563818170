"""Define the oldest version of transformers with which the package works, and require it."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from qwen_vit.common.installation import install_command
from qwen_vit.errors import ArgumentError

__all__ = ["MIN_TRANSFORMERS", "require_transformers"]

# The first version whose `generate` takes precomputed image features. Versions newer than the
# tested ones are accepted, because this package uses little of transformers.
MIN_TRANSFORMERS = "5.18"


def require_transformers(purpose: str, *, alternative: str = "") -> None:
    """Raise ArgumentError if transformers is missing or too old.

    For the message, `purpose` names the feature that needs transformers, and `alternative` is
    another way, if one exists.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        fact = "transformers is not installed"
    else:
        if Version(found).release >= Version(MIN_TRANSFORMERS).release:
            return
        fact = f"transformers {found} is too old"
    remedy = f"run {install_command('hf')}"
    raise ArgumentError(
        fact,
        expected=f"{MIN_TRANSFORMERS} or newer, which {purpose} needs",
        remedy=remedy + ", or " + alternative if alternative else remedy,
    )
