"""Test the plugin inside a fake vLLM, whose behaviour follows the real vLLM."""

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from qwen_vit import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.images.rows import normalise
from qwen_vit.integrations.engine_tower import EngineTower
from qwen_vit.integrations.vllm.plugin import ARCHITECTURE, register
from tests.support import fake_vllm
from tests.support.fake_vllm import OUR_MODULE, AWQLinearMethod, Config, Limits, TheirTower

GRIDS = torch.tensor([[1, 4, 6], [1, 4, 4]])


@pytest.fixture(autouse=True)
def forget_our_model() -> Iterator[None]:
    yield
    sys.modules.pop(OUR_MODULE, None)


def our_model() -> Any:
    return getattr(importlib.import_module(OUR_MODULE), ARCHITECTURE)


def loaded_model(config: Config) -> Any:
    model = our_model()(vllm_config=config)
    named = {f"visual.{name}": tensor for name, tensor in config.encoder.checkpoint.tensors.items()}
    assert model.load_weights(named.items()) == {name for name, _ in model.named_parameters()}
    return model


def pixels(seed: int = 0, *, still: bool) -> torch.Tensor:
    n = int(GRIDS.prod(1).sum())
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, (n, 3, 2, 196), dtype=torch.uint8, generator=generator)
    if still:
        made[:, :, 1] = made[:, :, 0]
    return made.flatten(1)


def test_the_entry_point_is_installed() -> None:
    [found] = [
        each for each in entry_points(group="vllm.general_plugins") if each.name == "qwen_vit"
    ]
    assert found.load() is register


