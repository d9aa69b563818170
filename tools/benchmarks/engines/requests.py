"""Whole requests against vLLM's API server: as it comes, with our tower, and with our features."""

import base64
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import click

from tools.benchmarks.engines.workloads import picture

SIDES_PX = (448, 896, 1344)
N_ALONE, N_LOAD, AT_ONCE = 10, 64, 16
START_LIMIT_S = 240
Part = dict[str, Any]


def picture_part(side: int, seed: int) -> Part:
    """A picture as JPEG, as a client sends it."""
    file = io.BytesIO()
    picture(side, side, seed).save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def feature_parts(folder: Path, side: int, seeds: list[int]) -> tuple[list[Part], float]:
    """The same pictures encoded beforehand, and the seconds that `encode` took for them."""
    from qwen_vit import VisionEncoder
    from qwen_vit.integrations.vllm import to_vllm_chat_part

    encoder = VisionEncoder.from_pretrained(folder / "small")
    pictures = []
    for seed in seeds:
        file = io.BytesIO()
        picture(side, side, seed).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    encoder.encode(pictures[:8])
    started = time.perf_counter()
    features = encoder.encode(pictures)
    took = time.perf_counter() - started
    return to_vllm_chat_part(features), took


@contextmanager
def server(folder: Path, log: Path, *, plugin: bool, embeds: bool) -> Iterator[str]:
    """vLLM's API server with the large model on loopback; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(folder / "large"), "--load-format", "dummy", "--dtype", "bfloat16", "--port", str(port),
        "--host", "127.0.0.1", "--max-model-len", "16384", "--max-num-batched-tokens", "16384",
        "--gpu-memory-utilization", "0.8" if embeds else "0.9", "--no-enable-prefix-caching",
        "--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 4, "video": 1}',
        "--served-model-name", "model", *(["--enable-mm-embeds"] if embeds else []),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_PLUGINS": "qwen_vit" if plugin else ""}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            raise click.ClickException(f"the server ended with {process.returncode}:\n{tail}")
        try:
            with urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise click.ClickException(f"the server is not ready after {START_LIMIT_S} s: see {log}")


def ask(address: str, part: Part) -> float:
    """Seconds until the one token of a request with a picture or features has come."""
    content = [part, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "model", "max_tokens": 1, "temperature": 0, "messages": messages}
    request = Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    try:
        with urlopen(request, timeout=120) as response:
            response.read()
    except HTTPError as error:
        raise click.ClickException(f"{error.code}: {error.read()[:500]!r}") from None
    return time.perf_counter() - started


def _measure(address: str, parts: Callable[[int, list[int]], list[Part]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side in SIDES_PX:
        alone = [ask(address, part) for part in parts(side, list(range(N_ALONE)))]
        load = parts(side, list(range(1000, 1000 + N_LOAD)))
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as clients:
            list(clients.map(lambda part: ask(address, part), load))
        took = time.perf_counter() - started
        found[str(side)] = {
            "alone_ms": 1000 * statistics.median(alone[2:]),
            "first_ms": 1000 * alone[0],
            "images_per_s": N_LOAD / took,
        }
    return found


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Time to the first token alone, and images a second under load, by side in pixels."""
    log = folder / f"server-{way}.log"
    encode_s: dict[str, float] = {}

    def pictures(side: int, seeds: list[int]) -> list[Part]:
        return [picture_part(side, seed) for seed in seeds]

    def features(side: int, seeds: list[int]) -> list[Part]:
        made, took = feature_parts(folder, side, seeds)
        encode_s[str(side)] = took
        return made

    started = time.perf_counter()
    with server(folder, log, plugin=way == "plugin", embeds=way == "features") as address:
        ready = time.perf_counter() - started
        found = _measure(address, features if way == "features" else pictures)
    for side, took in encode_s.items():  # of the load's pictures: encoding and then asking
        asked = N_LOAD / found[side]["images_per_s"]
        found[side]["images_per_s_with_encode"] = N_LOAD / (asked + took)
    return {"ready_s": ready, **found}


def as_table(results: dict[str, dict[str, Any]]) -> str:
    """The figures of `measure`, one line for each way and side."""
    lines = [f"{'way':10} {'side':>5} {'alone ms':>9} {'first ms':>9} {'images/s':>9}"]
    for way, found in results.items():
        for side in map(str, SIDES_PX):
            row = found[side]
            lines.append(
                f"{way:10} {side:>5} {row['alone_ms']:9.1f} {row['first_ms']:9.1f} "
                f"{row['images_per_s']:9.1f}"
                + (
                    f"  with encode {row['images_per_s_with_encode']:.1f}"
                    if "images_per_s_with_encode" in row
                    else ""
                )
            )
    return "\n".join(lines)
