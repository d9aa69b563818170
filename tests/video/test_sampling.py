"""Compare the sampled frames and sizes with qwen-vl-utils and transformers, case by case.

tools/make_video_golden.py recorded the library's answers. transformers' own functions run here.
Their module needs torchvision, so the tests take the functions from its source.
"""

import ast
import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.video.options import VideoOptions
from qwen_vit.video.sampling import Timeline, frame_size, pixel_limits, sample_frames, shown_frames
from tests.support.video_cases import CASES, GOLDEN, SamplingCase, digest, sampling_cases

FACTOR = 28
HF_FILE = "models/qwen2_vl/video_processing_qwen2_vl.py"


def ours(case: SamplingCase, sampling: str = "qwen") -> list[Any] | None:
    options = VideoOptions(**case.options, sampling=sampling)  # type: ignore[arg-type]
    try:
        indices, rate = sample_frames(Timeline(case.n_frames, case.rate), options, "a.mp4")
        size = frame_size(case.height, case.width, len(indices), options, FACTOR, "a.mp4")
    except (ImageError, ArgumentError):
        return None
    return [digest(indices), rate, *size]


def is_ours_alone(case: SamplingCase) -> bool:
    """Return cases that a library rejects and this package accepts: one frame, or a side that
    became 0."""
    return case.n_frames == 1 or max(case.height, case.width) > 20 * min(case.height, case.width)


def test_frames_and_sizes_are_those_of_qwen_vl_utils() -> None:
    golden = json.loads(GOLDEN.read_text())["rows"]
    assert len(golden) == CASES
    equal = 0
    for case, theirs in zip(sampling_cases(), golden, strict=True):
        sampled = ours(case)
        if theirs is None:
            assert sampled is None or is_ours_alone(case), case
            continue
        assert sampled == theirs, case
        equal += 1
    assert equal >= 2_000
    print(f"{equal} of {CASES} cases equal; the library refuses the others")


