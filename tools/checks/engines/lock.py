"""Update the hashes of an engine's lock after a change of versions.

\b
    python -m tools.checks.engines.lock tools/checks/engines/vllm.txt

Each line pins a package and has the hash of one file, the wheel that pip chooses. The engines run
on CPython 3.11 and Linux x86-64. Hashes for all platforms would make a lock of 350 KB.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

HEADER = """\
# Hashes of the files for CPython 3.11 on Linux x86-64, written by tools.checks.engines.lock.
# Installed with --no-deps after torch, which has no hash: its build depends on the index.
"""


def pins(text: str) -> list[str]:
    """Return the requirements of a lock, without hashes.

    >>> pins("# a comment\\nclick==8.5.1 --hash=sha256:00\\n")
    ['click==8.5.1']
    """
    return [line.split()[0] for line in text.splitlines() if line and not line.startswith("#")]


@click.command(help=__doc__)
@click.argument("lock", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(lock: Path) -> None:
    """Ask pip for the files that it would install, and write their hashes."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, report = Path(folder, "wanted.txt"), Path(folder, "report.json")
        requirements.write_text("\n".join(pins(lock.read_text())))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        command = [*pip, "--ignore-installed", "--report", str(report), "-r", str(requirements)]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text())["install"]
    lines = []
    for item in installs:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    lock.write_text(HEADER + "".join(sorted(lines, key=str.lower)))
    click.echo(f"{lock}: {len(lines)} packages")


if __name__ == "__main__":
    main()
