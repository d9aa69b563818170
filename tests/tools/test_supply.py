"""Test the pins with hashes, the bill of materials, and reproducible builds."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT
from tools import audit, sbom

PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "tools" / name).read_text("utf-8")
    return {canonicalize_name(package): version for package, version in PIN.findall(text)}


def test_every_requirement_has_hashes_and_the_pin_of_the_tests() -> None:
    hashed, tested = pins("requirements.txt"), pins("constraints.txt")
    assert {name: tested[name] for name in hashed.keys() & tested.keys()} == {
        name: hashed[name] for name in hashed.keys() & tested.keys()
    }
    text = (ROOT / "tools" / "requirements.txt").read_text("utf-8")
    blocks = re.split(r"\n(?=[a-z])", text)
    unhashed = [
        b[:40] for b in blocks if "==" in b.partition("\n")[0] and "--hash=sha256:" not in b
    ]
    assert unhashed == []
    for requirement in map(Requirement, PROJECT["dependencies"]):
        version = hashed[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_the_bill_of_materials_names_every_requirement() -> None:
    done = CliRunner().invoke(sbom.main, [], catch_exceptions=False)
    document = json.loads(done.output)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "qwen-vit"
    named = {component["name"]: component for component in document["components"]}
    needed = {canonicalize_name(Requirement(each).name) for each in PROJECT["dependencies"]}
    assert needed <= named.keys() | {"simplejpeg"}
    assert all(component["licenses"][0]["license"]["name"] for component in named.values())
    references = {document["metadata"]["component"]["bom-ref"]}
    references |= {component["bom-ref"] for component in named.values()}
    for entry in document["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= references
    table = CliRunner().invoke(sbom.main, ["--licences"], catch_exceptions=False)
    assert "pillow" in table.output


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    """Build from copies in other folders, whose files have other times."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.split(b"\0")
    digests = []
    for place in ("one", "two"):
        for name in filter(None, map(bytes.decode, files)):
            target = tmp_path / place / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        out = tmp_path / place / "out"
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
        subprocess.run(
            build, cwd=tmp_path / place / "source", capture_output=True, check=True, timeout=240
        )
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
        )
    assert digests[0] == digests[1]
    assert {Path(name).suffix for name in digests[0]} == {".whl", ".gz"}


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "1 of 1 packages"),
        (
            '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}]}',
            1, "a 1: CVE-1",
        ),
        (
            '{"dependencies": [{"name": "a", "skip_reason": "Dependency not found"}]}',
            2, "Not checked, because the service has no data on them: a.",
        ),
        ('{"dependencies": []}', 2, "0 of 0"),
        ("", 2, "Nothing was checked"),
    ],
    ids=["clean", "vulnerable", "skipped", "empty", "no answer"],
)  # fmt: skip
def test_an_audit_that_checked_nothing_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, code: int, words: str
) -> None:
    """pip-audit itself skips each package without an answer of its service, and exits with 0."""
    (tmp_path / "pip-audit").write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    (tmp_path / "pip-audit").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = CliRunner().invoke(audit.main, [])
    assert done.exit_code == code
    assert words in done.output


def test_an_audit_without_pip_audit_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = CliRunner().invoke(audit.main, [])
    assert done.exit_code == 2
    assert "pip install pip-audit" in done.output
