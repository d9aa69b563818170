"""Test that a Ray cluster writes the bytes of one process, with real nodes and real kills."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from qwen_vit.cli import main as cli
from qwen_vit.common.installation import install_command
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export.estimate import Estimate
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import open_export
from qwen_vit.export.ray_cluster import _plain_errors, _size, _threads_of_a_shard, export_on_ray
from qwen_vit.export.run import export_features
from tests.support import ROOT, cluster_stress
from tests.support.export_stress import digests, tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.inputs import write_tar

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

SMALL = ExportOptions(shard_size=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start one node with one CPU, for tests without kills."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for Ray's workers
        context = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Make five good images and a broken image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(tiny_png(number))
    (folder / "x.png").write_bytes(tiny_png(1)[:50])
    return folder


@pytest.mark.slow
def test_killed_nodes_and_workers_lose_and_repeat_no_image(tmp_path: Path) -> None:
    figures = cluster_stress.cluster_kills(tmp_path, kills=1, images=300)
    print(figures)
    assert figures["workers_started"] >= 4


@pytest.mark.slow
def test_workers_give_the_bytes_of_one_process_and_resume(
    cluster: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Run the command with the real encoder. It must not make an existing shard again."""
    out = tmp_path / "out"
    torch.set_num_threads(1)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    export_features(encoder, [str(images)], tmp_path / "single", SMALL)
    words = ["export", str(images), "--model", "tiny", "--out", str(out), "--shard-size", "2"]
    monkeypatch.setattr(sys, "argv", ["qwen-vit", *words, "--json", "--ray"])
    for resumed in (0, 4):
        with pytest.raises(SystemExit) if resumed == 0 else nullcontext() as ended:
            cli.main()
        report = json.loads(capsys.readouterr().out)
        if ended is not None:
            assert ended.value.code == 1  # an image failed in this run
        assert (report["exported"], report["failed"], report["resumed"]) == (
            5, {"truncated": 1}, resumed,
        )  # fmt: skip
        assert report["waits"]["encode"] > 0
        assert digests(out) == digests(tmp_path / "single")
        assert not list(out.glob(".*"))
        (out / "shard-00000001.safetensors").unlink()


@pytest.mark.slow
def test_sigterm_ends_an_export_like_ctrl_c(cluster: str, tmp_path: Path) -> None:
    """Ray once handled the signal, so the exit code was 15, 1 or -6, and temporary files
    remained."""
    images, out = tmp_path / "many", tmp_path / "out"
    images.mkdir()
    for number in range(200):
        (images / f"{number}.png").write_bytes(tiny_png(number))
    words = ["export", str(images), "--model", "tiny", "--out", str(out), "--shard-size", "2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "qwen_vit", *words, f"--ray={cluster}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 90
    while not list(out.glob("shard-*")) and time.monotonic() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=60)
    assert "the export saved" in stderr
    assert "; run the same command again to resume" in stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert running.returncode == 130
    assert 0 < len(list(out.glob("shard-*"))) < 100
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_a_workers_error_reaches_the_caller_and_releases_the_folder(
    cluster: str, images: Path, tmp_path: Path
) -> None:
    options = ExportOptions(on_error="raise")
    with pytest.raises(ImageError, match=r"x.png: a truncated PNG") as caught:
        export_on_ray("tiny", [str(images)], tmp_path / "out", options)
    assert "ray" not in str(caught.value)
    assert not (tmp_path / "out" / "lock").exists()
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    with pytest.raises(ImageError) as alone:
        export_features(encoder, [str(images)], tmp_path / "alone", options)
    assert fields(caught.value) == fields(alone.value)


@pytest.mark.slow
def test_the_images_of_a_reordered_tar_fail(cluster: str, tmp_path: Path) -> None:
    tar, out = str(tmp_path / "a.tar"), tmp_path / "out"
    members = {f"{number}.png": tiny_png(number) for number in range(4)}
    write_tar(tar, members)
    export_on_ray("tiny", [tar], out, SMALL)
    (out / "shard-00000001.safetensors").unlink()
    write_tar(tar, dict(reversed(members.items())))
    done = export_on_ray("tiny", None, out, SMALL)
    assert (done.exported, done.failed) == (2, {"missing": 2})


