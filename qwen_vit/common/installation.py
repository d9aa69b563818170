"""Give the pip command that installs the package's extras, for the remedies of errors."""

import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qwen_vit.errors import Wording

__all__ = ["install_command", "install_remedy"]

NAME = "qwen-vit"
CHECKOUT = Path(__file__).resolve().parents[2]  # site-packages for an installed wheel


def install_command(extra: str = "") -> str:
    """Return the command that installs this package, or one of its extras, into this Python.

    >>> install_command("hf")  # doctest: +SKIP
    "pip install -e '.[hf]'"

    The command names the source of this installation (a checkout, a repository or a wheel), because
    no index has the package.
    """
    extras = f"[{extra}]" if extra else ""
    if (CHECKOUT / "pyproject.toml").is_file():
        folder = "." if _from_here(CHECKOUT) == Path() else str(CHECKOUT)
        return _pip("-e", folder + extras)
    try:
        source = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        source = {}
    address = source.get("url", "")
    parts = urlsplit(address)
    if parts.scheme == "file" and not os.path.exists(unquote(parts.path)):
        return _pip(*_packages_of(extra))
    if "vcs_info" in source:
        repository = source["vcs_info"]
        address = f"{repository['vcs']}+{address}@{repository['commit_id']}"
    return _pip(f"{NAME}{extras} @ {address}" if address else NAME + extras)


def install_remedy(extra: str) -> Wording:
    """Return the remedy for a missing extra, for an error that an export may record.

    >>> print(install_remedy("heif"))
    install the extra heif: pip install -e '.[heif]' in a checkout

    The Python wording must not depend on the machine, because export files record it.
    """
    return Wording(
        f"install the extra {extra}: pip install -e '.[{extra}]' in a checkout",
        shell=f"run {install_command(extra)}",
    )


def _pip(*arguments: str) -> str:
    """Return a command of this Python's pip, because the shell may find another Python's `pip`
    first."""
    found, python = shutil.which("pip"), Path(sys.executable)
    is_ours = found is not None and Path(found).absolute().parent == python.parent
    pip = ["pip"] if is_ours else [str(_from_here(python)), "-m", "pip"]
    return shlex.join([*pip, "install", *arguments])


def _from_here(path: Path) -> Path:
    with suppress(OSError, ValueError):  # the current folder may be deleted: raise no other error
        return path.relative_to(Path.cwd())
    return path


def _packages_of(extra: str) -> list[str]:
    from packaging.requirements import Requirement

    found = []
    for text in requires(NAME) or ():
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        if marker is not None and marker.evaluate({"extra": extra}):
            found.append(str(requirement))
    return found or [NAME]
