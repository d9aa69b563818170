"""qwen-vit compare on a video: rows against Hugging Face's processor, stages against its tower."""

from pathlib import Path
from typing import Any

import pytest

from qwen_vit import VideoOptions, VisionEncoder
from qwen_vit.compare import huggingface
from qwen_vit.compare.run import compare
from tests.support.videos import make_video

SMALL = VideoOptions(n_frames=4, min_pixels=784, max_pixels=56 * 84)


def test_a_video_agrees_with_hugging_face_at_every_stage(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    done = compare(encoder, [clip, "tests/images/none.png"], video=SMALL, keep_maps=True)
    [image] = done.images
    assert (image.grid.t, image.grid.h, image.grid.w) == (2, 4, 6)
    assert image.problems == []
    assert image.tower_input == "uint8 pixels"
    [pixels] = image.preprocessing
    assert pixels.values_differ == 0
    assert image.maps is not None
    assert image.maps.rgb.shape == (56, 84, 3)
    assert [name for name, _ in done.skipped] == ["tests/images/none.png"]


def test_rows_with_the_frames_of_a_pair_exchanged_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    real = huggingface.process_pairs

    def exchanged(frames: Any, *more: Any) -> Any:
        return real([frames[at ^ 1] for at in range(len(frames))], *more)

    monkeypatch.setattr("qwen_vit.compare.run.process_pairs", exchanged)
    [image] = compare(encoder, [clip], video=SMALL).images
    assert any("different grey level" in problem for problem in image.problems)
