"""Time requests to vLLM's API server by default, with our tower, and with our features."""

import base64
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import click

from tools.benchmarks.engines.model import small_folder
from tools.benchmarks.engines.workloads import picture, request_sizes
from tools.checks.engines.server import ANSWER_S, CHAT, MODEL, Server, serving
from tools.common import ROOT

Size = tuple[int, int]  # width and height in pixels
Part = dict[str, Any]
N_ALONE, N_LOAD, ROUNDS, AT_ONCE = 10, 48, 3, 16
SIZES: dict[str, tuple[Size, ...]] = {
    **{f"{side} x {side}": ((side, side),) for side in (448, 896, 1344)},
    "mixed": request_sizes(),
}


def jpeg(size: Size, seed: int) -> bytes:
    """Return an image as a JPEG file, as clients send it."""
    file = io.BytesIO()
    picture(*size, seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def picture_parts(jpegs: Sequence[bytes]) -> list[Part]:
    """Return message parts with the images as data URLs."""
    texts = [base64.b64encode(each).decode("ascii") for each in jpegs]
    urls = [{"url": f"data:image/jpeg;base64,{text}"} for text in texts]
    return [{"type": "image_url", "image_url": url} for url in urls]


def body_of(part: Part) -> bytes:
    """Return a request with one image, or its features, that asks for one token."""
    content = [part, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0, "messages": messages}
    return json.dumps(body).encode()


@contextmanager
def server(folder: Path, log: Path, *, plugin: bool, embeds: bool) -> Iterator[Server]:
    """Run vLLM's API server with the large model, and keep a fifth of the GPU free."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(folder / "large"), "--load-format", "dummy", "--dtype", "bfloat16",
        "--max-model-len", "16384", "--max-num-batched-tokens", "16384",
        "--gpu-memory-utilization", "0.8" if embeds else "0.9", "--no-enable-prefix-caching",
        "--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 4, "video": 1}',
        "--served-model-name", MODEL, *(["--enable-mm-embeds"] if embeds else []),
    ]  # fmt: skip
    variables = {**os.environ, "VLLM_PLUGINS": "qwen_vit" if plugin else ""}
    with serving(command, log, variables, ROOT) as running:
        yield running


def ask(address: str, body: bytes) -> float:
    """Return the seconds until a request's one token arrives."""
    request = Request(address, body, {"Content-Type": "application/json"})
    started = time.perf_counter()
    try:
        with urlopen(request, timeout=ANSWER_S) as response:
            response.read()
    except HTTPError as error:
        raise click.ClickException(f"{error.code}: {error.read()[:500]!r}") from None
    return time.perf_counter() - started


def measure_sizes(
    address: str, sizes: Sequence[Size], to_parts: Callable[[Sequence[bytes]], list[Part]]
) -> dict[str, float]:
    """Send requests one by one, then many at once, with images that never repeat."""
    seeds = iter(range(1_000_000))

    def bodies(n: int) -> tuple[list[bytes], float]:
        jpegs = [jpeg(sizes[i % len(sizes)], next(seeds)) for i in range(n)]
        started = time.perf_counter()
        parts = to_parts(jpegs)
        return [body_of(part) for part in parts], time.perf_counter() - started

    alone = [ask(address, body) for body in bodies(N_ALONE)[0]]
    rates, with_parts = [], []
    for _ in range(ROUNDS):
        load, made_s = bodies(N_LOAD)
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as clients:
            list(clients.map(lambda body: ask(address, body), load))
        took = time.perf_counter() - started
        rates.append(N_LOAD / took)
        with_parts.append(N_LOAD / (took + made_s))
    return {
        "first_ms": 1000 * alone[0],
        "alone_ms": 1000 * statistics.median(alone[2:]),
        "images_per_s": statistics.median(rates),
        "images_per_s_parts_included": statistics.median(with_parts),
    }


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Measure time to first token, and images per second under load, for each of SIZES.

    With features, "parts included" also counts the encoding, which precedes the requests.
    """
    log = folder / f"server-{way}.log"
    to_parts = picture_parts
    if way == "features":
        from qwen_vit import VisionEncoder
        from qwen_vit.integrations.vllm import to_vllm_chat_part

        encoder = VisionEncoder.from_pretrained(small_folder(folder, 0))

        def to_parts(jpegs: Sequence[bytes]) -> list[Part]:
            return to_vllm_chat_part(encoder.encode(list(jpegs)))

    started = time.perf_counter()
    with server(folder, log, plugin=way == "plugin", embeds=way == "features") as running:
        found: dict[str, Any] = {"ready_s": time.perf_counter() - started}
        address = f"http://127.0.0.1:{running.port}{CHAT}"
        for name, sizes in SIZES.items():
            found[name] = measure_sizes(address, sizes, to_parts)
            click.echo(f"{way:10}{name:12} {found[name]}")
    return found


def as_table(results: dict[str, dict[str, Any]]) -> str:
    """Format the results of `measure`, with one line per way and size."""
    lines = [f"{'way':10}{'pictures':13}{'alone ms':>9}{'images/s':>10}{'parts included':>16}"]
    lines += [
        f"{way:10}{name:13}{found[name]['alone_ms']:9.1f}{found[name]['images_per_s']:10.1f}"
        f"{found[name]['images_per_s_parts_included']:16.1f}"
        for way, found in results.items()
        for name in SIZES
    ]
    return "\n".join(lines)
