"""Run exports on a Ray cluster that loses a node and workers during the export."""

import logging
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from qwen_vit.export import ray_cluster
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support import ROOT
from tests.support.export_stress import (
    SHARD_IMAGES,
    digests,
    journal_bytes,
    shards_of,
    write_images,
)
from tests.support.fake_encoder import HELD, FakeEncoder, load_blocking_encoder


def cluster_kills(folder: Path, *, kills: int, images: int, seed: int = 0) -> dict[str, Any]:
    """Export on a Ray cluster of three nodes, kill one node during the run, and kill workers
    several times."""
    import ray
    from ray.cluster_utils import Cluster

    write_images(folder / "images", images)
    (folder / "workers").mkdir()
    (folder / "hold").touch()
    # The encoder holds the last image until the kills have ended.
    Image.fromarray(np.full((28, 28, 3), HELD, np.uint8)).save(folder / "images" / "z.png")
    inputs, options = [str(folder / "images")], ExportOptions(shard_size=SHARD_IMAGES)
    encoder: Any = FakeEncoder()
    single = export_features(encoder, inputs, folder / "single", options)
    logger = logging.getLogger("ray")
    logger.setLevel(logging.ERROR)
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # for Ray's workers
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        doomed, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    killer = threading.Thread(target=kill_workers, args=(folder, cluster, doomed, kills, seed))
    begin = time.monotonic()
    try:
        with mock.patch.object(
            ray_cluster, "load_encoder", partial(load_blocking_encoder, held=folder)
        ):
            killer.start()
            done = ray_cluster.export_on_ray(
                "stand-in", inputs, folder / "out", options, address=cluster.address
            )
    finally:
        (folder / "hold").unlink(missing_ok=True)
        killer.join()
        ray.shutdown()
        cluster.shutdown()
    assert digests(folder / "out") == digests(folder / "single")
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {path.name for path in (folder / "single").iterdir()}, names
    assert (done.exported, done.failed, done.rows) == (
        single.exported, single.failed, single.rows,
    )  # fmt: skip
    features = load_features(folder / "out")
    assert len(features) + len(features.errors) == images + 1
    started = len(list((folder / "workers").iterdir()))
    assert started >= 3 + kills, started
    return {
        "nodes": 3,
        "nodes_killed": 1,
        "workers_killed": kills,
        "workers_started": started,
        "images": images + 1,
        "images_per_shard": SHARD_IMAGES,
        "images_encoded_again": journal_bytes(folder / "journal") - single.exported,
        "seconds": round(time.monotonic() - begin, 1),
    }


def kill_workers(folder: Path, cluster: Any, node: Any, kills: int, seed: int) -> None:
    """Kill a node after the first shard, then workers at random moments, and then let the export
    end."""
    rng, killed, ended = random.Random(seed), set[str](), set[str]()
    while not shards_of(folder / "out") and (folder / "hold").exists():
        time.sleep(0.02)
    cluster.remove_node(node)
    while len(killed) < kills and (folder / "hold").exists():
        time.sleep(rng.uniform(0, 1))
        for pid in set(os.listdir(folder / "workers")) - killed - ended:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:  # ended with its node, or because no work was left
                ended.add(pid)
            else:
                killed.add(pid)
                break
    (folder / "hold").unlink(missing_ok=True)
