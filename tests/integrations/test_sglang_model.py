"""Test our tower in SGLang's model class."""

import importlib
import logging
import sys
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.graphs import MAX_BUCKET
from qwen_vit.integrations.engine_tower import EngineTower
from tests.support import fake_sglang
from tests.support.fake_sglang import ARCHITECTURE, PACKAGE, item

GRIDS = [[1, 4, 6], [1, 8, 2]]
FRAMES = [[3, 4, 6]]
HEAD = ("lm_head.weight", torch.ones(2, 2))


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a fake SGLang."""
    return fake_sglang.install(monkeypatch)


def model_class() -> type:
    """Return the model that SGLang builds for the architecture."""
    warnings: list[str] = []
    found = fake_sglang.import_model_classes(PACKAGE, warnings.append)
    assert not warnings
    return found[ARCHITECTURE]


def published(encoder: VisionEncoder, prefix: str = "visual.") -> list[tuple[str, Tensor]]:
    """Return every weight of a checkpoint, in another order than the tower's order."""
    weights = [(prefix + name, tensor) for name, tensor in encoder.checkpoint.tensors.items()]
    Random(0).shuffle(weights)
    return [*weights[:5], HEAD, *weights[5:]]


def loaded(encoder: VisionEncoder, prefix: str = "visual.", **more: Any) -> Any:
    config = fake_sglang.model_config(encoder)
    return fake_sglang.load(model_class(), config, published(encoder, prefix), **more)


def rows_of(grids: list[list[int]]) -> Tensor:
    n = sum(t * h * w for t, h, w in grids)
    return torch.randn(n, 1176, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("sglang")
def test_sglang_finds_the_model_under_its_own_name() -> None:
    found = fake_sglang.import_model_classes(PACKAGE, pytest.fail)
    assert list(found) == [ARCHITECTURE]
    assert issubclass(found[ARCHITECTURE], fake_sglang.Model)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_pictures_and_videos_have_the_bits_of_encode_patches(
    encoder: VisionEncoder, prefix: str
) -> None:
    model = loaded(encoder, prefix)
    assert isinstance(model.visual, EngineTower)
    rows = rows_of(GRIDS)
    made = model.get_image_feature(
        [item(rows[:24], GRIDS[:1], "image"), item(rows[24:], GRIDS[1:], "image")]
    )
    assert torch.equal(made, encoder.encode_patches(rows, torch.tensor(GRIDS)))
    frames = rows_of(FRAMES)
    made = model.get_video_feature([item(frames, FRAMES, "video")])
    assert torch.equal(made, encoder.encode_patches(frames, torch.tensor(FRAMES)))


@pytest.mark.usefixtures("sglang")
def test_a_bfloat16_engine_loads_the_same_tower(encoder: VisionEncoder) -> None:
    """SGLang builds and loads with bfloat16 as torch's default dtype, which must not round a
    table."""
    model = loaded(encoder, dtype=torch.bfloat16)
    rows = rows_of(GRIDS).bfloat16()
    made = model.get_image_feature([item(rows, GRIDS, "image")])
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, encoder.encode_patches(rows, torch.tensor(GRIDS)).bfloat16())


