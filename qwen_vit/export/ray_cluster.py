"""The same export on a Ray cluster: workers make its shards, and this process keeps its books.

Ray places the workers, starts dead ones again, elsewhere if their node is gone, and repeats what
they were at. What makes that safe is the export's own: a shard is there whole or not at all, and
its bytes follow from the plan, whoever makes it and however often.
"""

import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, current_thread, main_thread
from typing import Any

import torch

from qwen_vit.common.prefetch import StageTimer, thread_count
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError, QwenVitError
from qwen_vit.export.estimate import Estimate, estimate_plan
from qwen_vit.export.manifest import ManifestRow, load_arrow
from qwen_vit.export.plan import ExportOptions, ExportPlan, open_export, remove_leftovers
from qwen_vit.export.run import (
    ExportCounts,
    ExportReport,
    Progress,
    load_encoder,
    make_manifest,
    warn_of_idle,
)
from qwen_vit.export.shards import (
    REST,
    STAGES,
    CircuitBreaker,
    DoneShard,
    export_shards,
    whole_shard,
)

__all__ = ["export_on_ray"]


KNOCK_S = 10.0  # how long a cluster's address may take to answer
MAX_TASK_RETRIES = 25  # of workers at one shard: then it is the shard that kills them
SHARDS_AT_A_TIME = 2  # of a GPU: one is encoded while the other one's images are read, or written


