"""Test that one background thread runs all jobs in order, and passes errors to the caller."""

import threading
import time
from concurrent.futures import CancelledError
from functools import partial

import pytest

from qwen_vit.export.background import BackgroundWriter, StageTimer
from tests.support.pipelines import load_threads


def test_jobs_behind_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with BackgroundWriter(3) as writer:
        futures = [writer.submit(partial(done.append, number), 1) for number in range(100)]
    assert done == list(range(100))
    assert all(future.done() for future in futures)
    assert load_threads() == 0


def test_the_caller_waits_while_too_much_is_undone() -> None:
    undone = most = 0
    changing = threading.Lock()

    def job() -> None:
        nonlocal undone
        time.sleep(0.001)
        with changing:
            undone -= 10

    with BackgroundWriter(50) as writer:
        for _ in range(50):
            writer.submit(job, 10)
            with changing:
                undone += 10
                most = max(most, undone)
    assert most <= 50


def test_an_exception_behind_reaches_the_caller_and_nothing_is_begun_after_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk full")

    def give() -> None:
        with BackgroundWriter(1000) as writer:
            writer.submit(partial(done.append, 1))
            failing = writer.submit(fail)
            later = writer.submit(partial(done.append, 2))
            assert isinstance(later.exception(30), CancelledError)
            assert failing.done()
            for _ in range(3):
                writer.submit(partial(done.append, 3))

    with pytest.raises(OSError, match="disk full"):
        give()
    assert done == [1]


def test_what_was_given_is_done_although_the_block_raises() -> None:
    done: list[int] = []

    def stop() -> None:
        with BackgroundWriter(10) as writer:
            for number in range(5):
                writer.submit(partial(done.append, number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert done == list(range(5))


def test_a_clock_counts_every_moment_once() -> None:
    clock, begin = StageTimer("rest"), time.perf_counter()
    with clock.stage("outer"):
        time.sleep(0.01)
        with clock.stage("inner"):
            time.sleep(0.02)
    seconds = clock.seconds()
    assert seconds["inner"] >= 0.02
    assert 0.01 <= seconds["outer"] < 0.02 + seconds["rest"] + 0.01
    assert abs(sum(seconds.values()) - (time.perf_counter() - begin)) < 0.01
