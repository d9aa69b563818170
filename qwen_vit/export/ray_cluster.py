"""Run an export on a Ray cluster. Workers write the shards, and this process counts them.

Ray restarts dead workers, on another node if needed, and retries their tasks. A retry is safe,
because a shard exists completely or not at all, and its bytes depend only on the plan and images.
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
from threading import Condition, Lock, current_thread, main_thread
from typing import Any

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.installation import install_command
from qwen_vit.common.prefetch import thread_count
from qwen_vit.common.store_path import PathOrAddress, as_path
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError, QwenVitError, Wording
from qwen_vit.export.background import StageTimer
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.ec_cache import CacheWriter
from qwen_vit.export.estimate import Estimate, estimate_plan
from qwen_vit.export.folder import OTHER_FOLDER
from qwen_vit.export.manifest import ManifestRow, load_arrow
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import ExportPlan, open_export, remove_leftovers
from qwen_vit.export.progress import Progress
from qwen_vit.export.records import REST, STAGES, DoneShard
from qwen_vit.export.result import ExportCounts, ExportReport
from qwen_vit.export.resume import options_or_recorded
from qwen_vit.export.retry import FailingRun, may_work_now
from qwen_vit.export.run import hint_resume, load_encoder, make_manifest, warn_of_idle
from qwen_vit.export.shards import export_shards
from qwen_vit.export.stop import SAVING
from qwen_vit.export.versions import MADE_BY
from qwen_vit.export.whole_shards import whole_shard
from qwen_vit.feature_files.schema import shard_name

__all__ = ["export_on_ray"]

logger = logging.getLogger("qwen_vit")

CONNECT_TIMEOUT_S = 10.0
MAX_TASK_RETRIES = 25  # of one shard: after that many dead workers, the shard is the cause
STOP_TIMEOUT_S = 10.0  # for workers to save what they encoded
CONTROL = "control"  # a separate thread in each worker, so that `stop` need not wait for a shard
SHARDS_AT_A_TIME = 2  # per GPU: it encodes one while threads read or write the other


def export_on_ray(
    model: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]] | None,
    folder: PathOrAddress,
    options: ExportOptions | None = None,
    *,
    address: str | None = None,
    device: str = "auto",
    confirm: Callable[[Estimate], None] | None = None,
    show_progress: bool = False,
    decode_threads: int | None = None,
    ec_cache: str | os.PathLike[str] | None = None,
    **loading: Any,
) -> ExportReport:
    """Export with one worker for each GPU of a Ray cluster, or for each CPU if no GPU is used.

    >>> export_on_ray("tiny", ["tests/photographs"], "features").exported  # doctest: +SKIP
    3

    Images, checkpoint and `folder` must have the same paths on every node. Other arguments are as
    in `export_features` and `VisionEncoder.from_pretrained`.

    Args:
        decode_threads: the number of loader threads for a shard. The default depends on the CPU
            cores per GPU, and is 1 without GPUs.
        ec_cache: as in `export_features`. This process writes the encoder cache.
        address: the cluster's address. None selects the cluster in RAY_ADDRESS, otherwise a running
            local cluster, otherwise a new one.
        device: "auto", "cuda" or "cpu". "auto" selects the GPUs if the cluster has any.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(
            f"device is {short_repr(device)}", expected="'auto', 'cuda' or 'cpu' with Ray"
        )
    thread_count(decode_threads)  # raises before Ray starts a cluster
    options, waits = options_or_recorded(options, inputs, folder), dict.fromkeys(STAGES, 0.0)
    model = os.path.abspath(model) if os.path.isdir(model) else model
    load = partial(load_encoder, model, options, device=device, **loading)
    load_arrow()
    with _cluster(address):
        workers = _Workers(load, device, decode_threads)
        encoder = workers.ask("describe", options)
        path = as_path(folder, "folder").absolute()
        with open_export(encoder, inputs, path, options) as plan, hint_resume():
            counts = ExportCounts(plan.listing.current)
            if confirm is not None and not plan.has_any():
                confirm(workers.ask("estimate", plan))
            cache = None if ec_cache is None else CacheWriter(plan, ec_cache)
            breaker = CircuitBreaker(options.max_failures)
            try:
                with Progress(plan, show_progress) as progress, FailingRun(plan) as run:
                    for done in _shards(workers, plan, waits):
                        size = _size(plan, done.shard)
                        if done.n_kept == 0:
                            progress.count_shard(done.rows, size)
                        else:
                            progress.skip(len(done.rows))
                        if cache is not None:
                            cache.add(done)
                        counts.count(plan, done)
                        run.add(done)
                        for row in done.rows[done.n_kept :]:
                            breaker.count_done(_failure(row))
            except KeyboardInterrupt:
                logger.warning(SAVING)
                workers.stop()
                raise
            finally:  # also after an interrupt
                workers.end()
                remove_leftovers(plan)  # temporary files of dead workers
            return counts.report(plan, make_manifest(plan), waits)


