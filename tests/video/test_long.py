"""Test that time and memory depend only on the sampled frames, for long and many videos."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from qwen_vit import VideoOptions
from qwen_vit.common.prefetch import work_ahead
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.images.image import ImageLimits
from qwen_vit.loading import ImageLoader
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits
from qwen_vit.video.reader import open_video
from tests.support.process_memory import memory_mb
from tests.support.videos import make_video

CONFIG = ImageConfig.from_json({})
SIZE = {"min_pixels": 784, "max_pixels": 56 * 84}


@pytest.mark.slow
def test_four_hours_at_one_frame_a_second(tmp_path: Path) -> None:
    """The sampler takes 768 of 14,400 frames evenly, each frame at its own time."""
    path = make_video(tmp_path / "a.mkv", 14_400, rate=1, options={"g": "300"})
    with open_video(path, path, VideoLimits()) as video:
        assert (video.timeline.n_frames, video.timeline.rate) == (14_400, 1.0)
    loaded = load_video(Video(path, **SIZE), CONFIG, threads=2)  # type: ignore[arg-type]
    moments = loaded.timing.frame_seconds
    assert len(moments) == 768
    assert (moments[0], moments[-1]) == (0.0, 14_399.0)
    steps = [after - before for before, after in pairwise(moments)]
    assert {18.0, 19.0} == {*steps}
    assert loaded.patches.grids[0].t == 384


@pytest.mark.slow
@pytest.mark.parametrize("on_gpu", [False, True])
def test_memory_is_flat_over_a_thousand_clips(on_gpu: bool, tmp_path: Path) -> None:
    """The loader frees each decoder, container and frame, so 800 clips after the first 200 add no
    memory."""
    path = make_video(tmp_path / "a.mp4", 12, size=(320, 240))
    config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    loader = ImageLoader(
        config,
        CONFIG,
        "auto",
        ImageLimits(),
        "raise",
        video=VideoOptions(n_frames=4, **SIZE),  # type: ignore[arg-type]
        on_gpu=on_gpu,
    )

    def jobs() -> Iterator[str]:
        yield from (path for _ in range(1_000))

    held = []
    for count, loaded in enumerate(work_ahead(loader.jobs(jobs(), is_ahead=True), threads=2), 1):
        assert loaded.patches is not None
        if count in (200, 1_000):
            held.append(memory_mb(os.getpid())[0])
    print(f"{held[0]:.0f} MB after 200 clips, {held[1]:.0f} MB after 1,000")
    assert held[1] < held[0] + 30
