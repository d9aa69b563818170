"""Test that each trial of `tools.checks.soak` names a function that accepts its counts."""

import inspect

import click
import pytest

from tools.checks import soak
from tools.checks.soak import TRIALS


@pytest.mark.parametrize("name", TRIALS)
def test_a_trial_names_a_function_that_takes_its_counts(name: str) -> None:
    trial = TRIALS[name]
    assert callable(trial.load())
    parameters = inspect.signature(soak.in_support(trial.run)).parameters
    own = {*trial.counts, *trial.fixed} - ({"images"} if trial.setting == soak.EXPORT else set())
    assert own <= {*parameters}
    assert not trial.has_seed or "seed" in parameters


def test_only_exports_fork() -> None:
    with pytest.raises(click.UsageError, match="hub-kills cannot fork"):
        soak.run("hub-kills", 1, 0, {}, fork=True)
    assert TRIALS["kills"].may_fork
    assert TRIALS["memory-edges"].may_fork
