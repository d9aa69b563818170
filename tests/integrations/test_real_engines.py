"""Test the real engines, if an environment of the current lock exists.

`python -m tools.checks.engines vllm` and `... sglang` build an environment (minutes, 3 GB) and run
every scenario. These tests build no environment. Each test runs one scenario with our tower, or
skips.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tools.checks.engines import environment, sglang_checks, vllm_checks
from tools.checks.engines.environment import STAMP, Recipe, default_folder, is_complete

RUN_S = 280  # a scenario takes 25 to 60 s on two idle cores


def environment_of(recipe: Recipe) -> Path:
    """Return the folder of an engine's environment. Skip the test if it is missing or outdated."""
    folder = default_folder(recipe)
    if not is_complete(folder, recipe):
        pytest.skip(
            f"{recipe.name} is not installed in {folder}; "
            f"`python -m tools.checks.engines {recipe.name}` installs it and runs every scenario"
        )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 20)
@pytest.mark.parametrize(
    ("recipe", "scenario"),
    [
        pytest.param(vllm_checks.RECIPE, "plugin-offline", id="vllm"),
        pytest.param(sglang_checks.RECIPE, "tower-without-cache", id="sglang"),
    ],
)
def test_an_engine_with_our_tower_answers_as_transformers(recipe: Recipe, scenario: str) -> None:
    """Compare in float64, with the tower that the check names."""
    folder = environment_of(recipe)
    command = [sys.executable, "-m", "tools.checks.engines", recipe.name, "--env", str(folder)]
    done = subprocess.run(
        [*command, "--only", scenario, "--json"], cwd=ROOT, capture_output=True, text=True,
        timeout=RUN_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert row["scenarios"] == [scenario]
    assert row["build_s"] == 0
    ours = [line for line in row["results"] if line["tokens"] and not line["must_differ"]]
    assert ours
    assert all(line["passed"] for line in row["results"])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe that searches its environments in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lock = tmp_path / "lock.txt"
    lock.write_text("click==8.5.1 --hash=sha256:00\n")
    return Recipe(name="vllm", lock=lock, torch="2.13.0", variables={})


def install(recipe: Recipe, digest: str) -> Path:
    """Mark an empty folder as an environment that was built from a recipe of this digest."""
    folder = default_folder(recipe)
    folder.mkdir(parents=True)
    (folder / STAMP).write_text(digest + "\n")
    return folder


def test_only_an_environment_of_the_present_lock_is_run(recipe: Recipe) -> None:
    folder = install(recipe, recipe.digest)
    assert environment_of(recipe) == folder
    recipe.lock.write_text("click==8.5.2 --hash=sha256:00\n")
    with pytest.raises(pytest.skip.Exception, match=r"tools\.checks\.engines vllm"):
        environment_of(recipe)
    assert not is_complete(folder, recipe)


@pytest.mark.parametrize("state", ["missing", "half built", "of another lock"])
def test_a_missing_environment_is_named_and_never_built(
    state: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "prepare", lambda *_: pytest.fail("built"))
    if state == "half built":
        default_folder(recipe).mkdir(parents=True)
    elif state == "of another lock":
        install(recipe, "0" * 64)
    with pytest.raises(pytest.skip.Exception, match="is not installed in") as skipped:
        environment_of(recipe)
    assert str(default_folder(recipe)) in str(skipped.value)
