"""Run jobs in a writer thread, and time the stages of an export."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self, TypeVar

__all__ = ["BackgroundWriter", "StageTimer"]

Value = TypeVar("Value")


class BackgroundWriter:
    """Run jobs in order in one background thread.

    >>> with BackgroundWriter(max_bytes=2**20) as writer:
    ...     length = writer.submit(lambda: len("rows"), n_bytes=4)
    >>> length.result()
    4

    If the new job and the unfinished jobs would keep more than `max_bytes`, `submit` waits. After a
    job fails, no later job runs, and the next `submit` or the end of the block raises the job's
    exception. If the block itself raises, submitted jobs still run.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._unfinished: deque[tuple[Future[Any], int]] = deque()
        self._failed = False
        self._pool = ThreadPoolExecutor(1, "qwen-vit-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._unfinished:
                self._release()
        finally:
            self._pool.shutdown()

    def submit(self, job: Callable[[], Value], n_bytes: int = 0) -> Future[Value]:
        """Queue a job that keeps `n_bytes` in memory until it ends."""
        while self._unfinished and (
            self._unfinished[0][0].done() or self._bytes + n_bytes > self._max_bytes
        ):
            self._release()
        future = self._pool.submit(self._run, job)
        self._unfinished.append((future, n_bytes))
        self._bytes += n_bytes
        return future

    def wait(self, future: Future[Value]) -> Value:
        """Return a job's result, or raise the exception of that job or of an earlier job."""
        while self._unfinished and not (future.done() and future.exception() is None):
            self._release()
        return future.result()

    def _run(self, job: Callable[[], Value]) -> Value:
        if self._failed:
            raise CancelledError
        try:
            return job()
        except BaseException:
            self._failed = True
            raise

    def _release(self) -> None:
        future, n_bytes = self._unfinished.popleft()
        self._bytes -= n_bytes
        future.result()


class StageTimer:
    """Time one thread's stages. The time in an inner stage does not count for the outer stage.

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
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, seconds: float, of: str, to: str) -> None:
        seconds = min(seconds, self._seconds[of])
        self._seconds[of] -= seconds
        self._seconds[to] += seconds

    def seconds(self) -> dict[str, float]:
        self._switch(self._now)
        return dict(self._seconds)

    def _switch(self, name: str) -> str:
        before, now = self._now, time.perf_counter()
        self._seconds[before] += now - self._since
        self._now, self._since = name, now
        return before