def _shards(workers: "_Workers", plan: ExportPlan, waits: dict[str, float]) -> Iterator[DoneShard]:
    missing = []
    for shard in plan.shards:
        rows = whole_shard(plan, shard)
        if rows is None or may_work_now(plan, shard, rows):
            missing.append(shard)
        else:
            yield DoneShard(shard, rows, len(rows))
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
        return plan.folder.size(shard_name(shard))
    except FileNotFoundError:
        raise ExportError(
            "it does not exist on this machine, although a worker wrote it",
            name=str(plan.path(shard)),
            expected="a folder on a disk that all nodes of the cluster share",
            remedy=OTHER_FOLDER,
        ) from None


@dataclass(frozen=True, slots=True)
class _Description:
    """Describe an encoder of another process."""

    facts: dict[str, Any]

    def metadata(self) -> dict[str, Any]:
        return self.facts


class _Worker:
    """Run one encoder in a separate process on any node. Ray calls the methods."""

    def __init__(self, load: Callable[[], VisionEncoder], decode_threads: int | None) -> None:
        self._load, self._decode_threads = load, decode_threads
        self._loading = Lock()
        self._loaded: VisionEncoder | None = None
        self._is_stopped = False
        self._at_rest, self._running = Condition(), 0

    @property
    def _encoder(self) -> VisionEncoder:
        with self._loading:  # not in __init__, where Ray would count an error as a dead worker
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def describe(self, options: ExportOptions) -> _Description:
        RowFormat.of(self._encoder, options)  # raises for a layer that the tower lacks
        return _Description(self._encoder.metadata())

    def estimate(self, plan: ExportPlan) -> Estimate:
        return estimate_plan(self._encoder, plan)

    def export(self, plan: ExportPlan, shard: int) -> tuple[DoneShard, dict[str, float]] | None:
        """Return the written shard and the seconds that it waited for each stage, or None if `stop`
        interrupted it."""
        metadata = self._encoder.metadata()
        # the shard's bits may differ with other versions
        for name, expected in plan.made_by.items():
            if name in MADE_BY and metadata[name] != expected:
                raise ExportError(
                    f"a worker has the {'GPU' if name == 'gpu' else name} {metadata[name]}",
                    name=str(plan.folder),
                    expected=f"{expected}, as on the first worker",
                    remedy="use nodes with one kind of GPU and the same packages",
                )
        clock, plan = StageTimer(REST), plan.on_this_host()
        with self._counted():
            try:
                [done] = export_shards(
                    self._encoder, plan, [shard], decode_threads=self._decode_threads, clock=clock,
                    is_stopped=lambda: self._is_stopped,
                )  # fmt: skip
            except KeyboardInterrupt:  # from `stop`: Ray would treat it as a cancelled task
                return None
        # count an existing shard as new: a worker died after writing it, and Ray retried the task
        return done._replace(n_kept=0), clock.seconds()

    def stop(self) -> None:
        """Stop the shards, and wait up to STOP_TIMEOUT_S until their encoded images are saved."""
        self._is_stopped = True
        with self._at_rest:
            self._at_rest.wait_for(lambda: self._running == 0, STOP_TIMEOUT_S)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._at_rest:
            self._running += 1
        try:
            yield
        finally:
            with self._at_rest:
                self._running -= 1
                self._at_rest.notify_all()


