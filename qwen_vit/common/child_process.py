"""Send one request to a child process, because C code that decodes may hang or crash.

The request is a line of JSON on the child's stdin, followed by bytes. The answer is JSON on the
child's stdout: {"value": ...} or {"error": ...}.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from qwen_vit.errors import ImageError

__all__ = ["answer_request", "ask_child"]

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def ask_child(
    module: str,
    request: Mapping[str, Any],
    data: bytes = b"",
    *,
    timeout_s: float,
    late: ImageError,
    arguments: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
) -> Any:
    """Run `python -m MODULE`, which calls `answer_request`, and return the answer.

    Raises the child's ImageError, or the error `late` after `timeout_s`. If the child fails in
    another way, raises an ImageError with the code "memory" and the name `late.name`.
    """
    path = os.pathsep.join([str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            input=json.dumps(request).encode() + b"\n" + data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            pass_fds=pass_fds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise late from None
    if done.returncode != 0:
        code = done.returncode
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ImageError(
            f"the process that decoded the file ended with {what}",
            name=late.name,
            remedy="omit the file, or free some memory",
            code="memory",
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ImageError(**answer["error"])
    return answer["value"]


def answer_request(answer: Callable[[dict[str, Any], BinaryIO], object]) -> None:
    with suppress(OSError):  # if memory runs out, the system kills this process, not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.loads(sys.stdin.buffer.readline())
    try:
        result: dict[str, object] = {"value": answer(request, sys.stdin.buffer)}
    except ImageError as error:
        facts = ("fact", "name", "expected", "remedy", "code")
        result = {"error": {fact: getattr(error, fact) for fact in facts}}
    sys.stdout.write(json.dumps(result))
