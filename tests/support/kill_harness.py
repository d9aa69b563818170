"""Kill a command with all its children at random moments, and check the state each time. The
command must be restartable, such as a download, an export or a cluster.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Process(Protocol):
    """Define a started command with the interface of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code, or None for a running command."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end. Raises `subprocess.TimeoutExpired`."""


Start = Callable[[Sequence[str], Path], Process]


@dataclass(frozen=True)
class Run:
    """Hold one run of the command. `code` is negative for a signal. `seconds` are from start to
    end."""

    code: int
    seconds: float
    errors: str  # stderr


@dataclass
class Kills:
    """Count the kills that hit the running command (`landed`), and the runs that ended by
    themselves (`completed`)."""

    landed: int = 0
    completed: int = 0
    seconds: float = 0.0


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in a separate process group, with its stderr in a file."""
    with open(log, "wb") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_restore_ctrl_c,
        )


def _restore_ctrl_c() -> None:
    """Restore the handler of Ctrl-C, because the processes of a shell's background job ignore
    Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Forked:
    """Fork this process to run a function in a separate process group. A start takes a few
    milliseconds instead of the seconds for torch's import. This process must have one thread.
    """

    def __init__(self, function: Callable[[], object], log: Path) -> None:
        assert threading.active_count() == 1, threading.enumerate()
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                _restore_ctrl_c()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors, 2)
                code = _exit_code(function)
            finally:
                os._exit(code)
        os.close(errors)
        with suppress(OSError):  # parent and child both do this, because either may run first
            os.setpgid(self.pid, self.pid)

    def poll(self) -> int | None:
        """Return the exit code, or None for a running command."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's end. Raises `subprocess.TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.002)
        return code


def _exit_code(function: Callable[[], object]) -> int:
    """Run a function as Python runs a main module."""
    try:
        function()
        code: object = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:  # noqa: BLE001 - Python also prints every exception
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def end_group(process: Process, number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to the whole group, wait for the command, and return its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.wait(timeout=60)


def run(
    command: Sequence[str], log: Path, kill_after_s: float | None = None, start: Start = start
) -> Run:
    """Start a command and wait for its end, or kill its group after some seconds."""
    begin = time.monotonic()
    process = start(command, log)
    try:
        code = process.wait(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        code = end_group(process)
    except BaseException:
        end_group(process)
        raise
    return Run(code, time.monotonic() - begin, log.read_text("utf-8", "replace"))


def kill_again_and_again(
    command: Callable[[], Sequence[str]],
    *,
    kills: int,
    longest_s: float,
    log: Path,
    seed: int,
    after_kill: Callable[[Run], None],
    after_end: Callable[[Run], None],
    start: Start = start,
) -> Kills:
    """Kill the command at random moments from 0 to `longest_s`, until `kills` kills have landed.

    After a kill, `after_kill` checks the state, and the next start continues from this state. After
    an end without a kill, `after_end` checks and removes the result, and the next start begins
    anew. The function does not kill the last start.
    """
    rng, done, begin = random.Random(seed), Kills(), time.monotonic()
    while True:
        is_last = done.landed == kills
        kill_after_s = None if is_last else rng.uniform(0, longest_s)
        result = run(command(), log, kill_after_s, start)
        if result.code == -signal.SIGKILL:
            done.landed += 1
            after_kill(result)
            continue
        done.completed += 1
        after_end(result)
        if is_last:
            done.seconds = time.monotonic() - begin
            return done