class _Workers:
    """Start one worker for each GPU of the cluster, or each CPU, up to the number of shards."""

    def __init__(
        self, load: Callable[[], VisionEncoder], device: str, decode_threads: int | None
    ) -> None:
        import ray

        resources = ray.cluster_resources()
        if device == "cpu":
            resources.pop("GPU", None)
        n_gpus = int(resources.get("GPU", 0))
        if device == "cuda" and not n_gpus:
            raise ArgumentError(
                "device is 'cuda', but the Ray cluster has no GPU", remedy="use 'cpu'"
            )
        # on a CPU, two shards at a time would compete for the same cores
        self._at_a_time = SHARDS_AT_A_TIME if n_gpus else 1
        remote: Any = ray.remote  # Ray's stub has no concurrency_groups
        self._actor = remote(concurrency_groups={CONTROL: 1})(_Worker).options(
            num_cpus=1,
            num_gpus=1 if n_gpus else 0,
            max_concurrency=self._at_a_time,
            max_restarts=-1,
            max_task_retries=MAX_TASK_RETRIES,
        )
        self._arguments = load, _threads_of_a_shard(decode_threads, resources)
        self._max_workers = n_gpus or max(1, int(resources.get("CPU", 1)))
        self._actors = [self._actor.remote(*self._arguments)]

    def ask(self, method: str, *arguments: Any) -> Any:
        import ray

        with _plain_errors():
            return ray.get(getattr(self._actors[0], method).remote(*arguments))

    def export(
        self, plan: ExportPlan, shards: Sequence[int]
    ) -> Iterator[tuple[DoneShard, dict[str, float]]]:
        """Yield shards in the order in which workers finish them."""
        import ray
        from ray.util import ActorPool

        if len(shards) == len(plan.shards):  # otherwise earlier runs made some shards
            warn_of_idle(len(shards), self._max_workers, "workers")
        sent = ray.put(plan)
        while len(self._actors) < min(self._max_workers, len(shards)):
            self._actors.append(self._actor.remote(*self._arguments))
        pool = ActorPool([actor for actor in self._actors for _ in range(self._at_a_time)])
        for shard in shards:
            pool.submit(lambda actor, shard: actor.export.remote(sent, shard), shard)
        idle: Counter[Any] = Counter()
        while pool.has_next():
            with _plain_errors():
                result = pool.get_next_unordered()
            if result is not None:
                yield result
            # end an idle worker: Ray may restart a dead node's worker there
            while (actor := pool.pop_idle()) is not None:
                idle[actor] += 1
                if idle[actor] == self._at_a_time:
                    ray.kill(actor)

    def stop(self) -> None:
        import ray

        asked = [actor.stop.options(concurrency_group=CONTROL).remote() for actor in self._actors]
        ray.wait(asked, num_returns=len(asked), timeout=STOP_TIMEOUT_S)

    def end(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


def _threads_of_a_shard(wanted: int | None, resources: Mapping[str, float]) -> int:
    """Return `wanted`, or the default.

    By default, a GPU's shards in progress divide the threads for its share of the cores, with at
    least 2 each. On a CPU, the default is 1, because the encoder uses the cores.
    """
    n_gpus = int(resources.get("GPU", 0))
    if wanted is not None or not n_gpus:
        return wanted or 1
    cores = max(1, int(resources.get("CPU", 1)) // n_gpus)
    return max(2, thread_count(None, cores) // SHARDS_AT_A_TIME)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to a cluster or start a local one for the block, unless the caller has connected."""
    try:
        import ray
    except ImportError:
        raise ExportError("Ray is not installed", remedy=f"run {install_command('ray')}") from None
    if ray.is_initialized():  # our caller connected
        yield
        return
    try:
        check_reachable(named := address or os.environ.get("RAY_ADDRESS"))
        with _handlers_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:  # the port may be invalid
        raise ExportError(
            f"no Ray cluster answers at {named or 'this machine'} ({error})",
            remedy="start one with `ray start --head`, and "
            + Wording("pass its address", shell="write --ray=ADDRESS, or write --ray after INPUTS"),
        ) from None
    try:
        with redirect_stdout(sys.stderr):  # Ray prints warnings to stdout, which is for our data
            yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore the signal handlers afterwards, because Ray's handlers would end the process
    silently."""
    is_main = current_thread() is main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_reachable(address: str | None) -> None:
    """Raise OSError if HOST:PORT accepts no connection, because Ray would retry for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise qwen_vit's errors of a worker unchanged. Convert a worker's death to ExportError."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, QwenVitError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ExportError(
            f"a worker of the Ray cluster died {MAX_TASK_RETRIES + 1} times on one shard, or did "
            f"not start ({str(error).splitlines()[0]})",
            remedy="check Ray's logs and run the same command again, which keeps finished shards",
        ) from None
