"""Test videos in files, folders, tars, lists, commands and engine inputs."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image

from qwen_vit import (
    ExportOptions,
    ImageFeatures,
    ImageLimits,
    VideoFeatures,
    VideoOptions,
    export_features,
    load_features,
    write_features,
)
from qwen_vit.downstream import expand_placeholders, to_hf, to_sglang, to_vllm, to_vllm_chat_part
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export import retry
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.resume import read_start_options
from qwen_vit.feature_files.read import FeatureFolder
from qwen_vit.feature_files.verify import verify_features
from qwen_vit.loading import ImageLoader
from tests.support.fake_encoder import FakeEncoder
from tests.support.videos import make_video, numbered

SMALL = VideoOptions(min_pixels=784, max_pixels=56 * 84)
CLIP = VideoFeatures(
    "clip.mp4", torch.arange(96.0).view(12, 8), (2, 4, 6), (64, 96), ("10 bits to 8",),
    second_per_grid_t=1.25, frame_seconds=(0.0, 0.5, 1.25, 1.75),
)  # fmt: skip
STILL = ImageFeatures("a.png", torch.ones(6, 8), (1, 4, 6), (56, 84))


def export(inputs: list[str], out: str = "out", **options: Any) -> Any:
    fake: Any = FakeEncoder(min_pixels=784)
    return export_features(fake, inputs, out, ExportOptions(video=SMALL, **options))


def manifest_rows(out: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(f"{out}/manifest.parquet").to_pylist()
    return rows


def test_a_feature_file_keeps_the_kind_and_the_moments(folder: Path) -> None:
    path = write_features(folder / "f.safetensors", [STILL, CLIP], {})
    still, clip = load_features(path)
    assert type(still) is ImageFeatures
    assert isinstance(clip, VideoFeatures)
    assert torch.equal(clip.embeds, CLIP.embeds)
    assert (clip.second_per_grid_t, clip.frame_seconds) == (1.25, CLIP.frame_seconds)
    assert (clip.notes, clip.size_px) == (CLIP.notes, CLIP.size_px)


def test_an_export_takes_videos_in_folders_lists_and_tars(folder: Path) -> None:
    media = folder / "media"
    media.mkdir()
    make_video(media / "a.mp4", 60)
    make_video(media / "b.mkv", 30)
    Image.fromarray(numbered(3)).save(media / "c.png")
    (media / "torn.mov").write_bytes((media / "a.mp4").read_bytes()[:500])
    (media / "notes.csv").write_text("x")
    with tarfile.open(folder / "t.tar", "w") as tar:
        tar.add(media / "a.mp4", "in/a.mp4")
        tar.add(media / "c.png", "in/c.png")
    line = json.dumps({"id": "mine", "path": "media/a.mp4"})
    (folder / "list.jsonl").write_text(line + "\n")
    report = export(["media", "t.tar", "list.jsonl"])
    assert (report.exported, report.failed) == (6, {"truncated": 1})
    stored = load_features("out")
    assert list(stored.ids) == [
        "a.mp4",
        "b.mkv",
        "c.png",
        "t.tar/in/a.mp4",
        "t.tar/in/c.png",
        "mine",
    ]
    kinds = [isinstance(each, VideoFeatures) for each in stored]
    assert kinds == [True, True, False, True, False, True]
    clips = [stored["a.mp4"], stored["t.tar/in/a.mp4"], stored["mine"]]
    assert all(torch.equal(each.embeds, clips[0].embeds) for each in clips)
    assert all(
        isinstance(each, VideoFeatures) and each.frame_seconds == (0.0, 0.666667, 1.3, 1.966667)
        for each in clips
    )
    [failed] = stored.errors
    assert (failed.id, failed.stage) == ("torn.mov", "decode")
    kinds_and_states = [(row["kind"], row["status"]) for row in manifest_rows("out")]
    assert kinds_and_states == [
        ("video", "ok"), ("video", "ok"), ("image", "ok"), ("video", "error"), ("video", "ok"),
        ("image", "ok"), ("video", "ok"),
    ]  # fmt: skip
    policy = stored.metadata["image_policy"]["video"]
    assert policy["decoder"].startswith("PyAV ")
    assert policy["fps"] == 2.0
    assert isinstance(stored, FeatureFolder)
    facts = stored.open_shard(0).metadata["images"][0]
    assert (facts["kind"], facts["exif"], len(facts["sha256"])) == ("video", None, 64)


def test_resuming_with_other_frame_options_is_refused_if_there_are_videos(folder: Path) -> None:
    make_video(folder / "a.mp4", 30)
    export(["a.mp4"])
    fake: Any = FakeEncoder(min_pixels=784)
    with pytest.raises(ExportError, match=r"image_policy\.video\.fps was 2\.0, is 1\.0 now"):
        export_features(fake, ["a.mp4"], "out", ExportOptions(video=VideoOptions(fps=1.0)))
    Image.fromarray(numbered(3)).save(folder / "c.png")
    export(["c.png"], "images")
    assert "video" not in load_features("images").metadata["image_policy"]
    same = ExportOptions(video=VideoOptions(fps=1.0))
    assert export_features(fake, ["c.png"], "images", same).exported == 1


def test_an_extension_adds_the_first_video(folder: Path) -> None:
    """Each absent setting of videos was once a difference, so no extension could add a video."""
    Image.fromarray(numbered(3)).save(folder / "c.png")
    make_video(folder / "a.mp4", 30)
    export(["c.png"])
    with pytest.raises(ExportError) as caught:
        export(["c.png", "a.mp4"])
    assert "export: its images: 1 new, first a.mp4. To continue" in str(caught.value)
    assert "to add the new images, pass extend=True" in str(caught.value)
    with pytest.raises(ExportError, match=r"image_policy\.video\.as_video was absent, is True now"):
        export(["c.png", "a.mp4"], as_video=True, extend=True)
    assert export(["c.png", "a.mp4"], extend=True).exported == 2
    before = load_features("out")["a.mp4"].embeds
    assert read_start_options(folder / "out").options.video == SMALL
    shard = folder / "out" / "shard-00000001.safetensors"
    shard.unlink()
    assert export(["c.png", "a.mp4"]).exported == 2
    fake: Any = FakeEncoder(min_pixels=784)
    options = ExportOptions(video=replace(SMALL, fps=1.0), extend=True)
    with pytest.raises(ExportError, match=r"image_policy\.video\.fps was 2\.0, is 1\.0 now"):
        export_features(fake, ["c.png", "a.mp4"], "out", options)
    assert torch.equal(load_features("out")["a.mp4"].embeds, before)
    (folder / "out" / "export.json").unlink()
    assert export(["c.png", "a.mp4"]).exported == 2
    assert verify_features("out").problems == ()


def test_a_video_that_was_missing_is_tried_again_even_above_the_limits_on_images(
    folder: Path,
) -> None:
    """Reading it as an image once applied `max_file_bytes` of ImageLimits, so it stayed missing."""
    (folder / "media").mkdir()
    Path("media/a.mp4").symlink_to("../b.mp4")
    limits = ImageLimits(max_file_bytes=1_000)
    assert export(["media"], limits=limits).failed == {"missing": 1}
    make_video("b.mp4", 8)
    assert Path("b.mp4").stat().st_size > limits.max_file_bytes
    assert export(["media"], limits=limits).exported == 1


def test_a_video_that_did_not_fit_into_memory_is_first_loaded_in_a_child_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process once received the video as an image, so the export never tried it again."""
    make_video("a.mp4", 8)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ImageLoader, "load_video", no_memory)
        assert export(["a.mp4"]).failed == {"memory": 1}
    tried: list[Any] = []
    monkeypatch.setattr(retry, "load_in_child", lambda *arguments: tried.append(arguments))
    assert export(["a.mp4"]).exported == 1
    [(item, options, _, config)] = tried
    assert (item.id, options, config) == ("a.mp4", SMALL, FakeEncoder(min_pixels=784).image_config)


