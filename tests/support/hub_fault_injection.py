"""Test downloads under kills, parallel processes and wrong answers. Each function runs a given
number of times and returns its counts. It raises an error for the first fault. The tests run a
small part of the counts of tools.checks.soak.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from qwen_vit.checkpoint import cache as store
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.errors import CheckpointError
from tests.support import ROOT
from tests.support.checkpoints import WIDE, write_checkpoint
from tests.support.hub_server import COMMIT, Fault, Hub, serving
from tests.support.hub_worker import hub_environment

REPO = "org/tiny"
SLOW = Fault("*.safetensors", method="GET", drip=0.01)

# The server imports qwen_vit once, and forks a process for each line {"cache", "no_locks"}. It
# writes [pid, "start", 0, "", ""] and [pid, "end", exit code, error class, message or hash].
FORK_SERVER = """
import json, logging, os, sys, threading, time
logging.basicConfig(level=logging.CRITICAL)
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
from qwen_vit import QwenVitError
from qwen_vit.checkpoint import ranges
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.checkpoint.hub import download
import huggingface_hub, huggingface_hub.file_download, huggingface_hub.hf_api

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
ranges._rest = lambda seconds, stop: time.sleep(seconds)
ranges.PART_BYTES = 300_000

def child(call):
    if call["no_locks"]:
        import fcntl
        fcntl.flock = lambda *_: None
    try:
        done = download("org/tiny", cache_dir=call["cache"])
        print(json.dumps(["", load_checkpoint(done.source.folder).weights_sha256()]), flush=True)
        os._exit(0)
    except QwenVitError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
        os._exit(3)
    except BaseException as error:
        import traceback
        print(json.dumps(["crash", traceback.format_exc()]), flush=True)
        os._exit(4)

# A fork while another thread holds stdout's lock would leave that lock held in the child.
writing_line = threading.Lock()

for line in sys.stdin:
    call = json.loads(line)
    reading, writing = os.pipe()
    with writing_line:
        pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        child(call)
    os.close(writing)

    def watch(pid=pid, reading=reading):
        with os.fdopen(reading) as pipe:
            output = pipe.read()
        _, status = os.waitpid(pid, 0)
        result = json.loads(output) if output.endswith("\\n") else ["", ""]
        code = os.waitstatus_to_exitcode(status)
        with writing_line:
            sys.stdout.write(json.dumps([pid, "end", code, *result]) + "\\n")
            sys.stdout.flush()

    with writing_line:
        sys.stdout.write(json.dumps([pid, "start", 0, "", ""]) + "\\n")
        sys.stdout.flush()
    threading.Thread(target=watch).start()
