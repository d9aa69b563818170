"""Search for published vulnerabilities of the packages in tools/requirements.txt, with pip-audit.

\b
    pip install pip-audit
    python -m tools.audit

It exits with 0 if it checked each package and found no vulnerability. It exits with 1 for a
vulnerable package, and with 2 for an unchecked package. Without an answer of its service, pip-audit
itself skips the packages and exits with 0.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VULNERABLE, NOT_CHECKED = 1, 2


@click.command(help=__doc__)
def main() -> None:
    """Run pip-audit, and print the vulnerable and the unchecked packages."""
    command = shutil.which("pip-audit")
    if command is None:
        click.echo("Nothing was checked: pip-audit is missing. Run pip install pip-audit.")
        sys.exit(NOT_CHECKED)
    done = subprocess.run(
        [
            *(command, "--requirement", str(REQUIREMENTS), "--require-hashes", "--disable-pip"),
            *("--format", "json", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        click.echo(done.stderr[-2_000:], err=True)
        click.echo("Nothing was checked: pip-audit gave no result.")
        sys.exit(NOT_CHECKED)
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    vulnerable = [each for each in packages if each.get("vulns")]
    for each in vulnerable:
        found = ", ".join(vulnerability["id"] for vulnerability in each["vulns"])
        click.echo(f"{each['name']} {each['version']}: {found}")
    click.echo(
        f"{len(packages) - len(skipped)} of {len(packages)} packages checked, "
        f"{len(vulnerable)} vulnerable."
    )
    if skipped:
        click.echo(f"Not checked, because the service has no data on them: {', '.join(skipped)}.")
    sys.exit(VULNERABLE if vulnerable else NOT_CHECKED if skipped or not packages else 0)


if __name__ == "__main__":
    main()
