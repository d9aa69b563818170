"""Run an engine's server on loopback, and send requests to it."""

import base64
import io
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tools.checks.engines.answers import Answer
from tools.checks.engines.cases import NEW_TOKENS, Case, Picture, Video, frames
from tools.checks.engines.context import Context, end_session, tail

START_S, ANSWER_S = 300.0, 120.0
MODEL = "small"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Server:
    """Hold a running server's address, process and log."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def get(self, path: str) -> int:
        """Return the status of a GET, or 0 without an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as got:
                return int(got.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def post(
        self, body: dict[str, Any], timeout_s: float = ANSWER_S, path: str = CHAT
    ) -> tuple[int, Any]:
        """Return a request's status and JSON. The status is 0 without an answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(), {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as got:
                return int(got.status), json.loads(got.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError as error:
            return 0, str(error)

    def ask(self, content: Sequence[dict[str, Any]]) -> Answer:
        """Return the answer to a message.

        Raises:
            RuntimeError: The server rejects the message, or has ended.
        """
        status, found = self.post(chat_body(content))
        if status != 200:
            raise RuntimeError(f"status {status}: {str(found)[:500]}")
        return parse_answer(found)


@contextmanager
def running_server(
    context: Context, name: str, *options: str, **variables: str | None
) -> Iterator[Server]:
    """Start vLLM's server with the small model, wait until it answers, and stop it in the end.

    Raises:
        RuntimeError: The server ends, or does not answer within START_S.
    """
    command = [
        "vllm.entrypoints.openai.api_server",
        "--model", str(context.work / "model"), "--served-model-name", MODEL,
        "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "8", "--max-logprobs", "-1",
        "--limit-mm-per-prompt", json.dumps({"image": 8, "video": 4}), *options,
    ]  # fmt: skip
    with running_module(context, name, command, **variables) as server:
        yield server


@contextmanager
def running_module(
    context: Context, name: str, command: Sequence[str], **variables: str | None
) -> Iterator[Server]:
    """Start a server by `python -m COMMAND` on a free port, wait until it answers, and stop it in
    the end.

    Raises:
        RuntimeError: The server ends, or does not answer within START_S.
    """
    arguments = [str(context.environment.python), "-m", *command]
    with serving(
        arguments, context.log(name), context.environment.variables(**variables), context.work
    ) as server:
        yield server


@contextmanager
def serving(
    command: Sequence[str], log: Path, variables: dict[str, str], folder: Path
) -> Iterator[Server]:
    """Run a server's command on a free port of loopback, wait until it answers, and stop it in the
    end.

    Raises:
        RuntimeError: The server ends, or does not answer within START_S.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            arguments, cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = Server(port, process, log)
    try:
        deadline = time.monotonic() + START_S
        while server.get("/health") != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start, see {log}:\n{tail(log)}")
            time.sleep(0.5)
        yield server
    finally:
        end_session(process)


def chat_body(content: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a request with one user message that asks for all log-probabilities."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": list(content)}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": -1,
        "return_tokens_as_token_ids": True,
        **more,
    }


def parse_answer(document: Any) -> Answer:
    """Return the answer in a chat completion."""
    steps = document["choices"][0]["logprobs"]["content"]
    tokens, logprobs = [], []
    for step in steps:
        tokens.append(_token_id(step["token"]))
        of_step = {_token_id(each["token"]): each["logprob"] for each in step["top_logprobs"]}
        logprobs.append([of_step[i] for i in range(len(of_step))])
    return Answer(torch.tensor(tokens), torch.tensor(logprobs, dtype=torch.float64))


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def picture_part(name: str) -> dict[str, Any]:
    """Return an image as a PNG in a data URL, as clients send it."""
    buffer = io.BytesIO()
    Image.fromarray(frames(name)[0]).save(buffer, "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}


def content_of(each: Case, parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert a case to a message's content, with a part of `parts` per image and video."""
    return [
        parts[part.name] if isinstance(part, Picture | Video) else {"type": "text", "text": part}
        for part in each.parts
    ]
