"""Export Parquet into object storage from several nodes, with repeated kills."""

import hashlib
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vit.common.storage import list_objects
from qwen_vit.feature_files.read import load_features
from tests.support import export_stress, kill_harness
from tests.support.export_stress import fake_encoder, journal_bytes
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.store_stress import parquet_folder

OUT = f"s3://{BUCKET}/out"
TIMEOUT_S = 3_600.0  # without any progress
MAX_PAUSE_S = 0.5  # from the image that a kill waits for to the kill


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

    def at_work(self) -> list[int]:
        """Return the running nodes. Raises AssertionError for a failed node."""
        for node, process in self._running.items():
            log = self._folder / f"log-{node}"
            assert process.poll() in (None, 0, 1), log.read_text("utf-8", "replace")[-2_000:]
        return [node for node, process in self._running.items() if process.poll() is None]

    def kill(self, node: int) -> None:
        """kill -9."""
        kill_harness.end_group(self._running[node])

    def end(self) -> None:
        """End the running nodes."""
        for process in self._running.values():
            if process.poll() is None:
                kill_harness.end_group(process)


def kills_of_nodes(
    folder: Path, *, images: int, kills: int, first: int, nodes: int, seed: int = 0
) -> dict[str, Any]:
    """Kill random nodes at random images with SIGKILL. Afterwards the bucket must have the bytes of
    one local run. A last run of one node without kills measures the memory, starting with the image
    `first`.
    """
    shard_size = min(512, max(10, images // 60))
    inputs = parquet_folder(folder / "images", images)
    arguments = [*inputs, "--shard-size", str(shard_size), "--yes"]
    local = folder / "local"
    done = kill_harness.run(
        fake_encoder(folder / "journal", *arguments, "--out", local), folder / "log"
    )
    assert done.code == 1, done.errors  # some images are broken
    expected = {path.name: path.read_bytes() for path in local.iterdir()}
    once = journal_bytes(folder / "journal")
    with s3_server() as server:
        begin = time.monotonic()
        encoded = _kill(folder, nodes, arguments, kills, once, expected, seed)
        seconds = time.monotonic() - begin
        _check_whole(server, expected, images)
        server.delete("out")
        (folder / "flat").mkdir()
        figures = export_stress.flat_memory(
            folder / "flat", images=images, first=min(first, images // 2),
            write=lambda *_: inputs, address=f"s3://{BUCKET}/flat",
        )  # fmt: skip
        requests = len(server.requests)
    redone = encoded - once
    assert redone <= kills * shard_size, (redone, kills, shard_size)
    return {
        **{f"one_node_{name}": figure for name, figure in figures.items() if name != "images"},
        "images": images,
        "images_per_shard": shard_size,
        "nodes": nodes,
        "kills": kills,
        "images_encoded_again": redone,
        "seconds": round(seconds, 1),
        "local_seconds": round(done.seconds, 1),
        "requests_of_one_node": requests,
    }


def _kill(
    folder: Path, count: int, arguments: Sequence[str | Path], kills: int, images: int,
    expected: dict[str, bytes], seed: int,
) -> int:  # fmt: skip
    """Kill nodes at random images, and let the other runs end. Returns the number of encoded
    images."""
    moments = random.Random(seed)
    targets = sorted(moments.uniform(0, images) for _ in range(kills))
    etags = {name: f'"{hashlib.md5(data).hexdigest()}"' for name, data in expected.items()}
    nodes, landed = Nodes(folder, count, arguments), 0
    changed, encoded = time.monotonic(), 0
    try:
        while (working := nodes.at_work()) or landed < kills:
            time.sleep(0.01)
            if nodes.encoded != encoded:
                changed, encoded = time.monotonic(), nodes.encoded
            assert time.monotonic() - changed < TIMEOUT_S
            if landed == kills or (working and encoded < targets[landed]):
                continue
            node = moments.choice(working or range(count))
            if not working:  # all have ended: one begins again, and dies while it resumes
                nodes.start(node)
            time.sleep(moments.uniform(0, MAX_PAUSE_S))
            if node in nodes.at_work():
                nodes.kill(node)
                landed += 1
                _check_shards(etags)
            nodes.start(node)
        return nodes.encoded
    finally:
        nodes.end()


def _check_shards(etags: dict[str, str]) -> None:
    """Check that the bucket has only complete shards, with the bytes of the local run."""
    for found in list_objects(OUT):
        name = found.address.rpartition("/")[2]
        if name.startswith("shard-"):
            assert found.version == etags.get(name), name


def _check_whole(server: S3Server, expected: dict[str, bytes], images: int) -> None:
    objects = server.objects("out")
    assert sorted(objects) == sorted(expected)
    assert [name for name in expected if objects[name] != expected[name]] == []
    features = load_features(OUT)
    assert len(features) + len(features.errors) == images
    assert len({*features.ids}) == len(features)
