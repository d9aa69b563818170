"""Test that one background thread runs all jobs in order, and passes errors to the caller."""

import threading
import time
from concurrent.futures import CancelledError
from functools import partial

import pytest

from qwen_vit.export.background import BackgroundWriter, StageTimer
from tests.support.pipelines import load_threads


def test_all_background_jobs_run_in_order() -> None:
    done: list[int] = []
    with BackgroundWriter(3) as writer:
        futures = [writer.submit(partial(done.append, number), 1) for number in range(100)]
    assert done == list(range(100))
    assert all(future.done() for future in futures)
    assert load_threads() == 0


def test_submit_waits_while_the_queue_is_full() -> None:
    queued = most = 0
    changing = threading.Lock()

    def job() -> None:
        nonlocal queued
        time.sleep(0.001)
        with changing:
            queued -= 10

    with BackgroundWriter(50) as writer:
        for _ in range(50):
            writer.submit(job, 10)
            with changing:
                queued += 10
                most = max(most, queued)
    assert most <= 50


def test_a_failing_job_raises_in_the_caller_and_cancels_later_jobs() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk full")

    def submit_all() -> None:
        with BackgroundWriter(1000) as writer:
            writer.submit(partial(done.append, 1))
            failing = writer.submit(fail)
            later = writer.submit(partial(done.append, 2))
            assert isinstance(later.exception(30), CancelledError)
            assert failing.done()
            for _ in range(3):
                writer.submit(partial(done.append, 3))

    with pytest.raises(OSError, match="disk full"):
        submit_all()
    assert done == [1]


def test_submitted_jobs_run_if_the_block_raises() -> None:
    done: list[int] = []

    def stop() -> None:
        with BackgroundWriter(10) as writer:
            for number in range(5):
                writer.submit(partial(done.append, number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert done == list(range(5))


def test_a_stage_timer_counts_nested_time_once() -> None:
    timer, begin = StageTimer("rest"), time.perf_counter()
    with timer.stage("outer"):
        time.sleep(0.01)
        with timer.stage("inner"):
            time.sleep(0.02)
    seconds = timer.seconds()
    assert seconds["inner"] >= 0.02
    assert 0.01 <= seconds["outer"] < 0.02 + seconds["rest"] + 0.01
    assert abs(sum(seconds.values()) - (time.perf_counter() - begin)) < 0.01
