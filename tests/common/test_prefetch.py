"""Test that threads prefetch results in order, in bounded memory, with errors in their places."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit.common.prefetch import Job, thread_count, work_ahead
from qwen_vit.errors import ArgumentError, ImageError
from tests.support.fake_encoder import FakeEncoder
from tests.support.pipelines import fake_export, load_threads


class Sized(NamedTuple):
    value: int
    n_bytes: int = 1


def squares(count: int) -> Iterator[Job[Sized]]:
    for number in range(count):
        yield Job(partial(Sized, number * number))


# Ahead


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order(threads: int) -> None:
    def job(number: int) -> Sized:
        time.sleep((number * 7 % 5) / 2_000)
        return Sized(number)

    jobs = (Job(partial(job, number)) for number in range(200))
    assert [each.value for each in work_ahead(jobs, threads=threads)] == list(range(200))
    assert load_threads() == 0


def test_an_exception_is_raised_after_the_results_before_it() -> None:
    def job(number: int) -> Sized:
        if number in (20, 3):
            raise ImageError(f"{number} is broken")
        return Sized(number)

    results = work_ahead((Job(partial(job, number)) for number in range(30)), threads=4)
    assert [next(results).value for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageError, match="3 is broken"):
        next(results)
    assert load_threads() == 0


def test_an_exception_of_the_source_is_raised_after_the_results_before_it() -> None:
    def source() -> Iterator[Job[Sized]]:
        yield from squares(3)
        raise RuntimeError("no more")

    results = work_ahead(source(), threads=4)
    assert [next(results).value for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="no more"):
        next(results)


def test_an_interrupt_in_the_source_is_raised_at_once() -> None:
    def source() -> Iterator[Job[Sized]]:
        yield from squares(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(work_ahead(source(), threads=4))
    assert load_threads() == 0


def test_closing_drops_jobs_that_have_not_begun() -> None:
    begun, may_end = [], threading.Event()

    def job(number: int) -> Sized:
        begun.append(number)
        if number:
            may_end.wait(30)
        return Sized(number)

    results = work_ahead((Job(partial(job, n)) for n in range(1000)), threads=2)
    assert next(results).value == 0
    threading.Timer(0.05, may_end.set).start()
    results.close()
    assert load_threads() == 0
    assert len(begun) <= 6


def test_waiting_results_are_bounded_in_bytes() -> None:
    """Results have 10 bytes, and 50 bytes may wait. Each thread may add one running job's
    result."""
    taken = waiting = most = 0
    changing = threading.Lock()

    def job(number: int) -> Sized:
        nonlocal waiting, most
        with changing:
            waiting += 10
            most = max(most, waiting)
        return Sized(number, 10)

    jobs = (Job(partial(job, number)) for number in range(300))
    for each in work_ahead(jobs, threads=3, max_bytes=50):
        assert each.value == taken
        taken += 1
        with changing:
            waiting -= 10
    assert taken == 300
    assert most <= 50 + 3 * 10 + 10


def test_waiting_jobs_are_bounded_in_bytes() -> None:
    """A caller's encoded bytes have 10 bytes each. While the first job runs, 50 bytes may wait."""
    asked, may_end = 0, threading.Event()

    def source() -> Iterator[Job[Sized]]:
        nonlocal asked
        for number in range(100):
            asked += 1
            if asked == 6:  # the source is read until the bound, while no job has begun
                may_end.set()
            yield Job(partial(wait, number), 10)

    def wait(number: int) -> Sized:
        may_end.wait(1)
        return Sized(number, 0)

    results = work_ahead(source(), threads=8, max_bytes=50)
    assert next(results).value == 0
    assert asked <= 8
    assert len(list(results)) == 99


def test_one_result_larger_than_the_bound_passes() -> None:
    jobs = (Job(partial(Sized, number, 1_000), 1_000) for number in range(20))
    assert len(list(work_ahead(jobs, threads=4, max_bytes=10))) == 20


@given(
    sizes=st.lists(st.integers(0, 100), max_size=60),
    threads=st.integers(2, 4),
    max_bytes=st.integers(1, 150),
    max_jobs=st.integers(1, 20),
)
def test_no_bound_causes_a_deadlock(
    sizes: list[int], threads: int, max_bytes: int, max_jobs: int
) -> None:
    jobs = (Job(partial(Sized, number, size), size) for number, size in enumerate(sizes))
    results = work_ahead(jobs, threads=threads, max_bytes=max_bytes, max_jobs=max_jobs)
    assert [each.value for each in results] == list(range(len(sizes)))


def test_the_source_runs_in_the_callers_thread_and_is_read_lazily() -> None:
    asked: list[threading.Thread] = []

    def source() -> Iterator[Job[Sized]]:
        while True:
            asked.append(threading.current_thread())
            yield Job(partial(Sized, 0))

    results = work_ahead(source(), threads=3, max_jobs=40)
    assert asked == []
    for count in range(1, 100):
        next(results)
        assert len(asked) <= count + 40
    assert set(asked) == {threading.current_thread()}
    results.close()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, 1_001])
def test_an_invalid_number_of_threads_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="decode_threads is"):
        thread_count(wrong)


def test_an_invalid_number_of_threads_creates_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="decode_threads is 0"):
        fake_export(tmp_path, FakeEncoder(), 2, decode_threads=0)
    assert not (tmp_path / "out").exists()


LEFT_BEHIND = """
import sys, time
from collections import namedtuple
from functools import partial
from qwen_vit.common.prefetch import Job, work_ahead

Sized = namedtuple("Sized", "value n_bytes")

def job(number):
    time.sleep(0.01)
    return Sized(number, 10)

results = work_ahead((Job(partial(job, n)) for n in range(100)), threads=2, max_bytes=30)
print([next(results).value for _ in range(10)][-1], flush=True)
time.sleep(0.3)  # until no more fits
if sys.argv[1] == "raise":
    raise KeyError
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_results_that_are_never_read_do_not_block_the_exit(end: str, code: int) -> None:
    """A name at a module's top level exists until the end, and Python joins threads before the
    end."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND, end],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "9\n"), done.stderr
