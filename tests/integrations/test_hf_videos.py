"""Test that features of videos give the same answers in transformers as the videos' rows."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.compare.huggingface import process_pairs
from qwen_vit.compare.tolerance import relative_error
from qwen_vit.downstream import expand_placeholders, to_hf
from qwen_vit.errors import ArgumentError
from qwen_vit.features import ImageFeatures
from tests.support.fake_engines import SPECIAL
from tests.support.features import features_with_grids
from tests.support.hf_models import FAMILIES, IMAGE, VIDEO, make_model
from tests.support.hf_setting import greedy
from tests.support.towers import assert_no_worse_than, random_rows
from tests.support.videos import make_video

PICTURE, CLIPS = (1, 4, 6), ((3, 4, 6), (2, 8, 4))
SECONDS = [0.5, 1.0]
START, END = SPECIAL["<|vision_start|>"], SPECIAL["<|vision_end|>"]
TOKEN_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}


def n_tokens(grid: tuple[int, int, int]) -> int:
    t, h, w = grid
    return t * h * w // 4


def prompt() -> Tensor:
    """Return a video, an image and a video."""
    ids = [20]
    for token, grid in ((VIDEO, CLIPS[0]), (IMAGE, PICTURE), (VIDEO, CLIPS[1])):
        ids += [START, *n_tokens(grid) * [token], END, 21]
    return torch.tensor([ids])


def rows_of(*grids: tuple[int, int, int], seed: int) -> Tensor:
    return random_rows(4 * sum(map(n_tokens, grids)), seed)


class VideoSetting:
    """Return a model, its own answer to rows, and our features of the same rows."""

    def __init__(self, family: str, folder: Any) -> None:
        self.model, encoder = make_model(family, folder)
        self.wants_types = FAMILIES[family].wants_token_types
        ids = prompt()
        self.text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        image, video = rows_of(PICTURE, seed=0), rows_of(*CLIPS, seed=1)
        seconds = "second_per_grid_ts" if self.wants_types else "video_second_per_grid"
        self.rows = {
            "pixel_values": image,
            "image_grid_thw": torch.tensor([PICTURE]),
            "pixel_values_videos": video,
            "video_grid_thw": torch.tensor(CLIPS),
            seconds: torch.tensor(SECONDS),
        }
        if self.wants_types:
            self.rows["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        self.picture = ImageFeatures(
            "a.jpg", encoder.encode_patches(image, torch.tensor([PICTURE])), PICTURE
        )
        parts = encoder.encode_patches(video, torch.tensor(CLIPS)).split([*map(n_tokens, CLIPS)])
        self.clips = [
            ImageFeatures(f"{i}.mp4", part, grid)
            for i, (part, grid) in enumerate(zip(parts, CLIPS, strict=True))
        ]

    def features(self, **changes: Any) -> dict[str, Any]:
        given = {"videos": self.clips, "second_per_grid_ts": SECONDS, **changes}
        return to_hf(
            self.picture, self.text["input_ids"], mm_token_type_ids=self.wants_types,
            **TOKEN_IDS, **given,
        )  # fmt: skip

    def logits(self, arguments: dict[str, Any], model: Any = None) -> Tensor:
        with torch.no_grad():
            return (model or self.model)(**self.text, **arguments, use_cache=False).logits


@pytest.fixture(scope="module", params=FAMILIES)
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> VideoSetting:
    return VideoSetting(request.param, tmp_path_factory.mktemp("model"))


def test_features_of_videos_give_the_answer_of_the_models_own_tower(setting: VideoSetting) -> None:
    """Check that all tokens are equal, and that our logits' error against float64 is at most twice
    transformers' error."""
    ours = setting.features()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in setting.rows.items()}
    exact = setting.logits(doubled, copy.deepcopy(setting.model).double())
    assert_no_worse_than(setting.logits(ours), setting.logits(setting.rows), exact, factor=2)
    assert greedy(setting.model, **setting.text, **ours) == greedy(
        setting.model, **setting.text, **setting.rows
    )


