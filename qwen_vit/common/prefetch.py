"""Prefetch results in order with loader threads, in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import RLock, current_thread
from typing import Generic, Protocol, TypeVar

from qwen_vit.common.arguments import short_repr
from qwen_vit.errors import ArgumentError, with_options

__all__ = ["Job", "Prefetcher", "core_count", "thread_count", "work_ahead"]

MAX_THREADS = 16  # by default
MAX_WANTED_THREADS = 1_000  # which a caller may want
AHEAD_BYTES = 2**27  # about seven full batches of patches on a GPU
AHEAD_JOBS = 1_024
THREAD_NAME = "qwen-vit-load"


class _Weighs(Protocol):
    @property
    def n_bytes(self) -> int: ...


Result = TypeVar("Result", bound=_Weighs)


def core_count() -> int:
    return len(os.sched_getaffinity(0))


def thread_count(wanted: int | None, cores: int | None = None) -> int:
    """Return the number of loader threads: `wanted`, or one per two cores, at least 2 and at most
    16. On a single core, the default is 1.

    >>> thread_count(3), thread_count(None, cores=16), thread_count(None, cores=1)
    (3, 8, 1)

    All threads share the GIL, so more threads would slow the thread that submits GPU work.
    """
    if wanted is None:
        cores = core_count() if cores is None else cores
        return min(MAX_THREADS, max(2, cores // 2), cores)
    if (
        isinstance(wanted, bool)
        or not isinstance(wanted, int)
        or not 1 <= wanted <= MAX_WANTED_THREADS
    ):
        raise ArgumentError(
            with_options("{} is {wanted}", "decode_threads", wanted=short_repr(wanted)),
            expected=f"a whole number from 1 to {MAX_WANTED_THREADS:,}",
        )
    return wanted


@dataclass(frozen=True, slots=True)
class Job(Generic[Result]):
    """Describe a call that computes one result, and the bytes that the call keeps until its end.

    After delivery, the same thread calls `then` with the result, and with a function that returns
    whether the caller has stopped taking results. `then` must not raise an error. With one thread,
    `then` does not run, and the caller itself does the remaining work.
    """

    run: Callable[[], Result]
    n_bytes: int = 0
    then: Callable[[Result, Callable[[], bool]], None] | None = None


def work_ahead(
    jobs: Iterable[Job[Result]],
    *,
    threads: int,
    max_bytes: int = AHEAD_BYTES,
    max_jobs: int = AHEAD_JOBS,
) -> Generator[Result, None, None]:
    """Yield the results of jobs in order, while threads compute ahead of the caller.

    The function iterates over `jobs` in the caller's thread. At most `max_jobs` jobs are in
    progress. While finished results occupy `max_bytes`, only the job whose result the caller needs
    next may start. If a job or `jobs` itself raises an exception, the function first yields the
    earlier results, and then raises this exception. Closing the generator ends the threads, which
    finish running jobs and drop the others. With `threads=1`, all jobs run in the caller's thread.
    """
    if threads == 1:
        for job in jobs:
            yield job.run()
        return
    prefetcher: Prefetcher[Result] = Prefetcher(threads, max_bytes)
    pending: deque[Future[Result]] = deque()
    source: Iterator[Job[Result]] | None = iter(jobs)
    try:
        while True:
            # two queued jobs per delivered result: a slow source must not delay the first results
            limit = min(max_jobs, 2 * (threads + prefetcher.delivered))
            while source is not None and len(pending) < limit and prefetcher.has_room():
                try:
                    job = next(source)
                except StopIteration:
                    source = None
                except Exception as error:  # noqa: BLE001 - raised below, in order
                    source = None
                    pending.append(Future())
                    pending[-1].set_exception(error)
                else:
                    pending.append(prefetcher.submit(job))
            if not pending:
                return
            result = pending.popleft().result()
            prefetcher.release(result)
            yield result
    finally:
        prefetcher.close()


class Prefetcher(Generic[Result]):
    """Start jobs in order in threads while undelivered results take less than `max_bytes`.

    A worker ends when the buffer is full, and the prefetcher starts workers again when the caller
    takes results. A waiting worker would keep the process alive after the caller stops taking
    results.
    """

    def __init__(self, threads: int, max_bytes: int) -> None:
        self.delivered = 0  # results that the caller has taken
        self._threads, self._max_bytes = threads, max_bytes
        self._job_bytes = self._result_bytes = 0  # of unfinished jobs, and of undelivered results
        self._queue: deque[tuple[Job[Result], Future[Result]]] = deque()
        self._workers = 0
        self._is_closed = False
        self._lock = RLock()  # any thread, even a worker, may close an abandoned generator
        self._pool = ThreadPoolExecutor(threads, THREAD_NAME)

    def has_room(self) -> bool:
        with self._lock:
            return self._job_bytes + self._result_bytes < self._max_bytes

    def submit(self, job: Job[Result]) -> Future[Result]:
        future: Future[Result] = Future()
        with self._lock:
            self._job_bytes += job.n_bytes
            self._queue.append((job, future))
            self._start_workers()
        return future

    def release(self, result: Result) -> None:
        with self._lock:
            self._result_bytes -= result.n_bytes
            self.delivered += 1
            self._start_workers()

    def close(self) -> None:
        """Drop jobs that have not started. Wait for the running jobs, except in a loader thread."""
        self._is_closed = True
        with self._lock:
            self._queue.clear()
        is_worker = current_thread().name.startswith(THREAD_NAME)  # a thread cannot wait for itself
        self._pool.shutdown(wait=not is_worker, cancel_futures=True)

    def _may_start(self) -> bool:
        # always True for the job that the caller waits for: all earlier results are delivered
        return bool(self._queue) and self._result_bytes < self._max_bytes

    def _start_workers(self) -> None:
        if self._may_start():
            for _ in range(min(self._threads - self._workers, len(self._queue))):
                self._workers += 1
                self._pool.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._may_start():
                    self._workers -= 1
                    return
                job, future = self._queue.popleft()
            self._finish(job, future)

    def _finish(self, job: Job[Result], future: Future[Result]) -> None:
        n_bytes = 0
        then: Callable[[], None] | None = None
        try:
            result = job.run()
            n_bytes = result.n_bytes
            deliver = partial(future.set_result, result)
            if job.then is not None:
                then = partial(job.then, result, lambda: self._is_closed)
            del result
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            deliver = partial(future.set_exception, error)
        with self._lock:  # before the caller can release it
            self._job_bytes -= job.n_bytes
            self._result_bytes += n_bytes
        deliver()
        del future, deliver  # the traceback of an exception keeps this frame
        if then is not None:
            then()