def test_an_export_reads_an_animation_as_a_video_on_request(folder: Path) -> None:
    pictures = [Image.fromarray(numbered(number, (84, 56))) for number in range(4)]
    pictures[0].save("a.gif", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save("still.gif")
    export(["a.gif", "still.gif"])
    assert [type(each) for each in load_features("out")] == [ImageFeatures, ImageFeatures]
    export(["a.gif", "still.gif"], "videos", as_video=True)
    assert [type(each) for each in load_features("videos")] == [VideoFeatures, ImageFeatures]
    assert [row["kind"] for row in manifest_rows("videos")] == ["video", "image"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov"])
def test_the_dry_run_counts_a_videos_rows_by_its_header(name: str, folder: Path) -> None:
    make_video(folder / name, 90)
    with tarfile.open("t.tar", "w") as tar:
        tar.add(name)
    fake: Any = FakeEncoder(min_pixels=784)
    options = ExportOptions(video=SMALL)
    estimate = estimate_export(fake, [name, "t.tar"], options)
    assert (estimate.images, estimate.unreadable) == (2, 0)
    assert estimate.rows == export_features(fake, [name, "t.tar"], "out", options).rows == 36


def test_vllm_takes_videos_with_their_own_seconds() -> None:
    data = to_vllm([STILL, CLIP])
    assert data["image"]["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert data["video"]["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert data["video"]["second_per_grid_ts"].tolist() == [1.25]
    assert to_vllm(videos=[CLIP])["video"]["second_per_grid_ts"].tolist() == [1.25]
    assert to_vllm([CLIP], second_per_grid_ts=[2.0])["video"]["second_per_grid_ts"].tolist() == [
        2.0
    ]
    assert [part["type"] for part in to_vllm_chat_part([CLIP, STILL])] == [
        "image_embeds", "video_embeds",
    ]  # fmt: skip
    pair = VideoFeatures("pair.mp4", torch.ones(6, 8), (1, 4, 6), second_per_grid_t=0.5)
    assert sorted(to_vllm([pair])) == ["video"]


def test_sglang_refuses_a_video_of_one_step_as_well() -> None:
    pair = VideoFeatures("pair.mp4", torch.ones(6, 8), (1, 4, 6))
    for clip in (pair, CLIP):
        with pytest.raises(ArgumentError, match=r"\.mp4: its grid has . time steps?, and SGLang"):
            to_sglang([clip])


def test_transformers_gets_videos_by_their_own_arguments() -> None:
    text = expand_placeholders(
        "<|video_pad|>x<|image_pad|>", [STILL.grid_thw], video_grids=[CLIP.grid_thw]
    )
    assert (text.count("<|video_pad|>"), text.count("<|image_pad|>")) == (12, 6)
    ids = torch.tensor([[*[151_656] * 12, 7, *[151_655] * 6]])
    arguments = to_hf([STILL, CLIP], ids)
    assert arguments["mm_token_type_ids"].tolist() == [[*[2] * 12, 0, *[1] * 6]]
    assert arguments["second_per_grid_ts"].tolist() == [1.25]
    assert torch.equal(arguments["mm_encoder_outputs"]["video"].pooler_output[0], CLIP.embeds)
    with pytest.raises(ArgumentError, match="the video token 151656, with lengths"):
        to_hf([CLIP], ids[:, 1:12])
    with pytest.raises(ArgumentError, match=r"has 0 <\|video_pad\|> for 1 video"):
        expand_placeholders("", [], video_grids=[CLIP.grid_thw])


def test_the_commands_accept_videos(qwen_vit: Any, folder: Path) -> None:
    make_video(folder / "clip.mp4", 60)
    small = ("--min-frame-pixels", "784", "--max-frame-pixels", "4704", "--device", "cpu")
    done = qwen_vit(
        "encode", "clip.mp4", "--model", "tiny", "--out", "f.safetensors", "--json", *small
    )
    assert done.code == 0, done.err
    [image] = json.loads(done.out)["images"]
    assert image["grid_thw"] == [2, 4, 6]
    [clip] = load_features("f.safetensors")
    assert isinstance(clip, VideoFeatures)
    assert clip.frame_seconds[-1] == pytest.approx(59 / 30, abs=1e-5)
    done = qwen_vit(
        "export",
        "clip.mp4",
        "--model",
        "tiny",
        "--out",
        "out",
        "--n-frames",
        "2",
        "--dry-run",
        *small,
    )
    assert done.code == 0, done.err
    assert "rows" in done.out
    done = qwen_vit("encode", "clip.mp4", "--model", "tiny", "--out", "g.safetensors", "--fps", "0")
    assert done.code == 2
    assert "fps is 0.0" in done.err


def test_the_mean_of_a_video_is_one_row(folder: Path) -> None:
    make_video(folder / "a.mp4", 30)
    export(["a.mp4"], output="mean")
    [clip] = load_features("out")
    assert np.asarray(clip).shape == (1, 16)
