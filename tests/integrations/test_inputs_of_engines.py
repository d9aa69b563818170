"""Test the formats of vLLM's and SGLang's inputs, and the errors of every adapter."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from qwen_vit.downstream import to_hf, to_sglang, to_vllm, to_vllm_chat_part
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.collection import Features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support.fake_engines import FakeVllm, chat_request, sglang_items
from tests.support.features import features_with_grids
from tests.support.hf_setting import IMAGE_TOKEN, Setting

# vLLM and SGLang


def test_vllms_parser_finds_each_images_rows(setting: Setting) -> None:
    request = {"prompt": "", "multi_modal_data": setting.features.to_vllm()}
    found = FakeVllm(width=48).generate(request)["image"]
    assert_same_rows(found, setting.features)


def test_vllms_server_finds_each_images_rows(setting: Setting) -> None:
    request = chat_request(setting.features.to_vllm_chat_part())
    assert_same_rows(FakeVllm(width=48).generate(request)["image"], setting.features)
    assert (
        request["multi_modal_data"]["image"]["image_grid_thw"].tolist()
        == setting.pixels["image_grid_thw"].tolist()
    )


def test_sglangs_engine_finds_each_images_rows(setting: Setting) -> None:
    [ids] = setting.ids.tolist()
    assert_same_rows(sglang_items(ids, setting.features.to_sglang(), IMAGE_TOKEN), setting.features)


def assert_same_rows(found: Sequence[Tensor], features: Iterable[ImageFeatures]) -> None:
    for rows, image in zip(found, features, strict=True):
        assert torch.equal(rows, image.embeds)


def test_bfloat16_stays_bfloat16_everywhere() -> None:
    """NumPy has no bfloat16, so vLLM's other format, .npy, would need a wider type."""
    made = features_with_grids((1, 4, 4), (1, 2, 6), dtype=torch.bfloat16)
    assert to_vllm(made)["image"]["image_embeds"].dtype == torch.bfloat16
    assert to_sglang(made)[0]["feature"].dtype == torch.bfloat16
    assert to_hf(made)["mm_encoder_outputs"]["image"].pooler_output[1].dtype == torch.bfloat16
    assert_same_rows(FakeVllm(width=8).chat(to_vllm_chat_part(made))["image"], made)


def test_a_chat_part_contains_only_its_own_image(tmp_path: Path) -> None:
    """`torch.save` of a view writes the whole storage, which contains all images."""
    made = features_with_grids((1, 2, 2), (1, 200, 200))
    stored = load_features(write_features(tmp_path / "f.safetensors", made, {}))
    small = stored.to_vllm_chat_part()[0]["image_embeds"]["image_embeds"]
    assert len(small) < 4000 < 200 * 200 * 8


# Every adapter


ADAPTERS = (to_hf, to_vllm, to_vllm_chat_part, to_sglang)


def with_embeds(embeds: Any, grid: Any = (1, 4, 4)) -> list[ImageFeatures]:
    return [*features_with_grids((1, 2, 2)), ImageFeatures("bad.jpg", embeds, grid)]


def failed(fact: str, name: str = "") -> FailedImage:
    return FailedImage("bad.jpg", ImageError(fact, name=name))


