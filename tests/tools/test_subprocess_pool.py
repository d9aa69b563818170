"""Test that a call that raises, dies or hangs does not affect other calls."""

import os
import signal
import threading

import pytest

from tests.support.subprocess_pool import Outcome, outcomes


def behave(how: str, value: int) -> int:
    if how == "raise":
        raise ValueError("first line\nsecond line")
    if how == "exit":
        os._exit(7)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        threading.Event().wait()
    return value * 2


@pytest.mark.slow
def test_a_call_that_raises_dies_or_hangs_is_reported_and_the_others_run() -> None:
    calls = [("fine", 1), ("raise", 2), ("exit", 3), ("crash", 4), ("hang", 5), ("fine", 6)]
    found = dict(outcomes(behave, calls, at_once=3, seconds=5))
    assert found == {
        0: Outcome(2, None),
        1: Outcome(None, "ValueError: first line"),
        2: Outcome(None, "died with exit code 7"),
        3: Outcome(None, "died with exit code -11"),
        4: Outcome(None, "not finished after 5 s"),
        5: Outcome(12, None),
    }


def test_closing_the_iterator_ends_all_processes() -> None:
    listening = outcomes(behave, [("fine", 1), ("hang", 2)], at_once=2, seconds=60)
    assert next(listening) == (0, Outcome(2, None))
    listening.close()  # joins the processes, and would wait forever for a live process


def test_no_calls_are_no_outcomes() -> None:
    assert list(outcomes(behave, [], at_once=2, seconds=1)) == []
