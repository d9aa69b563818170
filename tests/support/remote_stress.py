"""Export Parquet into object storage from several nodes, with repeated kills."""

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_vit.common.storage import list_objects
from qwen_vit.export.shards import GROUP_IMAGES
from qwen_vit.feature_files.read import load_features
from tests.support import export_stress, kill_harness
from tests.support.export_stress import fake_encoder, journal_bytes
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.store_stress import parquet_folder

OUT = f"s3://{BUCKET}/out"
TIMEOUT_S = 3_600.0  # since the last encoded image
MAX_PAUSE_S = 0.5  # between the image that triggers a kill, and the kill


class Nodes:
    """Hold the parts of one export. Each part is a process with a separate scratch folder, as on a
    machine."""

    def __init__(self, folder: Path, count: int, arguments: Sequence[str | Path]) -> None:
        self._folder, self._arguments = folder, arguments
        self.count = count
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        for node in range(count):
            (folder / f"tmp-{node}").mkdir()
            self.start(node)

    def start(self, node: int) -> None:
        """Start or resume the part of a node."""
        part = f"{node + 1}/{self.count}"
        command = fake_encoder(
            self._folder / f"journal-{node}", *self._arguments, "--out", OUT, "--part", part
        )
        tmp = str(self._folder / f"tmp-{node}")
        self._running[node] = kill_harness.start(command, self._folder / f"log-{node}", TMPDIR=tmp)

    @property
    def encoded(self) -> int:
        """Return the number of encodings of all nodes, including repeated images."""
        return sum(journal_bytes(self._folder / f"journal-{n}") for n in range(self.count))

    def running(self) -> list[int]:
        """Return the running nodes. Raises AssertionError for a failed node."""
        for node, process in self._running.items():
            log = self._folder / f"log-{node}"
            assert process.poll() in (None, 0, 1), log.read_text("utf-8", "replace")[-2_000:]
        return [node for node, process in self._running.items() if process.poll() is None]

    def kill(self, node: int) -> None:
        """Kill a node with SIGKILL."""
        kill_harness.end_group(self._running[node])

    def end(self) -> None:
        """End the running nodes."""
        for process in self._running.values():
            if process.poll() is None:
                kill_harness.end_group(process)


def kills_of_nodes(
    folder: Path, *, images: int, kills: int, first: int, nodes: int, seed: int = 0
) -> dict[str, Any]:
    """Kill random nodes at random images, and compare the bucket with the bytes of one local run.

    At the same time, the function exports to a local folder, and exports with one node without
    kills to a separate address. The second export measures memory from the image `first` on.
    """
    shard_size = min(512, max(10, images // 60))
    inputs = parquet_folder(folder / "images", images)
    arguments = [*inputs, "--shard-size", str(shard_size), "--yes"]
    (folder / "flat").mkdir()
    flat_out = f"s3://{BUCKET}/flat-{os.getpid()}"  # a name for this run's own scratch folder
    with s3_server() as server, ThreadPoolExecutor(2) as pool:
        begin = time.monotonic()
        local = pool.submit(_local_run, folder, arguments)
        flat = pool.submit(
            export_stress.flat_memory, folder / "flat", images=images,
            first=min(first, images // 2), write=lambda *_: inputs, address=flat_out,
        )  # fmt: skip
        encoded, seen = _kill(folder, nodes, arguments, kills, images, seed)
        seconds = time.monotonic() - begin
        expected, once, local_seconds = local.result()
        etags = {name: f'"{hashlib.md5(data).hexdigest()}"' for name, data in expected.items()}
        assert seen <= {*etags.items()}, seen - {*etags.items()}
        _check_whole(server, expected, images)
        figures = flat.result()
        requests = sum("flat" in each.path + each.query for each in server.requests)
    redone = encoded - once
    # A kill loses the open shard, and the first group of the next shard.
    lost = kills * (shard_size + GROUP_IMAGES)
    assert redone <= lost, (redone, kills, shard_size)
    return {
        **{f"one_node_{name}": figure for name, figure in figures.items() if name != "images"},
        "images": images,
        "images_per_shard": shard_size,
        "nodes": nodes,
        "kills": kills,
        "images_encoded_again": redone,
        "seconds": round(seconds, 1),
        "local_seconds": round(local_seconds, 1),
        "shards_checked_after_kills": len(seen),
        "requests_of_one_node": requests,
    }


def _local_run(
    folder: Path, arguments: Sequence[str | Path]
) -> tuple[dict[str, bytes], int, float]:
    """Export into a local folder. Returns files, the number of encoded images, and seconds."""
    local = folder / "local"
    done = kill_harness.run(
        fake_encoder(folder / "journal", *arguments, "--out", local), folder / "log"
    )
    assert done.code == 1, done.errors  # some images are broken
    files = {path.name: path.read_bytes() for path in local.iterdir()}
    return files, journal_bytes(folder / "journal"), done.seconds


def _kill(
    folder: Path, count: int, arguments: Sequence[str | Path], kills: int, images: int, seed: int
) -> tuple[int, set[tuple[str, str | None]]]:
    """Kill nodes at random images, and let them end.

    Returns the number of encoded images, and the shards that existed after the kills, with ETags.
    """
    rng = random.Random(seed)
    # 0.98, because a broken image has no encoding, so the count never reaches `images`
    targets = sorted(rng.uniform(0, 0.98 * images) for _ in range(kills))
    nodes, landed = Nodes(folder, count, arguments), 0
    seen: set[tuple[str, str | None]] = set()
    changed, encoded = time.monotonic(), 0
    try:
        while (working := nodes.running()) or landed < kills:
            time.sleep(0.01)
            if nodes.encoded != encoded:
                changed, encoded = time.monotonic(), nodes.encoded
            assert time.monotonic() - changed < TIMEOUT_S
            if landed == kills or (working and encoded < targets[landed]):
                continue
            node = rng.choice(working or range(count))
            if not working:  # all nodes have ended: start one again, and kill it during its resume
                nodes.start(node)
            time.sleep(rng.uniform(0, MAX_PAUSE_S))
            if node in nodes.running():
                nodes.kill(node)
                landed += 1
                seen |= _shards()
            nodes.start(node)
        return nodes.encoded, seen
    finally:
        nodes.end()


def _shards() -> set[tuple[str, str | None]]:
    """Return the shards in the bucket with their ETags. A damaged shard has another ETag."""
    found = ((each.address.rpartition("/")[2], each.version) for each in list_objects(OUT))
    return {(name, etag) for name, etag in found if name.startswith("shard-")}


def _check_whole(server: S3Server, expected: dict[str, bytes], images: int) -> None:
    objects = server.objects("out")
    assert sorted(objects) == sorted(expected)
    assert [name for name in expected if objects[name] != expected[name]] == []
    features = load_features(OUT)
    assert len(features) + len(features.errors) == images
    assert len({*features.ids}) == len(features)
