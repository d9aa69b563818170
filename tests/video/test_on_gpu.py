"""Test that a video has the same features if a GPU resizes its decoded frames."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import FailedImage, Video, VideoFeatures, VisionEncoder, batching
from qwen_vit import encoder as encoder_module
from qwen_vit.errors import ImageError
from qwen_vit.images.frames import Frames
from qwen_vit.images.patches import Patches
from qwen_vit.video.load import load_video
from tests.support.encoders import tiny
from tests.support.towers import gpu
from tests.support.videos import make_video

SMALL: dict[str, Any] = {"min_pixels": 784, "max_pixels": 28 * 56}


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Make the loader return frames. Record the number of frames of each batch's parts."""
    batches: list[list[int]] = []

    def resize(parts: Sequence[Any], *_: Any, **__: Any) -> Patches:
        batches.append([len(part.blocks) for part in parts if isinstance(part, Frames)])
        return Patches.cat(part if isinstance(part, Patches) else part.patchify() for part in parts)

    monkeypatch.setattr(encoder_module, "resizes_on", lambda device: True)
    monkeypatch.setattr(batching, "patches_on_gpu", resize)
    return batches


@pytest.fixture
def clip(tmp_path: Path) -> Video:
    return Video(make_video(tmp_path / "clip.mp4", 12), n_frames=6, **SMALL)


@pytest.mark.parametrize(("budget", "expected"), [(4_096, [[6]]), (8, [[4], [2]])])
def test_a_video_of_frames_has_the_features_of_its_patches(
    budget: int, expected: list[list[int]], clip: Video, as_on_gpu: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", budget)
    found = tiny().encode_video(clip)
    assert as_on_gpu == expected
    with monkeypatch.context() as plain:
        plain.setattr(encoder_module, "resizes_on", lambda device: False)
        right = tiny().encode_video(clip)
    assert as_on_gpu == expected
    assert isinstance(found, VideoFeatures)
    assert torch.equal(found.embeds, right.embeds)
    assert found.frame_seconds == right.frame_seconds
    assert (found.grid_thw, found.size_px) == (right.grid_thw, right.size_px)


def out_of_memory(*_: Any, **__: Any) -> Patches:
    raise torch.cuda.OutOfMemoryError("no room")


def test_frames_without_gpu_memory_are_resized_on_the_cpu(
    clip: Video, as_on_gpu: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    right = tiny().encode_video(clip)
    monkeypatch.setattr(batching, "patches_on_gpu", out_of_memory)
    with caplog.at_level(logging.WARNING, "qwen_vit"):
        found = tiny().encode_video(clip)
    assert torch.equal(found.embeds, right.embeds)
    assert "the CPU resizes" in caplog.text


def test_a_damaged_video_of_frames_fails_alone(
    clip: Video, tmp_path: Path, as_on_gpu: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ImageError("a frame is damaged", name="clip.mp4", code="damaged")

    monkeypatch.setattr("qwen_vit.video.load._keep", fails)
    bad = tiny().encode_video([clip, clip], on_error="skip")
    assert [isinstance(each, FailedImage) and each.code for each in bad] == ["damaged"] * 2
    assert not [each for each in threading.enumerate() if each.name.startswith("qwen-vit")]


@gpu
@pytest.mark.parametrize("size", [(1280, 720), (854, 480)])
def test_a_gpu_gives_a_file_the_bits_of_its_patches(size: tuple[int, int], tmp_path: Path) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda")
    video = Video(make_video(tmp_path / "clip.mp4", 90, size=size), n_frames=60)
    found = encoder.encode_video([video] * 3)
    right = encoder.encode([load_video(video, encoder.image_config).patches])[0]
    for each in found:
        assert torch.equal(each.embeds, right.embeds)
