"""Test that the manifest has a row for every image, even if parts end at the same time."""

import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image

from qwen_vit.errors import ExportError
from qwen_vit.export import lock as lock_module
from qwen_vit.export import manifest as manifest_module
from qwen_vit.export.lock import short_lock
from qwen_vit.export.run import make_manifest
from qwen_vit.feature_files.read import load_features
from tests.support.export_stress import tiny_png
from tests.support.exports import SMALL, export, files, make_shard, plan_of
from tests.support.fake_encoder import FakeEncoder


def test_the_rows_of_many_small_shards_share_row_groups(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow's writer keeps metadata of every row group: one group for each of 2,410 shards of 83
    images took 90 MB."""
    monkeypatch.setattr(manifest_module, "ROWS_IN_A_GROUP", 5)
    with plan_of(options=SMALL) as plan:
        for shard in range(plan.listing.n_shards):
            make_shard(FakeEncoder(), plan, shard)
        make_manifest(plan)
    file = pq.ParquetFile("out/manifest.parquet")
    rows = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
    assert len(rows) > 1
    assert all(count >= 5 for count in rows[:-1])
    assert file.read()["index"].to_pylist() == list(range(sum(rows)))


# Resuming


def test_an_unreadable_shard_is_reported(
    export_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        for shard in range(3):
            make_shard(FakeEncoder(), plan, shard)
        other = plan.path(1)
        other.write_bytes(other.read_bytes()[:-8])
        make_manifest(plan)
        assert pq.read_table("out/manifest.parquet").num_rows == 7
        assert "The manifest omits this shard: run its part again." in caplog.text
        own = plan.path(2)
        own.write_bytes(own.read_bytes()[:-8])
        with pytest.raises(
            ExportError, match=r"00002.safetensors: it was complete, but cannot be read"
        ):
            make_manifest(plan)
        assert pq.read_table("out/manifest.parquet").num_rows == 7


# The manifest


def test_the_manifest_has_a_row_for_every_image(export_dir: Path) -> None:
    Image.fromarray(np.zeros((56, 140, 3), np.uint8)).save("p/2.png")
    export()
    rows = pq.read_table("out/manifest.parquet").to_pylist()
    assert [row["id"] for row in rows] == [*(f"{n}.png" for n in range(10)), "x.png"]
    assert [row["index"] for row in rows] == list(range(11))
    expected = {
        "status": "ok", "shard": "shard-00000000.safetensors", "row_begin": 8, "row_end": 18,
        "tokens": 10, "grid_t": 1, "grid_h": 4, "grid_w": 10, "height": 56, "width": 140,
        "source": str(export_dir / "p/2.png"), "error_code": None, "id_bytes": None,
    }  # fmt: skip
    assert {name: rows[2][name] for name in expected} == expected
    assert rows[3]["row_begin"] == 18
    assert rows[2]["sha256"] == hashlib.sha256(Path("p/2.png").read_bytes()).hexdigest()
    bad = rows[-1]
    assert (bad["status"], bad["error_stage"], bad["error_code"], bad["tokens"]) == (
        "error", "decode", "truncated", None,
    )  # fmt: skip
    assert bad["error_message"].startswith("x.png: a truncated")


def test_parts_write_the_manifest_one_after_the_other(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock, a slower part could replace a complete manifest with an older manifest."""
    is_waiting, may_continue = threading.Event(), threading.Event()

    def wait(seconds: float) -> None:
        is_waiting.set()
        may_continue.wait(60)

    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        make_shard(FakeEncoder(), plan, 0)
        make_shard(FakeEncoder(), plan, 2)
        monkeypatch.setattr(
            lock_module, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic)
        )
        ending = threading.Thread(target=make_manifest, args=(plan,))
        with short_lock(plan.folder.scratch):
            ending.start()
            assert is_waiting.wait(60)
            assert "manifest.parquet" not in files()
            make_shard(FakeEncoder(), plan, 1)
        may_continue.set()
        ending.join(60)
    assert pq.read_table("out/manifest.parquet").num_rows == 11


def test_the_lock_timeout_restarts_when_the_owner_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 parts that ended together, ten once gave up while the other parts held the lock."""
    polls = iter(range(1000))

    def owner(descriptor: int) -> str:
        return f"part {min(next(polls) // 4, 15)}"  # a new owner every 4 polls, up to part 15

    with short_lock(tmp_path):
        monkeypatch.setattr(lock_module, "SHORT_LOCK_TIMEOUT_S", 1.5)
        monkeypatch.setattr(lock_module, "_owner", owner)
        with (
            pytest.raises(ExportError, match=r": part 15 is writing to it\. Wait for the other"),
            short_lock(tmp_path),
        ):
            pass
    assert next(polls) > 60


def test_rows_of_the_manifest_are_the_rows_of_the_shard(export_dir: Path) -> None:
    export()
    features = load_features("out")
    for row in pq.read_table("out/manifest.parquet").to_pylist():
        if row["status"] == "ok":
            shard: Any = load_features(f"out/{row['shard']}")
            rows = shard._file.get_tensor("image_embeds")[row["row_begin"] : row["row_end"]]
            assert torch.equal(rows, features[row["id"]].embeds)


def test_names_that_are_not_unicode_are_complete_in_the_manifest(export_dir: Path) -> None:
    name = b"caf\xe9\n.png"
    with open(b"p/" + name, "wb") as file:
        file.write(tiny_png(1))
    export()
    [row] = [r for r in pq.read_table("out/manifest.parquet").to_pylist() if r["id_bytes"]]
    assert row["id_bytes"] == name
    assert row["id"] == "caf\\udce9\n.png"
    assert load_features("out")[os.fsdecode(name)].embeds is not None


def test_without_pyarrow_the_manifest_is_json_lines(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    parquet = pq.read_table("out/manifest.parquet").to_pylist()
    monkeypatch.setattr(manifest_module, "load_arrow", lambda: False)
    assert export().manifest.name == "manifest.jsonl"
    lines = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert [{**line, "id_bytes": None} for line in lines] == parquet
    assert not Path("out/manifest.parquet").exists()  # otherwise it would become outdated
