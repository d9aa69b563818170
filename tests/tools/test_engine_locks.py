"""Test that the engines' environments contain the packages that qwen_vit imports."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import ROOT
from tools.checks.engines.lock import pins

LOCKS = ("vllm", "sglang")


@pytest.mark.parametrize("engine", LOCKS)
def test_a_lock_has_every_dependency_of_the_package(engine: str) -> None:
    """Each package must have an accepted version. A missing new dependency once stopped every
    scenario."""
    text = (ROOT / "tools" / "checks" / "engines" / f"{engine}.txt").read_text("utf-8")
    locked = {Requirement(pin).name: Version(pin.split("==")[1]) for pin in pins(text)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = [Requirement(each) for each in project["dependencies"]]
    missing = [
        str(each)
        for each in requirements
        if each.name != "torch"  # installed before the lock
        and (each.name not in locked or not each.specifier.contains(locked[each.name]))
    ]
    assert missing == []
