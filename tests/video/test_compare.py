"""Test qwen-vit compare on a video: rows of the processor, and stages of the tower."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import VideoOptions, VisionEncoder
from qwen_vit.compare import huggingface, videos
from qwen_vit.compare.golden import load_golden
from qwen_vit.compare.report import write_report
from qwen_vit.compare.result import FrameChoice, ImageComparison, SampledFrames
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.text import as_text, frame_lines
from qwen_vit.config import Grid
from qwen_vit.video.sampling import Timeline
from tests.support.videos import make_video, number_in

SMALL = VideoOptions(n_frames=4, min_pixels=784, max_pixels=56 * 84)


def test_a_video_agrees_with_hugging_face_at_every_stage(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    done = compare(encoder, [clip, "tests/photographs/none.png"], video=SMALL, keep_maps=True)
    [image] = done.images
    assert image.frames is not None
    assert (image.frames.indices, image.frames.n_frames) == ((0, 4, 7, 11), 12)
    qwen, transformers = image.frames.references
    assert (qwen.is_judged, qwen.passed, qwen.indices) == (True, True, (0, 4, 7, 11))
    assert (transformers.is_judged, transformers.passed) == (False, False)
    assert (transformers.indices, transformers.differ) == ((0, 3, 6, 9), 3)
    assert (image.grid.t, image.grid.h, image.grid.w) == (2, 4, 6)
    assert image.problems == []
    assert image.tower_input == "uint8 pixels"
    [pixels] = image.preprocessing
    assert pixels.values_differ == 0
    assert image.maps is not None
    assert image.maps.rgb.shape == (56, 84, 3)
    assert [step.step for step in image.maps.steps] == [0, 1]
    assert [number_in(step.rgb.numpy()) for step in image.maps.steps] == [0, 7]
    merger = image.stages[-1]
    errors = [step.ours for step in image.steps]
    assert len(errors) == 2
    assert min(errors) <= merger.ours <= max(errors)  # the steps' errors bound it
    assert torch.equal(image.maps.steps[0].ours, image.maps.stages["merger"][0])
    text = as_text(done, has_stages=True)
    assert "agrees: 1 of 1 video (1 skipped), 7 stages" in text
    assert "4 of 12 frames, at 30 a second" in text
    assert "step 1" in text
    page = write_report(tmp_path / "page", done).read_text("utf-8")
    assert "Frames over time" in page
    assert page.count("error ") >= 2
    assert [name for name, _ in done.skipped] == ["tests/photographs/none.png"]


def test_other_frames_than_the_references_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison asks an installed library for its frames. The result counts if our options
    follow this library."""
    timeline, moments = Timeline(60, 30.0), (0.0, 0.7, 1.3, 2.0)
    monkeypatch.setattr(videos, "_run_qwen", lambda *_: [0, 20, 40, 59])
    monkeypatch.setattr(videos, "version", lambda package: "0.0.99")
    found = videos.compare_frames(timeline, VideoOptions(), moments, "a.mp4")
    qwen = found.references[0]
    assert (qwen.reference, qwen.is_run) == ("qwen-vl-utils 0.0.99", True)
    assert (qwen.differ, qwen.passed, qwen.is_judged) == (1, False, True)
    image = ImageComparison("a.mp4", "", (64, 96), Grid(2, 4, 6), "", (), (), None, frames=found)
    assert image.problems == ["frames: 1 differ from those of qwen-vl-utils 0.0.99"]
    follows = VideoOptions(sampling="transformers", start=0.5)
    of_part = videos.compare_frames(timeline, follows, moments, "a.mp4").references[1]
    assert (of_part.indices, of_part.is_judged) == (None, False)  # it samples whole videos


def test_a_library_that_rejects_the_options_is_not_called_missing() -> None:
    rejected = FrameChoice("transformers 5.23", False, False, None, 2)
    sampled = SampledFrames("qwen", 60, 30.0, (0, 59), (0.0,), (rejected,))
    assert frame_lines(sampled)[1:] == ["transformers 5.23: takes no frames with these options"]


def test_a_golden_of_a_video_is_compared_with_its_file(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    compare(encoder, [clip], video=SMALL, save_golden=tmp_path / "g.safetensors")
    golden = load_golden(tmp_path / "g.safetensors")
    [image] = compare_with_golden(encoder, golden, [clip], video=SMALL).images
    assert image.problems == []
    assert image.preprocessing[0].values_differ == 0
    assert len(image.steps) == 2


def test_exchanged_frames_of_a_pair_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    real = huggingface.process_pairs

    def exchanged(frames: Any, *more: Any) -> Any:
        return real([frames[at ^ 1] for at in range(len(frames))], *more)

    monkeypatch.setattr("qwen_vit.compare.videos.process_pairs", exchanged)
    [image] = compare(encoder, [clip], video=SMALL).images
    assert any("different grey level" in problem for problem in image.problems)
