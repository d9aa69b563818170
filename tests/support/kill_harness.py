"""Kills a command, with all its children, at random moments, and asks each time what is left.

For any command that can be started again: a download, an export, a cluster.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One start of the command. `code` is negative for a signal; `seconds` from start to end."""

    code: int
    seconds: float
    errors: str  # what it said on stderr


@dataclass
class Kills:
    """`landed` kills met the command at work; `completed` times it ended by itself."""

    landed: int = 0
    completed: int = 0
    seconds: float = 0.0


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, its stderr in a file."""
    with open(log, "wb") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_group(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to the whole group and wait for the command; its exit code."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.wait(timeout=60)


def run(
    command: Sequence[str], log: Path, kill_after_s: float | None = None, **environment: str
) -> Run:
    """Start a command and wait for its end, or kill its group after some seconds."""
    begin = time.monotonic()
    process = start(command, log, **environment)
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
    **environment: str,
) -> Kills:
    """Kill the command at moments spread evenly from 0 to `longest_s`, until `kills` have landed.

    `after_kill` looks at what a kill left; the next start must go on from there. `after_end` looks
    at the result of a command that ended by itself, and clears it away, so that `command` begins
    anew. The last start is left to end.
    """
    moments, done, begin = random.Random(seed), Kills(), time.monotonic()
    while True:
        is_last = done.landed == kills
        moment = None if is_last else moments.uniform(0, longest_s)
        result = run(command(), log, moment, **environment)
        if result.code == -signal.SIGKILL:
            done.landed += 1
            after_kill(result)
            continue
        done.completed += 1
        after_end(result)
        if is_last:
            done.seconds = time.monotonic() - begin
            return done