def independent(case: SamplingCase) -> list[Any] | None:
    """Compute the authors' rules a second time, with NumPy instead of torch."""
    options, first, last = case.options, 0, case.n_frames - 1
    if "start" in options:
        first = math.ceil(min(options["start"], case.n_frames / case.rate) * case.rate)
    if "end" in options:
        last = min(last, math.floor(min(options["end"], case.n_frames / case.rate) * case.rate))
    total = last - first + 1
    if first >= last:
        return None
    if "n_frames" in options:
        count = int(np.rint(options["n_frames"] / 2)) * 2
    else:
        target_frames = total / case.rate * options.get("fps", 2.0)
        most = options.get("max_frames", min(768, total)) // 2 * 2
        count = int(min(max(target_frames, 4), most, total) // 2) * 2
    if not 2 <= count <= total:
        return None
    # torch.linspace computes from both ends towards the middle, in float32.
    step = np.float32(np.float32(last - first) / np.float32(count - 1))
    at = np.arange(count, dtype=np.float32)
    forward = np.float32(first) + step * at
    backward = np.float32(last) - step * (np.float32(count - 1) - at)
    positions = np.where(np.arange(count) < count // 2, forward, backward)
    return np.rint(positions).astype(np.int64).tolist()


def test_frames_are_those_of_a_second_derivation() -> None:
    compared = moved = 0
    for case in sampling_cases():
        sampled = independent(case)
        if sampled is None:
            continue
        options = VideoOptions(**case.options)
        indices, _ = sample_frames(Timeline(case.n_frames, case.rate), options, "a.mp4")
        assert len(indices) == len(sampled), case
        # A fused multiply-add may round a position at .5 in the other direction.
        differ = [(a, b) for a, b in zip(indices, sampled, strict=True) if a != b]
        assert all(abs(a - b) == 1 for a, b in differ), case
        compared += len(sampled)
        moved += len(differ)
    assert compared > 100_000
    assert moved <= compared * 1e-3
    print(f"{compared} indices, of which {moved} at .5 fall on the neighbour")


def hf_functions() -> Any:
    """Return transformers' own sample_frames and smart_resize, from the installed source."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / HF_FILE).read_text())
    names = ("sample_frames", "smart_resize")
    found: list[ast.stmt] = []
    for each in ast.walk(tree):
        if not isinstance(each, ast.FunctionDef) or each.name not in names:
            continue
        found.append(each)
        each.returns = None
        for argument in each.args.args:
            argument.annotation = None
    space: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(ast.Module(found, []), HF_FILE, "exec"), space)  # run the installed source
    return SimpleNamespace(**{name: space[name] for name in names})


def test_frames_and_sizes_are_those_of_transformers() -> None:
    theirs = hf_functions()
    processor = SimpleNamespace(
        num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768
    )
    equal = refused = 0
    for case in sampling_cases():
        options = {k: v for k, v in case.options.items() if k not in ("start", "end")}
        whole_video = SamplingCase(case.n_frames, case.rate, case.height, case.width, options)
        sampled = ours(whole_video, "transformers")
        metadata = SimpleNamespace(total_num_frames=case.n_frames, fps=case.rate)
        sampler_options = {"num_frames": options["n_frames"]} if "n_frames" in options else {}
        sampler_options |= {} if sampler_options else {"fps": options.get("fps", 2.0)}
        try:
            indices = theirs.sample_frames(
                processor, metadata, max_frames=options.get("max_frames"), **sampler_options
            ).tolist()
            size = theirs.smart_resize(
                case.height, case.width, FACTOR, options.get("min_pixels", 128 * 784),
                options.get("max_pixels", 768 * 784),
            )  # fmt: skip
        except (ValueError, ZeroDivisionError, RuntimeError):
            assert sampled is None or is_ours_alone(case), case
            refused += 1
            continue
        if options.get("max_pixels", 768 * 784) < options.get("min_pixels", 128 * 784):
            assert sampled is None  # transformers ignores one of the two limits
            continue
        rate = len(indices) / case.n_frames * case.rate
        assert sampled == [digest(indices), rate, *size], case
        equal += 1
    assert equal >= 2_000
    print(f"{equal} of {CASES} cases equal, {refused} refused")


def test_a_varying_rate_takes_the_frame_that_is_shown() -> None:
    """The video shows slides at 0, 20 and 21 s of 24 s, so its middle shows the first slide."""
    slides = np.array([0.0, 20.0, 21.0])
    assert shown_frames([0, 1, 2], slides, Timeline(3, 3 / 24)) == [0, 0, 0]


@pytest.mark.parametrize("jitter", [0.0, 0.0005, 0.012])
def test_jitter_does_not_move_a_frame(jitter: float) -> None:
    late = jitter * np.where(np.arange(300) % 2, 1, -1)
    late[0] = 0.0  # moments are relative to the first frame
    indices, _ = sample_frames(Timeline(300, 30.0), VideoOptions(), "a.mp4")
    assert shown_frames(indices, np.arange(300) / 30 + late, Timeline(300, 30.0)) == indices


def test_a_long_video_gets_smaller_frames_unless_transformers_samples() -> None:
    assert pixel_limits(768, VideoOptions(), FACTOR) == (100_352, 235_200.0)
    assert pixel_limits(768, VideoOptions(sampling="transformers"), FACTOR) == (100_352, 602_112)
    assert pixel_limits(10_000, VideoOptions(), FACTOR)[1] == int(100_352 * 1.05)


REFUSED_OPTIONS: list[dict[str, Any]] = [
    {"fps": 0}, {"fps": float("nan")}, {"n_frames": 1}, {"n_frames": 2.5}, {"max_frames": 0},
    {"n_frames": 4, "fps": 1.0}, {"n_frames": 4, "max_frames": 8},
    {"start": -1.0}, {"start": 5.0, "end": 5.0}, {"min_pixels": 0}, {"sampling": "uniform"},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED_OPTIONS, ids=str)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        VideoOptions(**options)


def test_the_default_fps_goes_with_a_number_of_frames() -> None:
    assert VideoOptions(n_frames=4, fps=2.0).n_frames == 4


def test_a_part_without_frames_and_too_many_frames_are_errors_with_codes() -> None:
    with pytest.raises(ImageError, match=r"a\.mp4: fewer than two of its 300 frames") as outside:
        sample_frames(Timeline(300, 30.0), VideoOptions(start=60.0), "a.mp4")
    assert outside.value.code == "video-range"
    with pytest.raises(ImageError, match="400 of 300") as many:
        sample_frames(Timeline(300, 30.0), VideoOptions(n_frames=400), "a.mp4")
    assert many.value.code == "video-frames"
