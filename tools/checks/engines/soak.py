"""Send many valid, cancelled and malformed requests at once to vLLM's server.

The server must answer each request correctly, and its memory must not increase.
"""

import base64
import http.client
import io
import json
import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from tests.support.process_memory import memory_mb
from tools.checks.engines.answers import Answers, Result, compare, plain
from tools.checks.engines.cases import POOL, Case, Picture
from tools.checks.engines.context import Context
from tools.checks.engines.reference import clear_answers
from tools.checks.engines.server import (
    ANSWER_S,
    CHAT,
    Server,
    chat_body,
    content_of,
    parse_answer,
    picture_part,
    running_server,
)

CLIENTS = 8
CANCELLED, MALFORMED = 0.1, 0.1  # shares of the requests
# Without these settings, memory grows although nothing leaks: oneDNN caches 1,024 compiled GEMMs,
# one for each number of rows, and glibc keeps freed memory.
RETURN_MEMORY = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
ROUNDS = 5  # each round ends with a measurement of memory; the first round fills pools
MAX_GROWTH_KB = 20.0  # per request; a picture of 196 x 196 px has 115 KB
TEXTS = ("What is this? ", "", "Compare ", "From here ", "Look: ", " and ", "Say more. ")


def pool_cases() -> list[Case]:
    """Return prompts of one to three images, with every image in one prompt."""
    chance, names = random.Random(0), list(POOL)
    cases: list[Case] = []
    while names:
        taken = [names.pop() for _ in range(min(len(names), chance.choice((1, 1, 2, 3))))]
        parts: list[Any] = []
        for name in taken:
            parts += [chance.choice(TEXTS), Picture(name)]
        cases.append(Case(f"soak {len(cases)}", (*filter(None, parts), "?")))
    return cases


