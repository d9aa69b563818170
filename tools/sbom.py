"""Write a software bill of materials (CycloneDX 1.6) with the package's requirements and licences.

\b
    python -m tools.sbom > sbom.json
    python -m tools.sbom --extra show --extra arrow --licences

It lists the package and all direct and indirect requirements in this environment.
"""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "qwen-vit"
LICENCE_CLASSIFIER = "License :: OSI Approved :: "


@click.command(help=__doc__)
@click.option(
    "--extra", "extras", multiple=True, help="Include the requirements of this extra. Repeatable."
)
@click.option("--licences", is_flag=True, help="Print one line per package instead.")
def main(extras: tuple[str, ...], licences: bool) -> None:
    """Print the document, or the table."""
    needed = closure(PACKAGE, extras)
    if licences:
        for name in sorted(needed):
            click.echo(f"{name} {distribution(name).version}: {licence(name)}")
        return
    click.echo(json.dumps(document(needed), indent=1))


def closure(package: str, extras: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the direct requirements of a package and of all installed packages that it needs.

    Raises click.ClickException for a requirement that is not installed.
    """
    needed: dict[str, list[str]] = {}
    waiting = [(canonicalize_name(package), extras)]
    while waiting:
        name, wanted = waiting.pop()
        own = needed.setdefault(name, [])
        for requirement in _requirements(name, wanted):
            other = canonicalize_name(requirement.name)
            if other not in own:
                own.append(other)
            if other not in needed or requirement.extras:
                waiting.append((other, tuple(requirement.extras)))
            needed.setdefault(other, [])
    return {name: sorted(own) for name, own in needed.items()}


def _requirements(name: str, extras: tuple[str, ...]) -> Iterator[Requirement]:
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:
        raise click.ClickException(f"{name} is not installed; run ./tools/install first") from None
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def licence(name: str) -> str:
    """Return a package's licence from its metadata, or "unknown" without a licence."""
    metadata = distribution(name).metadata
    expression = _first(metadata.get_all("License-Expression"))
    classified = [
        each.removeprefix(LICENCE_CLASSIFIER)
        for each in metadata.get_all("Classifier") or []
        if each.startswith(LICENCE_CLASSIFIER)
    ]
    text = _first(metadata.get_all("License")).strip().partition("\n")[0]
    return expression or " AND ".join(classified) or text or "unknown"


def _first(values: list[str] | None) -> str:
    return values[0] if values else ""


def document(needed: dict[str, list[str]]) -> dict[str, Any]:
    """Return the bill of materials of a package and its requirements."""
    components = {name: _component(name) for name in sorted(needed)}
    own = components.pop(PACKAGE)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": [*components.values()],
        "dependencies": [
            {"ref": _purl(name), "dependsOn": [_purl(other) for other in others]}
            for name, others in sorted(needed.items())
        ],
    }


def _component(name: str) -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": _purl(name),
        "name": name,
        "version": distribution(name).version,
        "purl": _purl(name),
        "licenses": [{"license": {"name": licence(name)}}],
    }


def _purl(name: str) -> str:
    return f"pkg:pypi/{name}@{distribution(name).version}"


if __name__ == "__main__":
    main()
