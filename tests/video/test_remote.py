"""Test that videos in object storage are copied to a temporary file and read like other videos."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_vit import ExportOptions, VideoOptions, export_features, load_features
from qwen_vit.export.estimate import estimate_export
from qwen_vit.video.options import VideoLimits
from tests.support.fake_encoder import FakeEncoder
from tests.support.s3_server import BUCKET, S3Server, s3_server
from tests.support.videos import make_video

SMALL = VideoOptions(min_pixels=784, max_pixels=56 * 84)
ADDRESS = f"s3://{BUCKET}/media"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Make a bucket with a video in a file and a video in a tar, which are also in the folder
    `media`."""
    monkeypatch.chdir(tmp_path)
    Path("media").mkdir()
    make_video(Path("media/a.mp4"), n_frames=8)
    with tarfile.open("media/t.tar", "w") as tar:
        tar.add("media/a.mp4", "in/a.mp4")
    with s3_server() as server:
        server.put_folder(Path("media"), "media")
        yield server


def export(inputs: str, out: str, **options: Any) -> Any:
    fake: Any = FakeEncoder(min_pixels=784)
    return export_features(fake, [inputs], out, ExportOptions(video=SMALL, **options))


def test_videos_have_the_features_of_local_ones(server: S3Server) -> None:
    fake: Any = FakeEncoder(min_pixels=784)
    options = ExportOptions(video=SMALL)
    for inputs, out in (("media", "local"), (ADDRESS, "remote")):
        assert export(inputs, out).exported == 2
    local, remote = load_features("local"), load_features("remote")
    assert list(remote.ids) == list(local.ids) == ["a.mp4", "t.tar/in/a.mp4"]
    for found, expected in zip(remote, local, strict=True):
        assert found.embeds.equal(expected.embeds)
        assert found.frame_seconds == expected.frame_seconds  # type: ignore[attr-defined]
    counts = [estimate_export(fake, [each], options) for each in ("media", ADDRESS)]
    assert counts[0].rows == counts[1].rows > 0


def test_limits_and_replaced_objects(server: S3Server) -> None:
    done = export(ADDRESS, "small", video_limits=VideoLimits(max_file_bytes=100))
    assert done.failed == {"file-too-large": 2}
    assert [each for each in server.requests if "a.mp4" in each.path and each.method == "GET"] == []
    export(ADDRESS, "out")
    server.put("media/a.mp4", Path("media/a.mp4").read_bytes() + b"\0" * 9)
    Path("out/shard-00000000.safetensors").unlink()
    done = export("out/listing.jsonl", "out")
    assert done.failed == {"changed": 1}
