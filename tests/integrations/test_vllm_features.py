"""Test that vLLM's engine gets features of images and videos, and never invalid features."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_vit.errors import ArgumentError, ExportError, QwenVitError
from qwen_vit.features import ImageFeatures
from qwen_vit.integrations.vllm import to_vllm, to_vllm_chat_part
from tests.support.fake_engines import EngineDeadError, FakeVllm, chat_request
from tests.support.features import random_features

WIDTH = 8
Adapter = Callable[..., Any]


PICTURES = [random_features("wide", (1, 4, 6)), random_features("tall", (1, 6, 4), seed=1)]
CLIPS = [random_features("clip", (2, 4, 4), seed=2), random_features("short", (1, 2, 2), seed=3)]


def request(**arguments: Any) -> dict[str, Any]:
    return {"prompt": "", "multi_modal_data": to_vllm(**arguments)}


def assert_rows(found: dict[str, Any], **expected: list[ImageFeatures]) -> None:
    assert found.keys() == expected.keys()
    for kind, items in expected.items():
        for rows, item in zip(found[kind], items, strict=True):
            assert torch.equal(rows, item.embeds)


def test_pictures_and_videos_share_a_request() -> None:
    """A video of two frames has one time step, like an image, so only the argument separates the
    two."""
    arguments: dict[str, Any] = {
        "features": PICTURES,
        "videos": CLIPS,
        "second_per_grid_ts": [0.5, 1],
    }
    engine = FakeVllm(WIDTH)
    assert_rows(engine.generate(request(**arguments)), image=PICTURES, video=CLIPS)
    assert_rows(engine.chat(to_vllm_chat_part(**arguments)), image=PICTURES, video=CLIPS)
    seconds = to_vllm(**arguments)["video"]["second_per_grid_ts"]
    assert seconds.tolist() == [0.5, 1.0]
    sent = chat_request(to_vllm_chat_part(**arguments))["multi_modal_data"]["video"]
    assert torch.equal(sent["second_per_grid_ts"], seconds)


def test_a_request_may_have_only_videos() -> None:
    arguments: dict[str, Any] = {"videos": CLIPS, "second_per_grid_ts": [0.5, 1.0]}
    assert_rows(FakeVllm(WIDTH).generate(request(**arguments)), video=CLIPS)
    assert_rows(FakeVllm(WIDTH).chat(to_vllm_chat_part(**arguments)), video=CLIPS)


@pytest.mark.parametrize("adapter", [to_vllm, to_vllm_chat_part])
@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ([], "has 0 values for 2 videos. Expected one for each video. Pass 2 / "),
        ([0.5], "has 1 value for 2 videos"),
        ([0.5, 0.5, 0.5], "has 3 values for 2 videos"),
        ([0.5, 0.0], "contains 0.0. Expected seconds above 0."),
        ([0.5, -1.0], "contains -1.0"),
        ([0.5, float("nan")], "contains nan"),
        ([0.5, float("inf")], "contains inf"),
        ([0.5, True], "contains True"),
        (["1", 0.5], "contains '1'"),
    ],
)
def test_each_video_has_its_seconds(adapter: Adapter, seconds: Any, words: str) -> None:
    """Without seconds, vLLM silently assumes one second, and its answers differ."""
    with pytest.raises(ArgumentError) as caught:
        adapter(PICTURES, videos=CLIPS, second_per_grid_ts=seconds)
    assert words in str(caught.value)


@pytest.mark.parametrize("adapter", [to_vllm, to_vllm_chat_part])
def test_a_video_among_the_pictures_is_refused(adapter: Adapter) -> None:
    """vLLM stops with "Image must have 1 frame" for all users."""
    with pytest.raises(ArgumentError, match=r"clip: its grid has 2 time steps.* in videos="):
        adapter([PICTURES[0], CLIPS[0]])


@pytest.mark.parametrize("adapter", [to_vllm, to_vllm_chat_part])
def test_nothing_to_send_is_refused(adapter: Adapter) -> None:
    with pytest.raises(ArgumentError, match=r"features is empty"):
        adapter()


@pytest.mark.parametrize("adapter", [to_vllm, to_vllm_chat_part])
def test_pictures_and_videos_are_of_one_model(adapter: Adapter) -> None:
    narrow = replace(CLIPS[1], embeds=CLIPS[1].embeds[:, :4])
    with pytest.raises(
        ExportError, match=r"'tall' has rows of width 8 .* 'short' has rows of width 4"
    ):
        adapter(PICTURES, videos=[narrow], second_per_grid_ts=[1.0])


def with_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> ImageFeatures:
    return replace(PICTURES[0], embeds=change(PICTURES[0].embeds))


KILLERS = {
    "a row too few": with_rows(lambda rows: rows[:-1]),
    "a row too many": with_rows(lambda rows: torch.cat([rows, rows[:1]])),
    "another grid": replace(PICTURES[0], grid_thw=(1, 4, 4)),
    "a grid in time": replace(PICTURES[0], grid_thw=(2, 4, 4)),
    "another width": with_rows(lambda rows: rows[:, :4]),
}


@pytest.mark.parametrize("name", KILLERS)
def test_features_that_would_stop_the_engine_are_refused(name: str) -> None:
    """The raw request stops the engine for all users. Our function rejects it earlier."""
    bad, engine = KILLERS[name], FakeVllm(WIDTH)
    raw = {"image_embeds": bad.embeds, "image_grid_thw": torch.tensor([bad.grid_thw])}
    with pytest.raises(EngineDeadError, match="stops at image"):
        engine.generate({"prompt": "", "multi_modal_data": {"image": raw}})
    with pytest.raises(EngineDeadError, match="has stopped"):
        engine.generate(request(features=PICTURES))
    for adapter in (to_vllm, to_vllm_chat_part):
        with pytest.raises(QwenVitError):
            adapter([bad], width=WIDTH)


def test_nan_never_reaches_the_engine() -> None:
    """NaN remains in the key-value cache, and shorter requests in the same blocks read NaN."""
    bad, engine = with_rows(lambda rows: rows * float("nan")), FakeVllm(WIDTH)
    raw = {"image_embeds": bad.embeds, "image_grid_thw": torch.tensor([bad.grid_thw])}
    engine.generate({"prompt": "", "multi_modal_data": {"image": raw}})
    [rows, _] = engine.generate(request(features=PICTURES))["image"]
    assert rows.isnan().all()
    for adapter in (to_vllm, to_vllm_chat_part):
        with pytest.raises(ExportError, match="NaN or infinity"):
            adapter([bad])


@pytest.mark.parametrize("adapter", [to_vllm, to_vllm_chat_part])
def test_a_width_is_compared_if_it_is_given(adapter: Adapter) -> None:
    assert adapter(PICTURES, width=WIDTH)
    with pytest.raises(ExportError, match=r"wide: its features are 8 wide. Expected 16, the lang"):
        adapter(PICTURES, width=16)
    with pytest.raises(ExportError, match=r"clip: its features are 8 wide"):
        adapter(videos=CLIPS, second_per_grid_ts=[1.0, 1.0], width=16)
