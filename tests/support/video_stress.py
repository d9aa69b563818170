"""Load thousands of videos with a fake tower, and measure memory and open files."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qwen_vit.batching import BatchEncoder
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.features import FailedImage, VideoFeatures
from qwen_vit.images.image import ImageLimits
from qwen_vit.loading import ImageLoader
from qwen_vit.outputs import OutputOptions
from qwen_vit.video.options import Video
from tests.support.process_memory import memory_mb, open_files
from tests.support.videos import make_video

KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"options": {"g": "6"}},
    "hevc.mkv": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "turned.mov": {"rotation": 90},
    "mpeg4.avi": {"codec": "mpeg4"},
}
SIZE = {"min_pixels": 784, "max_pixels": 56 * 84}
PIECE = 48  # patches: a video of 8 frames has two pieces, and a video of 2 frames has one
WIDTH = 64
MAX_GROWTH_MB, MAX_FILES = 30, 5


def flat_memory_of_videos(folder: Path, *, clips: int, first: int) -> dict[str, Any]:
    """Measure memory and open files over many clips, of which every tenth is incomplete."""
    paths = [make_video(folder / name, 12, size=(320, 240), **kind) for name, kind in KINDS.items()]
    torn = folder / "torn.mp4"
    torn.write_bytes(Path(paths[0]).read_bytes()[:900])
    config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    loader = ImageLoader(
        config, ImageConfig.from_json({}), "auto", ImageLimits(), "skip", piece_patches=PIECE
    )

    def videos() -> Iterator[Video]:
        for count in range(clips):
            source = str(torn) if count % 10 == 9 else paths[count % len(paths)]
            yield Video(source, n_frames=(2, 8)[count % 2], **SIZE)  # type: ignore[arg-type]

    def forward(pixels: Any, grids: Any, *_: Any) -> Any:
        return torch.zeros(len(pixels) // 4, WIDTH)

    encoder = BatchEncoder(forward, torch.device("cpu"), config, OutputOptions(), "skip")
    first, every = min(first, clips // 2), max(1, clips // 50)
    samples: list[tuple[float, int]] = []
    failed = 0
    encoded = encoder.encode(loader.jobs(videos(), is_ahead=True), threads=2)
    for count, each in enumerate(encoded, start=1):
        assert isinstance(each, (VideoFeatures, FailedImage))
        failed += isinstance(each, FailedImage)
        if count >= first and count % every == 0:
            gc.collect()
            samples.append((memory_mb(os.getpid())[0], open_files(os.getpid())))
    memory, files = zip(*samples, strict=True)
    figures = {
        "clips": clips,
        "failed": failed,
        "samples": len(samples),
        "own_mb_after_first": round(memory[0], 1),
        "own_mb_most": round(max(memory), 1),
        "grown_mb": round(max(memory) - memory[0], 1),
        "open_files_after_first": files[0],
        "open_files_most": max(files),
    }
    assert failed == clips // 10, figures
    assert figures["grown_mb"] <= MAX_GROWTH_MB, figures
    assert max(files) <= files[0] + MAX_FILES, figures
    return figures