def malformed_bodies() -> dict[str, bytes]:
    """Return requests that a server must reject."""
    png = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(noise).save(png, "png")

    def body(content: list[dict[str, Any]], **more: Any) -> bytes:
        return json.dumps(chat_body(content, **more)).encode()

    def picture(raw: bytes | str) -> bytes:
        text = raw if isinstance(raw, str) else base64.b64encode(raw).decode()
        url = f"data:image/png;base64,{text}"
        return body([{"type": "image_url", "image_url": {"url": url}}])

    strip = io.BytesIO()
    Image.new("RGB", (8_000, 2)).save(strip, "png")
    text = {"type": "text", "text": "Hello"}
    return {
        "no JSON": b'{"model": ',
        "no base64": picture("***"),
        "no image": picture(b"these are not the bytes of an image"),
        "a truncated image": picture(png.getvalue()[: len(png.getvalue()) // 2]),
        "a ratio of 4,000": picture(strip.getvalue()),
        "nine pictures": body([picture_part("tall")] * 9),
        "another model": body([text], model="another"),
        "a prompt that is too long": body([{**text, "text": "x" * 5_000}]),
        "-1 tokens": body([text], max_tokens=-1),
        "features, which are off": body(
            [{"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 4]}}]
        ),
    }


@dataclass(slots=True)
class Counts:
    """Count the outcomes of the requests."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    cancelled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0  # the largest distance of a log-probability
    lock: threading.Lock = field(default_factory=threading.Lock)


def soak(context: Context, n_requests: int, variables: dict[str, str]) -> list[Result]:
    """Send the requests from CLIENTS threads to one server."""
    cases = pool_cases()
    reference = clear_answers(context.work / "model", cases)
    cases = [each for each in cases if each.name in reference]
    bodies = {
        each.name: json.dumps(
            chat_body(content_of(each, {name: picture_part(name) for name in each.pictures}))
        ).encode()
        for each in cases
    }
    counts = Counts()
    memory: dict[int, dict[str, float]] = {}
    with running_server(
        context,
        "soak",
        "--no-enable-prefix-caching",
        "--mm-processor-cache-gb",
        "0",
        **RETURN_MEMORY,
        **variables,
    ) as server:  # without caches, every request runs the tower
        started = time.perf_counter()
        jobs = _jobs(n_requests, bodies, malformed_bodies(), server, reference, counts)
        ends = [round(n_requests * i / ROUNDS) for i in range(ROUNDS + 1)]
        with click.progressbar(length=n_requests, label="soak", file=sys.stderr) as bar:
            for begin, end in pairwise(ends):
                some = islice(jobs, end - begin)
                clients = [
                    threading.Thread(target=_work, args=(some, counts, bar.update))
                    for _ in range(CLIENTS)
                ]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                memory[end] = _resting_memory_mb(server)
        took = time.perf_counter() - started
        is_alive = server.get("/health") == 200
        unfinished = _unfinished(server)
    return _lines(counts, memory, took, is_alive, unfinished)


def _jobs(
    n_requests: int, bodies: dict[str, bytes], malformed: dict[str, bytes], server: Server,
    reference: Answers, counts: Counts,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Yield good, cancelled and malformed requests in a fixed order."""
    chance, kinds = random.Random(1), list(malformed)
    for i in range(n_requests):
        name, share = chance.choice(list(bodies)), chance.random()
        if share < CANCELLED:
            yield partial(_cancel, server, bodies[name], chance.uniform(0, 0.6), counts)
        elif share < CANCELLED + MALFORMED:
            kind = kinds[i % len(kinds)]
            yield partial(_refuse, server, kind, malformed[kind], counts)
        else:
            yield partial(_ask, server, name, bodies[name], reference, counts)


def _work(jobs: Iterator[Callable[[], None]], counts: Counts, done: Callable[[int], None]) -> None:
    """Run one client, which sends requests until none remain."""
    while True:
        with counts.lock:
            job = next(jobs, None)
        if job is None:
            return
        job()
        with counts.lock:
            done(1)


def _send(server: Server, body: bytes) -> tuple[int, bytes]:
    """Send a request and wait for the answer. Raises OSError or HTTPException without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
    try:
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _ask(server: Server, name: str, body: bytes, reference: Answers, counts: Counts) -> None:
    try:
        status, raw = _send(server, body)
    except (OSError, http.client.HTTPException) as error:
        with counts.lock:
            counts.lost.append(f"{name}: {error}")
        return
    with counts.lock:
        if status != 200:
            counts.lost.append(f"{name}: status {status}: {raw[:200]!r}")
            return
        result = compare("soak", name, parse_answer(json.loads(raw)), reference[name])
        counts.largest = max(counts.largest, result.distance)
        if result.passed:
            counts.right += 1
        else:
            counts.wrong.append(f"{name}: {result.tokens} tokens, {result.distance:.1e}")


def _cancel(server: Server, body: bytes, after_s: float, counts: Counts) -> None:
    """Send a request, and hang up before its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    time.sleep(after_s)
    connection.close()
    with counts.lock:
        counts.cancelled += 1


def _refuse(server: Server, kind: str, body: bytes, counts: Counts) -> None:
    try:
        status, raw = _send(server, body)
    except (OSError, http.client.HTTPException) as error:
        status, raw = 0, str(error).encode()
    with counts.lock:
        if 400 <= status < 500:
            counts.refused[kind] += 1
        else:
            counts.lost.append(f"{kind}: status {status}: {raw[:200]!r}")


def _resting_memory_mb(server: Server) -> dict[str, float]:
    """Return each server process's own memory at rest, in MB."""
    deadline = time.monotonic() + 60
    while _unfinished(server) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)
    held: dict[str, float] = defaultdict(float)
    for path in Path("/proc").glob("[0-9]*"):
        if _is_of(server, path):
            held[(path / "comm").read_text().strip()] += memory_mb(int(path.name))[0]
    return dict(held)


def _is_of(server: Server, process: Path) -> bool:
    try:
        return os.getsid(int(process.name)) == server.process.pid
    except ProcessLookupError:
        return False


def _unfinished(server: Server) -> int:
    """Return the number of requests that the engine still runs or queues."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    wanted = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines))


def _lines(
    counts: Counts,
    memory: dict[int, dict[str, float]],
    took_s: float,
    is_alive: bool,
    unfinished: int,
) -> list[Result]:
    (warm, first), *_, (end, last) = memory.items()
    grown_kb = {name: 1024 * (last[name] - first.get(name, 0)) / (end - warm) for name in last}
    growth_kb = sum(grown_kb.values())
    course = ", ".join(f"{sum(held.values()):.0f}" for held in memory.values())
    of_each = ", ".join(f"{name} {kb:.1f}" for name, kb in sorted(grown_kb.items()))
    refused = sum(counts.refused.values())
    answered = counts.right + len(counts.wrong)
    n_done = answered + counts.cancelled + refused
    return [
        plain("soak", "requests", n_done == end, f"{end} in {took_s:.0f} s, {CLIENTS} clients"),
        plain("soak", "lost", not counts.lost, "; ".join(counts.lost[:3]) or "none"),
        plain(
            "soak", "right answers", answered > 0 and not counts.wrong,
            "; ".join(counts.wrong[:3]) or f"{answered}, within {counts.largest:.1e}",
        ),
        plain("soak", "cancelled", counts.cancelled > 0, str(counts.cancelled)),
        plain("soak", "malformed", refused > 0, f"{refused} refused, {len(counts.refused)} kinds"),
        plain("soak", "alive in the end", is_alive, "health is 200" if is_alive else "no health"),
        plain("soak", "unfinished in the end", unfinished == 0, str(unfinished)),
        plain(
            "soak", "memory", growth_kb <= MAX_GROWTH_KB,
            f"{course} MB after each {warm}: {growth_kb:.1f} KB a request ({of_each})",
        ),
    ]  # fmt: skip