@pytest.mark.parametrize("plugins", [None, "", "other", "qwen_vit2"])
def test_the_plugin_changes_nothing_until_a_user_selects_it(
    plugins: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered = fake_vllm.install(monkeypatch)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with caplog.at_level(logging.INFO, "vllm.qwen_vit"):
        register()
    assert registered == {}
    assert "Set VLLM_PLUGINS=qwen_vit to run its vision tower" in caplog.text
    assert OUR_MODULE not in sys.modules


@pytest.mark.parametrize("plugins", ["qwen_vit", "other, qwen_vit"])
def test_it_replaces_one_model_by_its_name_and_imports_nothing_yet(
    plugins: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other models, such as Qwen2-VL and Qwen3-VL, keep their towers, and one line reports this."""
    registered = fake_vllm.install(monkeypatch)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with caplog.at_level(logging.INFO, "vllm.qwen_vit"):
        register()
    assert caplog.text.count("Other models keep their own vision towers") == 1
    register()  # vLLM calls it more than once in some processes
    assert registered == {ARCHITECTURE: f"{OUR_MODULE}:{ARCHITECTURE}"}
    assert OUR_MODULE not in sys.modules
    assert our_model().__name__ == ARCHITECTURE


def test_a_vllm_without_the_module_keeps_its_own_tower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered = fake_vllm.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "vllm.model_executor.models.qwen2_5_vl")
    monkeypatch.setenv("VLLM_PLUGINS", "qwen_vit")
    register()
    assert registered == {}
    assert "vLLM's own vision tower runs" in caplog.text


def test_a_vllm_without_the_names_keeps_its_own_tower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_vllm.install(monkeypatch, version="0.99.0", names=False)
    chosen = our_model()
    assert chosen is sys.modules["vllm.model_executor.models.qwen2_5_vl"].__dict__[ARCHITECTURE]
    assert "does not fit vLLM 0.99.0" in caplog.text


@pytest.mark.parametrize(
    ("version", "n_lines"), [("0.32.0", 0), ("0.25.1+cu129", 0), ("0.34.0", 1)]
)
def test_an_unknown_version_is_named_once(
    version: str, n_lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_vllm.install(monkeypatch, version=version)
    our_model()
    our_model()
    assert len(caplog.records) == n_lines


def test_images_of_uint8_rows_have_the_bits_of_encode_pixels(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder))
    rows = pixels(still=True)
    given = {"type": "pixel_values", "pixel_values": rows, "image_grid_thw": GRIDS}
    parts = model._process_image_input(given)
    assert [len(part) for part in parts] == [6, 4]
    assert torch.equal(torch.cat(parts), encoder.encode_pixels(rows, GRIDS))


def test_both_frames_of_uint8_rows_are_read_for_videos(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder))
    rows = pixels(still=False)
    given = {"pixel_values_videos": rows, "video_grid_thw": GRIDS}
    floats = normalise(rows.view(len(rows), 3, 2, 196), encoder.image_config).flatten(1)
    parts = model._process_video_input(given)
    assert torch.equal(torch.cat(parts), encoder.encode_patches(floats, GRIDS))


def test_float_rows_have_the_bits_of_encode_patches(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch, version="0.25.1")
    model = loaded_model(Config(encoder))
    rows = torch.randn(40, 1176, generator=torch.Generator().manual_seed(3))
    parts = model._process_image_input({"pixel_values": rows, "image_grid_thw": GRIDS})
    assert torch.equal(torch.cat(parts), encoder.encode_patches(rows, GRIDS))


def test_limits_of_no_images_and_no_videos_leave_the_placeholder(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    model = our_model()(vllm_config=Config(encoder, limits=Limits(0, 0)))
    assert isinstance(model.visual, torch.nn.Identity)


def test_adapters_of_the_tower_are_declared_unsupported(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    assert our_model().supports_tower_connector_lora is False
    assert isinstance(our_model()(vllm_config=Config(encoder, lora={})).visual, EngineTower)


class QuantisedTower(TheirTower):
    method = AWQLinearMethod


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compilation": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"compilation": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
        ({"lora": {"enable_tower_connector_lora": True}}, "adapters do not support"),
        ({"tower": QuantisedTower}, r"quantised \(visual\.proj: AWQLinearMethod\)"),
        ({"dtype": torch.float16}, "float16"),
        ({"hf_config": {"model_type": "qwen2_vl"}}, "cannot run this vision tower"),
    ],
)
def test_unsupported_settings_are_refused_at_start_with_the_reason(
    changes: dict[str, Any],
    message: str,
    encoder: VisionEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vllm.install(monkeypatch)
    with pytest.raises(ArgumentError, match=message) as caught:
        our_model()(vllm_config=Config(encoder, **changes))
    assert caught.value.remedy


def test_weights_of_another_tower_are_refused(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    model = our_model()(vllm_config=Config(encoder))
    with pytest.raises(CheckpointError, match="Qwen3-VL"):
        model.load_weights([("visual.pos_embed.weight", torch.ones(2))])


def test_weights_that_vllm_reloads_are_written_and_not_warned_about(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM replaces the parameters by tensors without memory, and later restores the parameters.
    Values in those tensors were once lost without an error, and the tower kept its old weights.
    """
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder))
    given = {"pixel_values": pixels(still=True), "image_grid_thw": GRIDS}
    before = torch.cat(model._process_image_input(given))
    tensors = list(encoder.checkpoint.tensors.items())
    changed = [(f"visual.{name}", 0.9 * tensor) for name, tensor in tensors]
    for half in (changed[::2], changed[1::2]):
        assert fake_vllm.reload_weights(model, half) == []
    after = torch.cat(model._process_image_input(given))
    expected = VisionEncoder.from_tensors(
        {name: 0.9 * tensor for name, tensor in tensors}, encoder.config, encoder.image_config,
        device="cpu",
    )  # fmt: skip
    assert torch.equal(after, expected.encode_pixels(given["pixel_values"], GRIDS))
    assert not torch.equal(after, before)
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_the_tower_is_prepared_before_its_first_call_alone(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM measures its memory in this call, so everything that requests need must exist then."""
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder))
    seen: list[tuple[list[torch.dtype], int]] = []

    def prepare(dtypes: list[torch.dtype], largest: int) -> int:
        seen.append((dtypes, largest))
        return 0

    monkeypatch.setattr(model.visual, "prepare", prepare)
    given = {"pixel_values": pixels(still=True), "image_grid_thw": GRIDS}
    model._process_image_input(given)
    model._process_image_input(given)
    assert seen == [([torch.uint8, torch.float32], 40)]


@pytest.mark.parametrize("is_asked_first", [False, True])
@pytest.mark.parametrize("is_skipped", [False, True])
def test_the_tower_runs_in_a_measurement_of_the_language_model_alone(
    is_asked_first: bool, is_skipped: bool, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.25's second model runner measures memory without a call of the tower. Therefore the
    language model's first call runs the tower. Otherwise the first request would compile kernels
    without enough memory."""
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder, limits=fake_vllm.Limits(skip_mm_profiling=is_skipped)))
    called: list[torch.Size] = []

    def forward(rows: torch.Tensor, grid_thw: Any) -> torch.Tensor:
        assert len(rows) == sum(t * h * w for t, h, w in grid_thw)
        called.append(rows.shape)
        return torch.empty(len(rows) // 4, 1)

    monkeypatch.setattr(model.visual, "prepare", lambda dtypes, largest: 0)
    monkeypatch.setattr(model.visual, "forward", forward)
    monkeypatch.setattr(EngineTower, "device", torch.device("meta"))  # any device except a CPU
    if is_asked_first:
        model._process_image_input({"pixel_values": pixels(still=True), "image_grid_thw": GRIDS})
    seen = len(called)
    model()
    model()
    own = [] if is_asked_first or is_skipped else [torch.Size((22 * 22, 1176))]
    assert called[seen:] == own  # a square image of 121 tokens, for a budget of 130


def test_nothing_is_compiled_for_a_measurement_on_a_cpu(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    model = loaded_model(Config(encoder))
    monkeypatch.setattr(model.visual, "forward", lambda *_: pytest.fail("called"))
    model()
