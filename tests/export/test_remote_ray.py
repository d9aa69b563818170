"""Test that a Ray cluster exports Parquet from and to object storage, and extends the export."""

import logging
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest

from qwen_vit.export import ray_cluster
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.ray_cluster import export_on_ray
from qwen_vit.export.run import export_features
from tests.support import ROOT
from tests.support.fake_encoder import FakeEncoder, load_fake_encoder
from tests.support.parquet_files import structs, write_rows
from tests.support.s3_server import BUCKET, s3_server

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

INPUTS, OUT = f"s3://{BUCKET}/data", f"s3://{BUCKET}/out"


@pytest.mark.slow
def test_workers_without_a_shared_disk_give_the_bytes_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have a separate scratch folder, as on another machine."""
    monkeypatch.setattr(ray_cluster, "load_encoder", partial(load_fake_encoder))
    logging.getLogger("ray").setLevel(logging.ERROR)
    options = ExportOptions(shard_size=4, column="image")
    grown = ExportOptions(shard_size=4, column="image", extend=True)
    # a short path, because a socket's path has a length limit
    ray_folder = tempfile.mkdtemp(dir="/tmp")
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for Ray's workers
        patch.setenv("TMPDIR", ray_folder)
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        try:
            for numbers, how in ((range(10), options), (range(10, 17), grown)):
                write_rows(tmp_path / "x.parquet", structs(numbers), group=3)
                data = (tmp_path / "x.parquet").read_bytes()
                server.put(f"data/{numbers.start:02}.parquet", data)
                done = export_on_ray("stand-in", [INPUTS], OUT, how)
                export_features(FakeEncoder(), [INPUTS], tmp_path / "single", how)
                single = {path.name: path.read_bytes() for path in (tmp_path / "single").iterdir()}
                assert server.objects("out") == single
            assert (done.exported, done.shards, done.shards_missing) == (17, 5, 0)
        finally:
            ray.shutdown()
            shutil.rmtree(ray_folder, ignore_errors=True)