NAN = torch.tensor([0.0, float("nan"), 0, 0, 0, 0, 0, 0]).expand(4, 8)
REFUSED = {
    "patch": (
        with_embeds(torch.ones(16, 8)),
        'bad.jpg: .* (16, 8). Expected 4 merged .*output="merged", neither "patch"',
    ),
    "mean": (with_embeds(torch.ones(1, 8)), 'bad.jpg: .* (1, 8). Expected 4 merged .*"mean"'),
    "a row less": (with_embeds(torch.ones(3, 8)), "(3, 8). Expected 4 merged rows for its grid"),
    "flat": (with_embeds(torch.ones(4)), "shape (4,). Expected 4 merged rows"),
    "NaN": (with_embeds(NAN), "bad.jpg: .* NaN or infinity. Expected finite .* again."),
    "infinity": (
        with_embeds(1 / torch.zeros(4, 8)),
        "bad.jpg: .* NaN or infinity. Expected finite",
    ),
    "integers": (
        with_embeds(torch.ones(4, 8).int()),
        "torch.int32. Expected finite floating-point",
    ),
    "another width": (
        with_embeds(torch.ones(4, 6)),
        "'0' has rows of width 8 .* 'bad.jpg' .* 6 in",
    ),
    "another type": (
        with_embeds(torch.ones(4, 8).half()),
        "8 in torch.float32, .* 8 in torch.float16",
    ),
    "failed": (
        [*features_with_grids((1, 2, 2)), failed("ends early", "bad.jpg")],
        "bad.jpg: this image failed: ends early. Omit the image.",
    ),
    "failed in an export": (
        [failed("bad.jpg: ends early. Fetch it again.")],
        "bad.jpg: this image failed: bad.jpg: ends early. Fetch it again. Omit the image.",
    ),
    "odd grid": (
        with_embeds(torch.ones(4, 8), (1, 4, 5)),
        "a grid is (1, 4, 5). Expected .* multiples of 2. Pass the grid_thw",
    ),
    "none": ([], "features is empty. Pass at least one image."),
}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
@pytest.mark.parametrize("given", [torch.ones(4, 8), [torch.ones(4, 8)], None])
def test_every_adapter_refuses_arguments_that_are_not_features(adapter: Any, given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"features (is|contains) .*\. Expected"):
        adapter(given)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_one_image_is_a_list_of_one_for_every_adapter(adapter: Any) -> None:
    [image] = features_with_grids((1, 4, 6))
    assert same(adapter(image), adapter([image]))
    with pytest.raises(ExportError, match=r"bad.jpg: this image failed"):
        adapter(failed("ends early", "bad.jpg"))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
@pytest.mark.parametrize("reason", REFUSED)
def test_features_that_no_language_model_takes_are_refused(adapter: Any, reason: str) -> None:
    features, words = REFUSED[reason]
    pattern = ".*".join(re.escape(part) for part in words.split(".*"))
    with pytest.raises((ExportError, ArgumentError), match=pattern):
        adapter(features)


def test_a_file_a_choice_and_a_list_give_the_same(setting: Setting) -> None:
    listed = list(setting.features)
    for adapter in ADAPTERS:
        method = adapter.__name__
        assert same(getattr(setting.features, method)(), adapter(listed))
        chosen = getattr(setting.features[["3.png", "0.png"]], method)()
        assert same(chosen, adapter([listed[3], listed[0]]))
        assert same(getattr(setting.features[1:3], method)(), adapter(listed[1:3]))


def same(one: Any, other: Any) -> bool:
    """Return whether two nested structures of dicts, lists and tensors are equal."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# Exports


def exported(setting: Setting, tmp_path: Path, **options: Any) -> Features:
    images = str(Path(setting.features.metadata["model"]) / "images")
    export_features(setting.encoder, [images], tmp_path / "export", ExportOptions(**options))
    return load_features(tmp_path / "export")


@pytest.mark.parametrize("output", ["mean", "patch"])
def test_an_export_of_other_outputs_is_read_but_refused_by_the_adapters(
    setting: Setting, tmp_path: Path, output: Literal["mean", "patch"]
) -> None:
    features = exported(setting, tmp_path, output=output)
    rows = [len(image.embeds) for image in features]
    patches = setting.pixels["image_grid_thw"].prod(-1).tolist()
    assert rows == (5 * [1] if output == "mean" else patches)
    for adapter in ADAPTERS:
        with pytest.raises(ExportError, match=r'output="merged", neither "patch" nor "mean"'):
            getattr(features, adapter.__name__)()


def test_an_export_in_bfloat16_stays_in_it(setting: Setting, tmp_path: Path) -> None:
    """The images are in the same shards and batches, because batches decide the last bits on a
    CPU."""
    features = exported(setting, tmp_path, dtype="bfloat16", shard_size=2)
    rounded = [replace(each, embeds=each.embeds.bfloat16()) for each in setting.features]
    assert same(features.to_vllm(), to_vllm(rounded))


def test_the_command_in_the_error_repairs_a_truncated_shard(
    setting: Setting, tmp_path: Path
) -> None:
    features = exported(setting, tmp_path, shard_size=2)
    shard = tmp_path / "export" / "shard-00000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ExportError, match=r"\. Run the same `qwen-vit export` command again"):
        list(load_features(tmp_path / "export"))
    again = exported(setting, tmp_path, shard_size=2)
    assert shard.read_bytes() == content
    assert same(again.to_vllm(), features.to_vllm())
