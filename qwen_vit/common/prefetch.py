"""Threads around the encoder: images are loaded ahead of it, features are written behind it.

What either side holds is bounded, so memory stays flat; order and errors stay with their image.
"""

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock, current_thread
from typing import Any, Generic, Protocol, Self, TypeVar

from qwen_vit.errors import ArgumentError

__all__ = ["BackgroundWriter", "Job", "StageTimer", "thread_count", "work_ahead"]

MAX_THREADS = 16
AHEAD_BYTES = 2**27  # about seven full batches of a GPU
AHEAD_JOBS = 1_024
LOADING = "qwen-vit-load"  # how its threads are called


class _Weighs(Protocol):
    @property
    def n_bytes(self) -> int: ...


Result = TypeVar("Result", bound=_Weighs)
Value = TypeVar("Value")


def thread_count(wanted: int | None, cores: int | None = None) -> int:
    """How many threads load images: as many as wanted, else one for two cores, 2 to 16.

    >>> thread_count(3), thread_count(None, cores=16)
    (3, 8)

    `cores` are this process' own if not given. With a thread for each core the one that keeps the
    GPU busy waits for its turn in Python.
    """
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if cores is None else cores
        return min(MAX_THREADS, max(2, cores // 2), cores)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ArgumentError(f"decode_threads is {wanted!r}", expected="a whole number above 0")
    return wanted


@dataclass(frozen=True, slots=True)
class Job(Generic[Result]):
    """What to do, and the bytes that wait until it is done."""

    run: Callable[[], Result]
    n_bytes: int = 0


def work_ahead(
    jobs: Iterable[Job[Result]],
    *,
    threads: int,
    max_bytes: int = AHEAD_BYTES,
    max_jobs: int = AHEAD_JOBS,
) -> Generator[Result, None, None]:
    """The results of jobs, in order, which threads work out ahead of whoever asks for them.

    `jobs` is iterated in the caller's thread. At most `max_jobs` are under way; no job begins while
    results of `max_bytes` wait to be taken, except the one that is asked for. An exception of a
    job, or of `jobs` itself, is raised in its place, after the results before it. Closing the
    generator ends the threads: what has begun is finished, what has not is dropped. With one thread
    all is done in the caller's, and nothing ahead.
    """
    if threads == 1:
        for job in jobs:
            yield job.run()
        return
    crew: Prefetcher[Result] = Prefetcher(threads, max_bytes)
    pending: deque[Future[Result]] = deque()
    source: Iterator[Job[Result]] | None = iter(jobs)
    try:
        while True:
            # two for each one given: a source that is slow must not hold up the first results
            limit = min(max_jobs, 2 * (threads + crew.given))
            while source is not None and len(pending) < limit and crew.has_room():
                try:
                    job = next(source)
                except StopIteration:
                    source = None
                except Exception as error:  # noqa: BLE001 - raised below, in its turn
                    source = None
                    pending.append(Future())
                    pending[-1].set_exception(error)
                else:
                    pending.append(crew.do(job))
            if not pending:
                return
            result = pending.popleft().result()
            crew.take(result)
            yield result
    finally:
        crew.close()


class Prefetcher(Generic[Result]):
    """Threads that begin jobs in their order, while there is room for what comes of them.

    No thread waits for room: it goes, and whoever makes room calls it back. So a caller that never
    comes again, the process's end included, keeps nobody waiting.
    """

    def __init__(self, threads: int, max_bytes: int) -> None:
        self.given = 0  # results; the next one is asked for, or will be
        self._threads, self._most = threads, max_bytes
        self._waiting = self._done = 0  # bytes of jobs that have not ended, of results not taken
        self._undone: deque[tuple[Job[Result], Future[Result]]] = deque()
        self._at_work = 0  # threads
        self._changing = RLock()  # a generator that is left may be closed by any thread, these too
        self._pool = ThreadPoolExecutor(threads, LOADING)

    def has_room(self) -> bool:
        with self._changing:
            return self._waiting + self._done < self._most

    def do(self, job: Job[Result]) -> Future[Result]:
        future: Future[Result] = Future()
        with self._changing:
            self._waiting += job.n_bytes
            self._undone.append((job, future))
            self._call_threads()
        return future

    def take(self, result: Result) -> None:
        with self._changing:
            self._done -= result.n_bytes
            self.given += 1
            self._call_threads()

    def close(self) -> None:
        with self._changing:
            self._undone.clear()
        is_one_of_them = current_thread().name.startswith(LOADING)
        self._pool.shutdown(wait=not is_one_of_them, cancel_futures=True)

    def _may_begin(self) -> bool:
        # never False for the one that is asked for: whatever began before it has been taken
        return bool(self._undone) and self._done < self._most

    def _call_threads(self) -> None:
        if self._may_begin():
            for _ in range(min(self._threads - self._at_work, len(self._undone))):
                self._at_work += 1
                self._pool.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._changing:
                if not self._may_begin():
                    self._at_work -= 1
                    return
                job, future = self._undone.popleft()
            self._finish(job, future)

    def _finish(self, job: Job[Result], future: Future[Result]) -> None:
        n_bytes = 0
        try:
            result = job.run()
            n_bytes = result.n_bytes
            give = partial(future.set_result, result)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            give = partial(future.set_exception, error)
        with self._changing:  # before anybody can take it
            self._waiting -= job.n_bytes
            self._done += n_bytes
        give()
        del future, give  # the traceback of an exception holds this frame


class BackgroundWriter:
    """One thread that does jobs in their order, behind its caller.

    Whoever gives it more than `max_bytes` waits. A job's exception is raised by a later `do`, or at
    the end of the block, and no job after it is begun; where the block itself raises, what was
    given is still done.
    """

    def __init__(self, max_bytes: int) -> None:
        self._most = max_bytes
        self._bytes = 0
        self._undone: deque[tuple[Future[Any], int]] = deque()
        self._failed = False
        self._pool = ThreadPoolExecutor(1, "qwen-vit-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._undone:
                self._take()
        finally:
            self._pool.shutdown()

    def do(self, job: Callable[[], Value], n_bytes: int = 0) -> Future[Value]:
        """Have a job done, which holds so many bytes until then."""
        while self._undone and (self._undone[0][0].done() or self._bytes + n_bytes > self._most):
            self._take()
        future = self._pool.submit(self._run, job)
        self._undone.append((future, n_bytes))
        self._bytes += n_bytes
        return future

    def wait(self, future: Future[Value]) -> Value:
        """What a job gives; or the exception of the one before it that kept it from being done."""
        while self._undone and not (future.done() and future.exception() is None):
            self._take()
        return future.result()

    def _run(self, job: Callable[[], Value]) -> Value:
        if self._failed:
            raise CancelledError
        try:
            return job()
        except BaseException:
            self._failed = True
            raise

    def _take(self) -> None:
        future, n_bytes = self._undone.popleft()
        self._bytes -= n_bytes
        future.result()


class StageTimer:
    """How long one thread is in each stage; an inner stage's time is not the outer one's.

    >>> clock = StageTimer("rest")
    >>> with clock.stage("write"):
    ...     pass
    >>> sorted(clock.seconds())
    ['rest', 'write']
    """

    def __init__(self, stage: str) -> None:
        self._now, self._since = stage, time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is of this stage."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, seconds: float, of: str, to: str) -> None:
        """Count some of a stage's time as another's."""
        seconds = min(seconds, self._seconds[of])
        self._seconds[of] -= seconds
        self._seconds[to] += seconds

    def seconds(self) -> dict[str, float]:
        """What each stage took so far."""
        self._switch(self._now)
        return dict(self._seconds)

    def _switch(self, name: str) -> str:
        before, now = self._now, time.perf_counter()
        self._seconds[before] += now - self._since
        self._now, self._since = name, now
        return before
