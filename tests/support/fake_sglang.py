"""Imitate the code of SGLang 0.5.23 that calls the model class. The engine itself runs in
tools/checks/engines. Each fake has the signatures, the order of calls and the side effects of the
file that it names.
"""

import importlib
import importlib.metadata
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig

from qwen_vit import VisionEncoder

PACKAGE = "qwen_vit.integrations.sglang"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
Weights = Iterable[tuple[str, Tensor]]


class EmbeddingCache(dict[int, Tensor]):
    """mem_cache/multimodal_cache.py, MultiModalStaticCache: embeddings by an item's hash."""


class VisionTransformer(nn.Module):
    """models/qwen2_5_vl.py, Qwen2_5_VisionTransformer: the attributes that the plugin reads."""

    def __init__(self, vision_config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vision_config.num_heads, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


class Model(nn.Module):
    """models/qwen2_5_vl.py, Qwen2_5_VLForConditionalGeneration, without its language model."""

    use_data_parallel = False
    n_ranks = 1

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(2, 2, bias=False)
        self.visual: Any = VisionTransformer(config.vision_config)
        self.seen: list[str] = []

    def get_image_feature(self, items: list[Any]) -> Tensor:
        pixel_values = torch.cat([item.feature for item in items]).type(self.visual.dtype)
        grids = torch.concat([item.image_grid_thw for item in items])
        return self._run(pixel_values, grids)

    def get_video_feature(self, items: list[Any]) -> Tensor:
        pixel_values = torch.cat([item.feature for item in items]).type(self.visual.dtype)
        return self._run(pixel_values, torch.concat([item.video_grid_thw for item in items]))

    def _run(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        if self.use_data_parallel:
            return run_sharded(self.visual, pixel_values, grids.tolist(), self.n_ranks)
        made: Tensor = self.visual(pixel_values, grid_thw=grids)
        return made

    def load_weights(self, weights: Weights) -> None:
        """Skip unknown names silently."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            self.seen.append(name)
            if name in parameters:
                parameters[name].data.copy_(tensor)


def run_sharded(visual: Any, pixel_values: Tensor, grids: list[list[int]], n_ranks: int) -> Tensor:
    """multimodal/mm_utils.py, run_dp_sharded_mrope_vision_model, with sequential ranks."""
    counts = [math.prod(grid) for grid in grids]
    parts = pixel_values.split(counts)
    found: dict[int, Tensor] = {}
    for rank in range(n_ranks):
        own = list(range(rank, len(grids), n_ranks))
        if own:
            rows = torch.cat([parts[i] for i in own])
            embeds = visual(rows, torch.tensor([grids[i] for i in own]))
        else:
            embeds = torch.empty(
                (0, visual.out_hidden_size), device=visual.device, dtype=pixel_values.dtype
            )
        sizes = [counts[i] // visual.spatial_merge_size**2 for i in own]
        found |= dict(zip(own, embeds.split(sizes), strict=True))
    return torch.cat([found[i] for i in range(len(grids))])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """model_loader/utils.py, set_default_torch_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model_class: Callable[..., Any], config: Any, dtype: torch.dtype) -> Any:
    """model_loader/loader.py, _initialize_model."""
    with default_dtype(dtype), torch.device("cpu"):
        return model_class(config=config, quant_config=None)


def load(
    model_class: Callable[..., Any], config: Any, weights: Weights,
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """model_loader/loader.py, DefaultModelLoader.load_model."""
    model = build(model_class, config, dtype)
    with default_dtype(dtype):
        model.load_weights(iter(weights))
    return model.eval()


def load_dummy(model_class: Callable[..., Any], config: Any) -> Any:
    """model_loader/loader.py, DummyModelLoader.load_model."""
    model = build(model_class, config, torch.float32)
    with torch.no_grad(), default_dtype(torch.float32):
        for tensor in model.state_dict().values():
            generator = torch.Generator(device=tensor.device).manual_seed(1234)
            tensor.uniform_(-1e-3, 1e-3, generator=generator)
        if hasattr(model, "post_load_weights"):
            model.post_load_weights()
    return model.eval()


def import_model_classes(package: str, warn: Callable[[str], None]) -> dict[str, type]:
    """models/registry.py: `EntryClass` of every module of a package, by the class's name."""
    found: dict[str, type] = {}
    for _, name, is_package in pkgutil.iter_modules(
        importlib.import_module(package).__path__, f"{package}."
    ):
        if is_package:
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  # as SGLang does
            warn(f"Ignore import error when loading {name}: {error}")
            continue
        if hasattr(module, "EntryClass"):
            found[module.EntryClass.__name__] = module.EntryClass
    return found


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.5.23") -> SimpleNamespace:
    """Replace the package by the fake, and return the parts that tests change."""
    settings = SimpleNamespace(enable_memory_saver=False)
    parts: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.managers": {},
        "sglang.srt.managers.mm_schedule": {"embedding_cache": None},
        "sglang.srt.models": {},
        "sglang.srt.models.qwen2_5_vl": {ARCHITECTURE: type(ARCHITECTURE, (Model,), {})},
        "sglang.srt.runtime_context": {"get_server_args": lambda: settings},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    ours = f"{PACKAGE}.model"
    monkeypatch.setitem(sys.modules, ours, ModuleType(ours))  # so that monkeypatch removes it
    del sys.modules[ours]
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "sglang" else real(name)
    )
    return SimpleNamespace(
        settings=settings,
        schedule=sys.modules["sglang.srt.managers.mm_schedule"],
        models=sys.modules["sglang.srt.models.qwen2_5_vl"],
    )


def model_config(encoder: VisionEncoder, **vision: Any) -> Any:
    """Return the whole model's config for an encoder's tower, with the values of `vision` in its
    vision part."""
    config = Qwen2_5_VLConfig(vision_config=encoder.config.to_json())
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    return config


def item(rows: Tensor, grids: Any, kind: str) -> SimpleNamespace:
    """managers/schedule_batch.py, MultimodalDataItem."""
    return SimpleNamespace(feature=rows, **{f"{kind}_grid_thw": torch.tensor(grids)})
