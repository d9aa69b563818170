"""Run calls in separate processes, several at a time. A call may raise, die or hang."""

import multiprocessing
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

# The fork server imports the modules once, and does not use a GPU. Each call is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold a call's result, or the reason for a missing result."""

    value: Any
    problem: str | None


def _send(connection: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        outcome = Outcome(call(*arguments), None)
    except BaseException as error:  # noqa: BLE001 - the caller gets every error
        first_line = (str(error).strip() or "no message").splitlines()[0]
        outcome = Outcome(None, f"{type(error).__name__}: {first_line[:160]}")
    connection.send(outcome)
    connection.close()


def outcomes(
    call: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    at_once: int,
    seconds: float,
) -> Generator[tuple[int, Outcome]]:
    """Yield (index, outcome) of `call(*arguments[index])` in the order of completion, each within
    `seconds`."""
    waiting = list(enumerate(arguments))[::-1]
    running: dict[Connection, tuple[int, ForkServerProcess, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                index, call_arguments = waiting.pop()
                receiver, sender = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(
                    target=_send, args=(sender, call, call_arguments), daemon=True
                )
                process.start()
                sender.close()  # otherwise the pipe stays open after the process died
                running[receiver] = (index, process, time.monotonic() + seconds)
            first = min(deadline for _, _, deadline in running.values())
            ready = [
                c for c in wait(list(running), timeout=max(0.0, first - time.monotonic()))
                if isinstance(c, Connection)
            ]  # fmt: skip
            late = [c for c, (_, _, end) in running.items() if end <= time.monotonic()]
            for connection in {*ready, *late}:
                index, process, _ = running.pop(connection)
                yield index, _received(connection, process, connection in ready, seconds)
    finally:
        for connection, (_, process, _) in running.items():
            process.kill()
            process.join()
            connection.close()


def _received(
    connection: Connection, process: ForkServerProcess, is_ready: bool, seconds: float
) -> Outcome:
    try:
        if not is_ready:
            return Outcome(None, f"not finished after {seconds:g} s")
        outcome: Outcome = connection.recv()
        return outcome
    except EOFError:
        process.join()
        return Outcome(None, f"died with exit code {process.exitcode}")
    finally:
        connection.close()
        if not is_ready:
            process.kill()
        process.join()