@pytest.mark.usefixtures("sglang")
def test_sglang_loads_everything_but_the_tower(encoder: VisionEncoder) -> None:
    model = loaded(encoder)
    assert model.seen == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, HEAD[1])


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("grids", [GRIDS, [*GRIDS, *FRAMES], GRIDS[:1]])
def test_each_of_two_ranks_encodes_a_share(encoder: VisionEncoder, grids: list[list[int]]) -> None:
    """With one image, the second rank has no image, and reads the tower's width and device."""
    model = loaded(encoder)
    model.use_data_parallel, model.n_ranks = True, 2
    rows = rows_of(grids)
    made = model.get_image_feature([item(rows, grids, "image")])
    torch.testing.assert_close(
        made, encoder.encode_patches(rows, torch.tensor(grids)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("sglang")
def test_sglangs_padding_does_not_change_our_tower(encoder: VisionEncoder) -> None:
    """On a CPU, SGLang 0.5.23 rounds both numbers up in the config that it passes."""
    heads, width = encoder.config.num_heads, encoder.config.intermediate_size
    config = fake_sglang.model_config(
        encoder, num_heads=heads + 3, original_num_heads=heads,
        intermediate_size=width + 20, original_intermediate_size=width,
    )  # fmt: skip
    model = fake_sglang.load(model_class(), config, published(encoder))
    assert model.visual.config == encoder.config


@pytest.mark.usefixtures("sglang")
def test_a_checkpoint_without_some_vision_weights_is_refused(encoder: VisionEncoder) -> None:
    weights = [pair for pair in published(encoder) if "merger.mlp.2.bias" not in pair[0]]
    config = fake_sglang.model_config(encoder)
    with pytest.raises(CheckpointError, match=r"1 of the \d+ tensors .* were not loaded"):
        fake_sglang.load(model_class(), config, weights)
    with pytest.raises(CheckpointError, match="were not loaded"):
        fake_sglang.load(model_class(), config, [HEAD])


@pytest.mark.usefixtures("sglang")
def test_a_quantised_tower_is_refused(encoder: VisionEncoder) -> None:
    name, tensor = published(encoder)[0]
    weights = [(name, tensor.to(torch.float8_e4m3fn)), *published(encoder)[1:]]
    with pytest.raises(CheckpointError, match="quantised"):
        fake_sglang.load(model_class(), fake_sglang.model_config(encoder), weights)


@pytest.mark.usefixtures("sglang")
def test_float16_is_refused_with_the_reason(encoder: VisionEncoder) -> None:
    with pytest.raises(ArgumentError, match="float16"):
        fake_sglang.build(model_class(), fake_sglang.model_config(encoder), torch.float16)


@pytest.mark.usefixtures("sglang")
def test_an_unsupported_tower_is_refused_with_a_remedy(encoder: VisionEncoder) -> None:
    config = fake_sglang.model_config(encoder, hidden_size=100, num_heads=3)
    with pytest.raises(ArgumentError, match="without SGLANG_EXTERNAL_MODEL_PACKAGE"):
        fake_sglang.build(model_class(), config, torch.float32)


@pytest.mark.usefixtures("sglang")
def test_updates_over_dummy_weights_may_have_several_pieces(encoder: VisionEncoder) -> None:
    """Trainers start the engine with dummy weights, and send the language model's weights first."""
    model = fake_sglang.load_dummy(model_class(), fake_sglang.model_config(encoder))
    rows = rows_of(GRIDS)
    dummy = model.get_image_feature([item(rows, GRIDS, "image")])
    assert dummy.isfinite().all()
    model.load_weights([HEAD])
    for pair in published(encoder):
        model.load_weights([pair])
    made = model.get_image_feature([item(rows, GRIDS, "image")])
    assert torch.equal(made, encoder.encode_patches(rows, torch.tensor(GRIDS)))


def test_an_update_of_the_tower_forgets_cached_embeddings(
    sglang: SimpleNamespace, encoder: VisionEncoder
) -> None:
    """SGLang 0.5.23 once answered repeated images with embeddings of the old weights."""
    model = loaded(encoder)
    cache = sglang.schedule.embedding_cache = fake_sglang.EmbeddingCache({1: torch.ones(1)})
    model.load_weights([HEAD])
    assert cache
    model.load_weights(published(encoder)[:1])
    assert not cache


def test_graphs_are_captured_once_after_the_weights_and_before_the_caches(
    sglang: SimpleNamespace, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[torch.dtype], int]] = []
    monkeypatch.setattr(
        EngineTower, "prepare", lambda self, dtypes, largest: calls.append((dtypes, largest))
    )
    model = loaded(encoder)
    assert calls == [([torch.float32], MAX_BUCKET)]
    model.load_weights(published(encoder))
    model.post_load_weights()
    assert len(calls) == 1
    fake_sglang.load_dummy(model_class(), fake_sglang.model_config(encoder))
    assert len(calls) == 2
    sglang.settings.enable_memory_saver = True
    loaded(encoder)
    fake_sglang.load_dummy(model_class(), fake_sglang.model_config(encoder))
    assert len(calls) == 2


@pytest.mark.parametrize(("version", "n_warnings"), [("0.5.23", 0), ("0.6.1", 1)])
def test_an_unknown_version_causes_only_a_warning(
    version: str, n_warnings: int, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fake_sglang.install(monkeypatch, version)
    with caplog.at_level(logging.INFO):
        fake_sglang.build(model_class(), fake_sglang.model_config(encoder), torch.float32)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == n_warnings
    assert all(version in record.getMessage() for record in warnings)
    assert "qwen_vit runs the vision tower" in caplog.text


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sglang.srt.models.qwen2_5_vl", ARCHITECTURE),
        ("sglang.srt.runtime_context", "get_server_args"),
        ("sglang.srt.managers.mm_schedule", "embedding_cache"),
        (f"sglang.srt.models.qwen2_5_vl.{ARCHITECTURE}", "load_weights"),
    ],
)
@pytest.mark.usefixtures("sglang")
def test_an_sglang_without_the_names_keeps_its_own_tower_with_a_log_line(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "load_weights":
        monkeypatch.delattr(fake_sglang.Model, name)
    else:
        monkeypatch.delattr(sys.modules[module], name)
    lines: list[str] = []
    assert fake_sglang.import_model_classes(PACKAGE, lines.append) == {}
    [line] = lines
    assert "whose own vision tower runs" in line
    assert name in line


def test_without_sglang_the_package_gives_features_and_no_model() -> None:
    lines: list[str] = []
    assert fake_sglang.import_model_classes(PACKAGE, lines.append) == {}
    assert len(lines) == 1
    assert callable(importlib.import_module(PACKAGE).to_sglang)
