"""Provide a scenario's environment, working folder and correct answers."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.checks.engines.answers import Answers, Result, compare, load_answers
from tools.checks.engines.environment import Environment

CHILD_S = 400.0  # an engine that loses a request waits forever


@dataclass(frozen=True, slots=True)
class Context:
    """Hold the data that all scenarios of an engine share."""

    environment: Environment
    work: Path  # model/, answers/, facts/, logs/
    reference: Answers

    def run_child(self, module: str, scenario: str, name: str, **variables: str | None) -> None:
        """Run `module SCENARIO NAME WORK` in the engine's environment.

        The child writes answers to answers/NAME/WAY.safetensors, and other facts to
        facts/NAME.json.

        Raises:
            RuntimeError: The child failed, or took longer than CHILD_S. The error has the end of
                the log.
        """
        command = [str(self.environment.python), "-m", module, scenario, name, str(self.work)]
        log = self.log(name)
        (self.work / "answers" / name).mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, cwd=self.work, env=self.environment.variables(**variables), stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(CHILD_S)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_session(process)
        if code != 0:
            what = f"no end after {CHILD_S:.0f} s" if code is None else f"exit code {code}"
            raise RuntimeError(f"{what}, see {log}:\n{tail(log)}")

    def log(self, name: str) -> Path:
        """Return the log path of a process of this name."""
        return self.work / "logs" / f"{name}.log"

    def facts(self, name: str) -> dict[str, Any]:
        """Return the facts that a child of this name wrote, besides answers."""
        found: dict[str, Any] = json.loads((self.work / "facts" / f"{name}.json").read_text())
        return found

    def answers(self, name: str, way: str) -> Answers:
        """Return a child's answers for one way into the engine."""
        return load_answers(self.work / "answers" / name / f"{way}.safetensors")

    def compare(self, name: str, label: Callable[[str], str] = str) -> list[Result]:
        """Compare all answers of a child with the reference. A control's answers must differ."""
        results = []
        for path in sorted((self.work / "answers" / name).glob("*.safetensors")):
            for case, answer in load_answers(path).items():
                way, right = path.stem, self.reference[case]
                must_differ = way.startswith("control")
                results.append(compare(label(way), case, answer, right, must_differ=must_differ))
        return results


Scenario = Callable[[Context], list[Result]]


def end_session(process: "subprocess.Popen[bytes]") -> None:
    """End a process with a separate session, and all child processes of this session."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