def fields(error: ImageError) -> tuple[str, ...]:
    return error.name, error.fact, error.expected, error.remedy, error.code, str(error)


def test_every_field_of_an_error_crosses_processes(cluster: str) -> None:
    """Python's own pickling of exceptions keeps only their first argument."""
    error = ImageError(
        "ratio of 333", name="a\tb.png", expected="at most 200", remedy="crop it", code="ratio"
    )

    @ray.remote  # type: ignore[untyped-decorator]
    def fail() -> None:
        raise error

    with pytest.raises(ImageError) as caught, _plain_errors():
        ray.get(fail.remote())
    assert type(caught.value) is ImageError
    assert fields(caught.value) == fields(error)


@pytest.mark.parametrize(
    ("wanted", "resources", "threads"),
    [
        (None, {"CPU": 16.0, "GPU": 1.0}, 4),  # 8 CPUs, for two shards at the same time
        (None, {"CPU": 128.0, "GPU": 8.0}, 4),
        (None, {"CPU": 256.0, "GPU": 2.0}, 8),
        (None, {"CPU": 2.0, "GPU": 2.0}, 2),
        (None, {"CPU": 64.0}, 1),
        (3, {"CPU": 64.0}, 3),
        (5, {"CPU": 16.0, "GPU": 1.0}, 5),
    ],
)
def test_workers_share_the_cores(
    wanted: int | None, resources: dict[str, float], threads: int
) -> None:
    """Each worker once took half of the cores for each shard, on a machine with eight GPUs."""
    assert _threads_of_a_shard(wanted, resources) == threads


def test_many_consecutive_failures_stop_the_workers(cluster: str, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.png").write_bytes(b"no image")
    options = ExportOptions(shard_size=2, max_failures=6)
    with pytest.raises(ExportError, match="stopped after 6 consecutive failures"):
        export_on_ray("tiny", [str(folder)], tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("shard-*"))) < 6
    assert not (tmp_path / "out" / "lock").exists()


def test_a_worker_makes_the_estimate_which_may_stop_the_export(
    cluster: str, images: Path, tmp_path: Path
) -> None:
    asked = []

    def refuse(estimate: Estimate) -> None:
        asked.append((estimate.images, estimate.rows))
        raise ExportError("too large")

    with pytest.raises(ExportError, match="too large"):
        export_on_ray("tiny", [str(images)], tmp_path / "out", SMALL, confirm=refuse)
    [(images_asked, rows)] = asked
    assert (images_asked, rows > 0) == (6, True)
    assert not list((tmp_path / "out").glob("shard-*"))
    assert not (tmp_path / "out" / "lock").exists()


def test_a_shard_on_a_workers_local_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(tiny_png(0))
    with (
        open_export(FakeEncoder(), [str(tmp_path / "images")], tmp_path / "out", SMALL) as plan,
        pytest.raises(
            ExportError,
            match=r"does not exist on this machine, although a worker wrote it\. .* all nodes",
        ),
    ):
        _size(plan, 0)


def test_a_worker_that_dies_too_often_is_an_error_with_a_remedy() -> None:
    words = r"died 26 times on one shard, .* run the same command"
    with pytest.raises(ExportError, match=words), _plain_errors():
        raise ray.exceptions.RayActorError


def test_without_ray_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExportError, match=re.escape(f"Run {install_command('ray')}")):
        export_on_ray("tiny", ["x"], "out")


def test_a_missing_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ExportError, match=r"no Ray cluster answers at photos/ .*pass its address"):
        export_on_ray("tiny", ["x"], "out", address="photos/")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:{}9999"])
def test_an_address_without_a_cluster_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Ray itself retries for minutes, and then ends the process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = address.format(free.getsockname()[1])
    with pytest.raises(ExportError, match=f"no Ray cluster answers at {place} .*ray start --head"):
        export_on_ray("tiny", ["x"], "out", address=place)


def test_an_invalid_number_of_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="decode_threads is 0"):
        export_on_ray("tiny", ["x"], tmp_path / "out", decode_threads=0)


def test_a_device_with_an_index_is_refused_for_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"device is 'cuda:1'\. Expected .* with Ray"):
        export_on_ray("tiny", ["x"], tmp_path / "out", device="cuda:1")