"""


class ForkServer:
    """Start downloads quickly in separate processes, and report how they ended."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.ended: dict[int, tuple[int, str, str]] = {}

    def start(self, cache: Path, *, no_locks: bool = False) -> int:
        assert self.process.stdin is not None
        call = {"cache": str(cache), "no_locks": no_locks}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        while True:
            pid, event, *rest = self._read()
            if event == "start":
                return int(pid)
            self.ended[pid] = tuple(rest)

    def wait(self, pid: int) -> tuple[int, str, str]:
        """Return the exit code (negative for a signal), the error's class, and the message or the
        hash."""
        while pid not in self.ended:
            other, _, *rest = self._read()
            self.ended[other] = tuple(rest)
        return self.ended.pop(pid)

    def _read(self) -> list[Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server died"
        result: list[Any] = json.loads(line)
        return result


@dataclass(frozen=True)
class Chaos:
    """Hold a Hub with org/tiny in two shards, its clients' fork server, and its tower's hash."""

    folder: Path
    hub: Hub
    fork_server: ForkServer
    truth: str

    def download(self, cache: Path) -> tuple[int, str, str]:
        return self.fork_server.wait(self.fork_server.start(cache))

    def check_good(self, cache: Path) -> None:
        """Check that a download succeeds after the faults end, for any state of the cache."""
        self.hub.faults = []
        code, kind, result = self.download(cache)
        assert (code, result) == (0, self.truth), (code, kind, result)


def on_a_hub(body: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Convert a function of a `Chaos` to a function of a folder, which starts the Hub."""

    def run(folder: Path, **arguments: Any) -> dict[str, Any]:
        with chaos(folder) as running:
            return body(running, **arguments)

    return run


@contextmanager
def chaos(folder: Path) -> Iterator[Chaos]:
    """Run a Hub and a fork server in `folder`."""
    write_checkpoint(folder / "repo", WIDE, shards=2)
    truth = load_checkpoint(folder / "repo").weights_sha256()
    with serving({REPO: folder / "repo"}) as hub:
        environment = hub_environment(folder / "home", hub.endpoint)
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                yield Chaos(folder, hub, ForkServer(process), truth)
            finally:
                process.kill()


def check_names(cache: Path, truth: str, *, may_be_damaged: bool = False) -> str:
    """Check that every file with a final name is complete, and summarise the existing files.

    Raises AssertionError or CheckpointError for an incomplete file. huggingface_hub gives a shard
    its final name before qwen_vit hashes it. `may_be_damaged` therefore allows damaged shards of
    huggingface_hub, after wrong answers and kills. qwen_vit must not use such a shard.
    """
    n_ours = n_shards = 0
    for folder in store.folder_of(cache, REPO, COMMIT).parent.glob("?" * 40):
        assert store.find(folder) is not None
        store.check(folder)
        assert load_checkpoint(folder).weights_sha256() == truth, folder
        n_ours += 1
    for path in cache.glob("models--*/snapshots/*/*"):
        if not path.exists():  # qwen_vit removed the damaged blob, which several commits share
            continue
        digest = store.hub_digest(path)
        assert digest is not None, path
        try:
            store.check_digest(path, digest)
        except CheckpointError:
            if not may_be_damaged:
                raise
        n_shards += path.suffix == ".safetensors"
    return f"{'kept' if n_ours else 'absent'}, {n_shards} whole shards"


def kill_at_random(chaos: Chaos, times: int, seed: int = 0) -> dict[str, Any]:
    """Kill a download at random moments, check that files with final names are complete, and
    resume."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    cache = chaos.folder / "killed"
    while (kills := found["kills"]) < times:
        chaos.hub.faults = [SLOW if kills % 3 else replace(SLOW, ignore_range=True)]
        if kills % 10 == 0:  # measure a download without a kill
            begin = time.monotonic()
            assert chaos.download(chaos.folder / "alone")[::2] == (0, chaos.truth)
            seconds = time.monotonic() - begin
            shutil.rmtree(chaos.folder / "alone")
        pid = chaos.fork_server.start(cache)
        time.sleep(rng.uniform(0, seconds))
        with suppress(ProcessLookupError):  # the download ended first
            os.kill(pid, signal.SIGKILL)
        code, kind, result = chaos.fork_server.wait(pid)
        assert code in (0, -signal.SIGKILL), (code, kind, result)
        found["kills" if code else "ended before the kill"] += 1
        found[check_names(cache, chaos.truth)] += 1
        if code == 0 or found["kills"] % 20 == 0:
            chaos.check_good(cache)
            folder = store.folder_of(cache, REPO, COMMIT).parent
            assert list(folder.glob(".*")) == [], "files of killed processes remain"
            shutil.rmtree(cache)
    chaos.check_good(cache)
    shutil.rmtree(cache)
    return tally_of(times, found)


def crowd(chaos: Chaos, times: int, processes: int = 16, seed: int = 0) -> dict[str, Any]:
    """Run many processes at once, with kills and faults, with and without locks."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    cache, most = chaos.folder / "crowd", 0.0
    for i in range(times):
        quiet, no_locks = i % 4 < 2, i % 2 == 1
        chaos.hub.faults = [] if quiet else random_faults(rng, most=40)
        chaos.hub.requests.clear()
        pids = [chaos.fork_server.start(cache, no_locks=no_locks) for _ in range(processes)]
        for pid in [] if quiet else rng.sample(pids, processes // 4):
            time.sleep(rng.uniform(0, 0.2))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            code, kind, result = chaos.fork_server.wait(pid)
            found[f"exit {code}"] += 1
            assert code in ((0,) if quiet else (0, 3, -signal.SIGKILL)), (code, kind, result)
            assert code != 0 or result == chaos.truth
        found[check_names(cache, chaos.truth, may_be_damaged=not quiet)] += 1
        if quiet and not no_locks:
            spans = sum(r.sent for r in chaos.hub.requests if r.file.endswith(".safetensors"))
            most = max(most, spans / cache_bytes(cache))
        chaos.check_good(cache)
        chaos.hub.branches[f"{REPO}@main"] = COMMIT
        shutil.rmtree(cache, ignore_errors=True)
    figures = {"processes": processes, "most_bytes_with_locks": round(most, 2)}
    return {**figures, **tally_of(times, found)}


def tally_of(times: int, found: Counter[str]) -> dict[str, Any]:
    """Return the counts and versions, for a row of the ledger."""
    versions = {name: version(name) for name in ("huggingface_hub", "safetensors", "torch")}
    return {"times": times, "found": dict(found), "versions": versions}


def cache_bytes(cache: Path) -> int:
    path = store.folder_of(cache, REPO, COMMIT) / "vision.safetensors"
    return path.stat().st_size if path.is_file() else 0


def move_branch(hub: Hub) -> None:
    """Add a new commit with the same files during a download of the last commit."""
    commit = f"{len(hub.commits):040x}"
    hub.commits[f"{REPO}@{commit}"] = hub.commits[f"{REPO}@{COMMIT}"]
    hub.branches[f"{REPO}@main"] = commit


def random_faults(rng: random.Random, most: int = 6) -> list[Fault]:
    """Return a few faults of any kind, each for some requests, in any order."""
    shards = "*.safetensors"
    kinds: list[Callable[[], Fault]] = [
        lambda: Fault(status=rng.choice((401, 403, 404, 408, 429, 500, 502, 503, 504))),
        lambda: Fault(shards, status=rng.choice((401, 403, 404, 416, 429, 500, 503))),
        lambda: Fault(status=404, code=rng.choice(("EntryNotFound", "RevisionNotFound"))),
        lambda: Fault(status=403, code="GatedRepo"),
        lambda: Fault(cut=rng.random()),
        lambda: Fault(shards, ranges=True, cut=rng.random()),
        lambda: Fault(shards, wrong_total=rng.choice((-3, 1, 1000))),
        lambda: Fault(shards, ranges=True, ignore_range=True),
        lambda: Fault(shards, ranges=True, shift=rng.choice((1, 8))),
        lambda: Fault(shards, encoding="gzip", ranges=True),
        lambda: Fault(drip=0.02),
        lambda: Fault(then=move_branch),
        lambda: Fault(shards, flip=rng.randrange(10**6), ranges=False, method="GET"),
    ]
    chosen = [
        replace(rng.choice(kinds)(), skip=rng.randrange(6), times=rng.randint(1, most))
        for _ in range(rng.randint(1, 4))
    ]
    return [*chosen, replace(SLOW, drip=0.002)]


def storm(chaos: Chaos, times: int, seed: int = 0) -> dict[str, Any]:
    """Run sequential downloads through random faults. Each must succeed or raise our own error."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    cache = chaos.folder / "storm"
    for _ in range(times):
        chaos.hub.faults, chaos.hub.redirects = random_faults(rng), rng.random() < 0.5
        described = [str(fault) for fault in chaos.hub.faults]
        code, kind, result = chaos.download(cache)
        assert code in (0, 3), (code, kind, result, described)
        assert code != 0 or result == chaos.truth, (result, described)
        found[kind or "good"] += 1
        check_names(cache, chaos.truth)
        chaos.check_good(cache)
        chaos.hub.branches[f"{REPO}@main"] = COMMIT
        shutil.rmtree(cache, ignore_errors=True)
    chaos.hub.redirects = False
    return tally_of(times, found)


def wrong_headers(chaos: Chaos, times: int, seed: int = 0) -> dict[str, Any]:
    """Change one bit of a header during the transfer. qwen_vit must reject it, or the bit must have
    no effect."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    shards = sorted((chaos.folder / "repo").glob("*.safetensors"))
    cache = chaos.folder / "headers"
    for _ in range(times):
        shard = rng.choice(shards)
        length = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        chaos.hub.faults = [Fault(f"*/{shard.name}", flip=rng.randrange(length), ranges=True)]
        code, kind, result = chaos.download(cache)
        assert code == 3 or (code, result) == (0, chaos.truth), (chaos.hub.faults, kind, result)
        found["no effect" if code == 0 else "found"] += 1
        shutil.rmtree(cache, ignore_errors=True)
    chaos.hub.faults = []
    return tally_of(times, found)


def hub_versions(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run the tests of the Hub with the oldest and the newest allowed huggingface_hub. Each version
    is in a separate folder with its requirements, which precedes the installed packages.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [allowed] = [
        r for r in map(Requirement, project["dependencies"]) if r.name == "huggingface_hub"
    ]
    [oldest] = [part.version for part in allowed.specifier if part.operator == ">="]
    results = {}
    for i, wanted in enumerate((f"huggingface_hub=={oldest}", str(allowed))):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder / str(i))]
        subprocess.run([*pip, wanted], check=True, capture_output=True)
        environment = {**os.environ, "PYTHONPATH": str(folder / str(i))}
        show = [sys.executable, "-c", "import huggingface_hub as hub; print(hub.__version__)"]
        found = subprocess.run(show, env=environment, check=True, capture_output=True, text=True)
        test = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/checkpoint",
        ]
        done = subprocess.run(
            test, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{found.stdout}: {done.stdout[-4_000:]}"
        results[found.stdout.strip()] = done.stdout.strip().splitlines()[-1].strip("= ")
    return {"results": results}
