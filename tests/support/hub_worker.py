"""Run a process that calls the package against the fake Hub, one call at a time. huggingface_hub
reads its environment during its import, so another environment needs another process. Kills also
need a separate process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import ROOT

# The worker reads a call {"do": ..., keyword arguments} from each line, and writes its result.
SCRIPT = """
import contextlib, importlib, io, json, logging, sys, time
import huggingface_hub
from qwen_vit import QwenVitError
from qwen_vit.cli import main as cli
from qwen_vit.checkpoint import ranges
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.checkpoint.hub import download
from qwen_vit.cli.describe import describe_download

log, waits = [], []

class Collect(logging.Handler):
    def emit(self, record):
        log.append(record.getMessage())

class Terminal(io.StringIO):
    def isatty(self):
        return True

logging.getLogger("qwen_vit").addHandler(Collect())
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
time.sleep = waits.append  # between attempts of huggingface_hub
ranges._rest = lambda seconds, stop: waits.append(seconds)  # between attempts of qwen_vit

def run(do, **call):
    if "part_bytes" in call:
        ranges.PART_BYTES = call.pop("part_bytes")
    if call.pop("no_locks", False):
        import fcntl
        fcntl.flock = lambda *_: None
    if do == "whole":  # a download by huggingface_hub alone
        return {"path": huggingface_hub.hf_hub_download(**call)}
    if do == "command":
        out, err = io.StringIO(), Terminal() if call.get("terminal") else io.StringIO()
        sys.argv, code = ["qwen-vit", *call["arguments"]], 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code
        return {"out": out.getvalue(), "err": err.getvalue(), "code": code}
    done = download(**call)
    folder = done.source.folder
    return {**describe_download(done), "files": sorted(path.name for path in folder.iterdir()),
            "weights": load_checkpoint(folder).weights_sha256() if do == "load" else None}

print(json.dumps({"version": huggingface_hub.__version__}), flush=True)
for line in sys.stdin:
    log.clear(), waits.clear()
    try:
        result = run(**json.loads(line))
    except QwenVitError as error:
        result = {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps({**result, "log": list(log), "waits": list(waits)}), flush=True)
"""


class Worker:
    """Hold a running worker."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.version = self._read()["version"]

    def __call__(self, do: str, **call: Any) -> dict[str, Any]:
        """Return a call's result. If the worker died, raise an error with its output."""
        self.start(do, **call)
        return self._read()

    def start(self, do: str, **call: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **call}, default=str) + "\n")
        self.process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, stderr = self.process.communicate()
            raise AssertionError(f"the worker died ({self.process.returncode}): {stderr}")
        result: dict[str, Any] = json.loads(line)
        return result


def hub_environment(home: Path, endpoint: str) -> dict[str, str]:
    """Return the environment of a process that has access to only this Hub."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "OMP_NUM_THREADS": "1"}


@contextmanager
def running_worker(
    home: Path, endpoint: str, *, start: Sequence[str] = (), **variables: str
) -> Iterator[Worker]:
    """Start a worker with only this Hub, cache and token. `start` is the command."""
    environment = hub_environment(home, endpoint) | variables
    with subprocess.Popen(
        [*start, sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()