def decoded(path: str, indices: list[int], width: int, height: int) -> list[NDArray[np.uint8]]:
    """Return chosen frames of a file, with only PyAV and Pillow."""
    import av

    with av.open(path) as container:
        frames: list[Any] = list(container.decode(video=0))
        pictures = [frame.to_image() for frame in frames]
    resized = [pictures[at].resize((width, height), Image.Resampling.BICUBIC) for at in indices]
    return [np.asarray(each) for each in resized]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_file_gives_the_answer_of_the_models_own_tower(family: str, tmp_path: Path) -> None:
    """The file has 60 frames at 30 a second, and the sampler takes frames 0, 20, 39 and 59."""
    model, encoder = make_model(family, tmp_path / "model")
    path = make_video(tmp_path / "clip.mp4", 60)
    clip = encoder.encode_video(path, min_pixels=784, max_pixels=56 * 84)
    assert (clip.grid_thw, clip.second_per_grid_t) == ((2, 4, 6), 1.0)
    frames = decoded(path, [0, 20, 39, 59], width=84, height=56)
    rows, grid = process_pairs(frames, encoder.image_config, path)
    ids = torch.tensor([[20, START, *n_tokens(clip.grid_thw) * [VIDEO], END, 21]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wants_types = FAMILIES[family].wants_token_types
    theirs = {
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[grid.t, grid.h, grid.w]]),
        "second_per_grid_ts" if wants_types else "video_second_per_grid": torch.tensor([1.0]),
        **({"mm_token_type_ids": 2 * (ids == VIDEO).long()} if wants_types else {}),
    }
    ours = to_hf(clip, ids, mm_token_type_ids=wants_types, **TOKEN_IDS)
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in theirs.items()}

    def logits(any_model: Any, arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            found: Tensor = any_model(**text, **arguments, use_cache=False).logits
        return found

    exact = logits(copy.deepcopy(model).double(), doubled)
    assert_no_worse_than(logits(model, ours), logits(model, theirs), exact, factor=2)
    assert greedy(model, **text, **ours) == greedy(model, **text, **theirs)
    other = encoder.encode_video(path, start=0.5, min_pixels=784, max_pixels=56 * 84)
    moved = to_hf(
        replace(other, second_per_grid_t=1.0), ids, mm_token_type_ids=wants_types, **TOKEN_IDS
    )
    assert other.grid_thw == clip.grid_thw
    assert relative_error(logits(model, moved), logits(model, theirs)) > 1e-3  # other frames


@pytest.mark.parametrize("fault", ["rows backwards", "other seconds"])
def test_the_comparison_detects_a_fault(setting: VideoSetting, fault: str) -> None:
    clips = [replace(clip, embeds=clip.embeds.flip(0)) for clip in setting.clips]
    changes: dict[str, dict[str, Any]] = {
        "rows backwards": {"videos": clips},
        "other seconds": {"second_per_grid_ts": [2, 1]},
    }
    logits = setting.logits(setting.features(**changes[fault]))
    assert relative_error(logits, setting.logits(setting.rows)) > 1e-2


def test_tokens_that_do_not_match_the_videos_are_refused(setting: VideoSetting) -> None:
    words = r"2 runs of the video token .*\[18, 16\]\. Expected \[16, 18\], .* each video\. Expand"
    with pytest.raises(ArgumentError, match=words):
        setting.features(videos=setting.clips[::-1])
    with pytest.raises(ArgumentError, match=r"2 runs of the video token .*Expected \[\]"):
        setting.features(videos=[], second_per_grid_ts=[])


def test_videos_need_a_separate_argument_and_their_seconds() -> None:
    clip = features_with_grids((2, 4, 4))
    with pytest.raises(ArgumentError, match=r"2 time steps.* Pass a video in videos="):
        to_hf(clip)
    with pytest.raises(ArgumentError, match=r"second_per_grid_ts has 0 values for 1 video"):
        to_hf(videos=clip)


def test_placeholders_of_images_and_videos_are_repeated_by_their_own_grids() -> None:
    text = "<|video_pad|>a<|image_pad|>b<|video_pad|>"
    made = expand_placeholders(text, [(1, 2, 4)], video_grids=[(2, 2, 2), (1, 2, 6)])
    assert made == "a".join(("<|video_pad|>" * 2, "<|image_pad|>" * 2)) + "b" + "<|video_pad|>" * 3
    with pytest.raises(ArgumentError, match=r"2 <\|video_pad\|> for 0 videos\. Expected one per"):
        expand_placeholders(text, [(1, 2, 4)])