def export_on_ray(
    model: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    address: str | None = None,
    device: str = "auto",
    confirm: Callable[[Estimate], None] | None = None,
    show_progress: bool = False,
    decode_threads: int | None = None,
    **loading: Any,
) -> ExportReport:
    """As `export_features`, by one worker for each GPU of a Ray cluster, or CPU if it has no GPU.

    >>> export_on_ray("tiny", ["tests/images"], "features").exported  # doctest: +SKIP
    3

    `address` is the cluster's, None for the one of RAY_ADDRESS or of this machine; where there is
    none, one begins here, with all that this machine has. Images, checkpoint and `folder` must be
    found under the same paths on every node. `loading` goes to `VisionEncoder.from_pretrained`.
    Raises as `export_features` does, and ExportError where the cluster cannot be reached.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}, expected 'auto', 'cuda' or 'cpu' with Ray")
    thread_count(decode_threads)  # refuses what makes no sense, before a cluster is begun
    options, tally, waits = options or ExportOptions(), ExportCounts(), dict.fromkeys(STAGES, 0.0)
    model = os.path.abspath(model) if os.path.isdir(model) else model
    load = partial(load_encoder, model, options, device=device, **loading)
    load_arrow()
    with _cluster(address):
        workers = _Workers(load, device, decode_threads)
        encoder = workers.ask("describe")
        with open_export(encoder, inputs, Path(folder).absolute(), options) as plan:
            if confirm is not None and not any(plan.path(shard).exists() for shard in plan.shards):
                confirm(workers.ask("estimate", plan))
            breaker = CircuitBreaker(options.max_failures)
            try:
                with Progress(plan, show_progress) as progress:
                    for done in _shards(workers, plan, waits):
                        size = _size(plan, done.shard)
                        if done.is_new:
                            progress.count_shard(done.rows, size)
                        else:
                            progress.skip(len(done.rows))
                        tally.count(plan, done)
                        for row in done.rows if done.is_new else ():
                            breaker.count_done(_failure(row))
            finally:  # interrupted, too
                workers.end()
                remove_leftovers(plan)  # what dead workers left
            return tally.report(plan, make_manifest(plan), waits)


def _shards(workers: "_Workers", plan: ExportPlan, waits: dict[str, float]) -> Iterator[DoneShard]:
    missing = []
    for shard in plan.shards:
        rows = whole_shard(plan, shard)
        if rows is None:
            missing.append(shard)
        else:
            yield DoneShard(shard, rows, is_new=False)
    for done, seconds in workers.export(plan, missing):
        for stage, waited_s in seconds.items():
            waits[stage] += waited_s
        yield done


def _failure(row: ManifestRow) -> ImageError | None:
    if row.status == "ok":
        return None
    return ImageError(str(row.error_message), code=str(row.error_code))


def _size(plan: ExportPlan, shard: int) -> int:
    try:
        return plan.path(shard).stat().st_size
    except FileNotFoundError:
        raise ExportError(
            f"{plan.path(shard)} is not here, though a worker wrote it, expected a folder on a "
            "disk that all nodes of the cluster share; pass another --out"
        ) from None


@dataclass(frozen=True, slots=True)
class _Description:
    """An encoder that is elsewhere."""

    device: torch.device
    facts: dict[str, Any]

    def metadata(self) -> dict[str, Any]:
        return self.facts


class _Worker:
    """One encoder, in a process of its own on some node; Ray calls it."""

    def __init__(self, load: Callable[[], VisionEncoder], decode_threads: int | None) -> None:
        self._load, self._decode_threads = load, decode_threads
        self._loading = Lock()
        self._loaded: VisionEncoder | None = None

    @property
    def _encoder(self) -> VisionEncoder:
        with self._loading:  # later than the worker itself, so that an error goes to who asked
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def describe(self) -> _Description:
        return _Description(self._encoder.device, self._encoder.metadata())

    def estimate(self, plan: ExportPlan) -> Estimate:
        return estimate_plan(self._encoder, plan)

    def export(self, plan: ExportPlan, shard: int) -> tuple[DoneShard, dict[str, float]]:
        """Make one shard; its rows come back, its features are on the disk."""
        clock = StageTimer(REST)
        [done] = export_shards(
            self._encoder, plan, [shard], decode_threads=self._decode_threads, clock=clock
        )
        # a worker that died after it had written the shard: Ray asks the next one
        return done._replace(is_new=True), clock.seconds()


class _Workers:
    """As many workers as the cluster has GPUs, or CPUs, but no more than there are shards."""

    def __init__(
        self, load: Callable[[], VisionEncoder], device: str, decode_threads: int | None
    ) -> None:
        import ray

        resources = ray.cluster_resources()
        if device == "cpu":
            resources.pop("GPU", None)
        n_gpus = int(resources.get("GPU", 0))
        if device == "cuda" and not n_gpus:
            raise ArgumentError("device is 'cuda', but the Ray cluster has no GPU; use 'cpu'")
        # an interpreted encoder cannot run in two threads
        self._at_a_time = SHARDS_AT_A_TIME if n_gpus else 1
        self._actor = ray.remote(_Worker).options(
            num_cpus=1,
            num_gpus=1 if n_gpus else 0,
            max_concurrency=self._at_a_time,
            max_restarts=-1,
            max_task_retries=MAX_TASK_RETRIES,
        )
        self._arguments = load, _threads_of_a_shard(decode_threads, resources)
        self._most = n_gpus or max(1, int(resources.get("CPU", 1)))
        self._actors = [self._actor.remote(*self._arguments)]

    def ask(self, method: str, *arguments: Any) -> Any:
        """What one worker answers."""
        import ray

        with _plain_errors():
            return ray.get(getattr(self._actors[0], method).remote(*arguments))

    def export(
        self, plan: ExportPlan, shards: Sequence[int]
    ) -> Iterator[tuple[DoneShard, dict[str, float]]]:
        """Shards in the order in which they are done."""
        import ray
        from ray.util import ActorPool

        if len(shards) == len(plan.shards):  # else some were there before
            warn_of_idle(len(shards), self._most, "workers")
        sent = ray.put(plan)
        while len(self._actors) < min(self._most, len(shards)):
            self._actors.append(self._actor.remote(*self._arguments))
        pool = ActorPool([actor for actor in self._actors for _ in range(self._at_a_time)])
        for shard in shards:
            pool.submit(lambda actor, shard: actor.export.remote(sent, shard), shard)
        idle: Counter[Any] = Counter()
        while pool.has_next():
            with _plain_errors():
                result = pool.get_next_unordered()
            yield result
            # who has nothing left to do makes room: a dead node's worker may begin anew there
            while (actor := pool.pop_idle()) is not None:
                idle[actor] += 1
                if idle[actor] == self._at_a_time:
                    ray.kill(actor)

    def end(self) -> None:
        """At once; one that has ended already is no matter."""
        import ray

        for actor in self._actors:
            ray.kill(actor)  # type: ignore[arg-type]


def _threads_of_a_shard(wanted: int | None, resources: Mapping[str, float]) -> int:
    """A GPU's share of the cores is for its worker, whose shards share them again.

    An encoder on a CPU does not wait for its images, and wants the cores itself.
    """
    n_gpus = int(resources.get("GPU", 0))
    if wanted is not None:
        return wanted
    if not n_gpus:
        return 1
    cores = max(1, int(resources.get("CPU", 1)) // n_gpus)
    return max(2, thread_count(None, cores) // SHARDS_AT_A_TIME)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster while the block runs; its workers end with it."""
    try:
        import ray
    except ImportError:
        raise ExportError(
            "--ray needs Ray, which is not installed; pip install 'qwen-vit[ray]'"
        ) from None
    if ray.is_initialized():  # by whoever calls us
        yield
        return
    try:
        check_reachable(address or os.environ.get("RAY_ADDRESS"))
        with _handlers_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:  # a port may be no port
        raise ExportError(
            f"no Ray cluster answers at {address or 'RAY_ADDRESS'} ({error}); start one with "
            "`ray start --head`, and write --ray=ADDRESS, or --ray last"
        ) from None
    try:
        with redirect_stdout(sys.stderr):  # Ray prints warnings where our data goes
            yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes signals for itself, and would end the process without a word."""
    is_main = current_thread() is main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_reachable(address: str | None) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would ask again for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A worker's own errors as they were raised there, and Ray's with what to do."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, QwenVitError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ExportError(
            f"a worker of the Ray cluster died {MAX_TASK_RETRIES + 1} times at one shard, or "
            "could not be "
            f"started ({str(error).splitlines()[0]}); whole shards are kept: look at Ray's logs, "
            "and run the same command again"
        ) from None
