"""Test that the kernels, in Triton's interpreter, give frame pairs the rows of the CPU path."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import Video
from qwen_vit.config import ImageConfig
from qwen_vit.images import on_gpu
from qwen_vit.images.frames import FrameMemory, Frames
from qwen_vit.images.memory import decoding_memory
from qwen_vit.images.patches import Patches
from qwen_vit.kernels import resize
from qwen_vit.video import load
from qwen_vit.video.load import load_pieces, load_video
from tests.support.images import noise
from tests.support.towers import CPU, gpu
from tests.support.triton_interpreter import RUNS_HERE
from tests.support.videos import make_video

CONFIG = ImageConfig.from_json({})
needs_interpreter = pytest.mark.skipif(not RUNS_HERE, reason="Triton 3.6 with NumPy 2.4")


def frames_of(images: list[Image.Image], new_size: tuple[int, int]) -> Frames:
    found: list[FrameMemory] = []
    for image in images:
        data = image.tobytes("raw", "RGBX")
        found.append((memoryview(data), data))
    return Frames.of(found, images[0].size, new_size, CONFIG, "clip")


def rows_by_pillow(images: list[Image.Image], new_size: tuple[int, int]) -> torch.Tensor:
    """Return each patch's values by plain indexing, in the order channel, frame, row, column."""
    resized = [np.asarray(each.resize(new_size, Image.Resampling.BICUBIC)) for each in images]
    pairs = [*resized, *resized[-1:]] if len(resized) % 2 else resized
    rows = []
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        both = np.stack([first, second])  # (frame, y, x, c)
        for unit_y in range(0, new_size[1], 28):
            for unit_x in range(0, new_size[0], 28):
                for y in (unit_y, unit_y + 14):
                    for x in (unit_x, unit_x + 14):
                        cut = both[:, y : y + 14, x : x + 14]
                        rows.append(cut.transpose(3, 0, 1, 2).reshape(-1))
    return torch.from_numpy(np.stack(rows))


CASES = [  # (frames, old size, new size)
    (4, (70, 40), (56, 28)),
    (3, (40, 70), (56, 84)),  # an odd count; both axes grow
    (1, (50, 28), (28, 28)),  # one axis
    (2, (56, 28), (56, 28)),  # no resize
]


@pytest.mark.parametrize(("count", "old", "new"), CASES)
@needs_interpreter
def test_frame_pairs_have_the_bits_of_pillow(
    count: int, old: tuple[int, int], new: tuple[int, int], interpreted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    images = [Image.fromarray(noise(*old[::-1], seed=seed)) for seed in range(count)]
    frames, right = frames_of(images, new), rows_by_pillow(images, new)
    assert torch.equal(frames.patchify().pixels, right)
    for most in (2**26, 1):  # in one step, and in many steps
        monkeypatch.setattr(on_gpu, "FRAME_BYTES", most)
        made = on_gpu.patches_on_gpu([frames], CPU, pinned_rows=0)
        assert torch.equal(made.pixels, right)
        assert made.grids == frames.grids


@needs_interpreter
def test_frames_and_patches_of_videos_are_joined_in_order(interpreted: None) -> None:
    images = [Image.fromarray(noise(40, 70, seed=seed)) for seed in range(4)]
    parts = [frames_of(images[:2], (56, 28)), frames_of(images[2:], (28, 28))]
    right = [part.patchify() for part in parts]
    joined = on_gpu.patches_on_gpu([right[1], *parts, right[0]], CPU, pinned_rows=0)
    order = [right[1], right[0], right[1], right[0]]
    assert torch.equal(joined.pixels, torch.cat([each.pixels for each in order]))


def test_frames_of_one_size_share_their_weights() -> None:
    frames = frames_of([Image.new("RGB", (70, 40))] * 6, (56, 28))
    passes = on_gpu.plan_passes([frames] * 6)
    assert [len({each.first_weight for each in found}) for found in passes.rounds] == [1, 1]
    plan = resize.ResizePlan.of(passes.rounds, [])
    assert plan.n_weights == sum(found[0].n_integers for found in passes.rounds)
    assert [each.n_programs for each in plan.weights] == [1, 1]


OPTIONS: dict[str, Any] = {"n_frames": 10, "min_pixels": 784, "max_pixels": 56 * 84}


@pytest.fixture
def clip(tmp_path: Path, request: pytest.FixtureRequest) -> Video:
    return Video(make_video(tmp_path / "clip.mp4", 12, **request.param), **OPTIONS)


KINDS: list[dict[str, Any]] = [{}, {"size": (98, 66)}, {"rotation": 90}, {"pix_fmt": "yuv444p"}]


@pytest.mark.parametrize("clip", KINDS, indirect=True)
def test_a_file_gives_frames_with_the_rows_of_the_cpu_path(clip: Video) -> None:
    loaded = load_video(clip, CONFIG)
    found = [*load_pieces(clip, CONFIG, most=48, on_gpu=True, threads=2)]
    assert len(found) > 1
    assert all(isinstance(each.decoded, Frames) for each in found)
    assert torch.equal(Patches.cat(each.patches for each in found).pixels, loaded.patches.pixels)
    assert sum(each.decoded.grids[0].t for each in found) == loaded.patches.grids[0].t
    assert [each.timing for each in found] == [loaded.timing] * len(found)
    height, width = found[0].size_px
    for each in found:
        assert each.decoded.n_bytes == 4 * height * width * 2 * each.decoded.grids[0].t


@pytest.mark.parametrize("clip", KINDS[:1], indirect=True)
def test_large_pieces_and_small_machines_resize_on_the_cpu(
    clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "GPU_BYTES", 1_000)
    [large] = load_pieces(clip, CONFIG, on_gpu=True)
    assert isinstance(large.decoded, Patches)
    monkeypatch.undo()
    decoding_memory.set_total(100_000)
    try:
        [tight] = load_pieces(clip, CONFIG, on_gpu=True)
    finally:
        decoding_memory.set_total(None)
    assert isinstance(tight.decoded, Patches)


@gpu
@pytest.mark.parametrize("size", [(1280, 720), (854, 480), (1920, 1080)])
def test_a_gpu_has_the_rows_of_the_cpu_path(size: tuple[int, int], tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", 60, size=size)
    video = Video(path, n_frames=46)
    right = load_video(video, CONFIG).patches.pixels
    pieces = [*load_pieces(video, CONFIG, most=32_768, on_gpu=True, threads=2)]
    assert all(isinstance(each.decoded, Frames) for each in pieces)
    device = torch.device("cuda")
    made = [
        on_gpu.patches_on_gpu([each.decoded], device, pinned_rows=0).pixels.cpu() for each in pieces
    ]
    assert torch.equal(torch.cat(made), right)
