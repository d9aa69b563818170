"""Provide a fake vLLM with the names that the plugin uses, and the behaviour of 0.25.1 and 0.32.0.
`install` puts the fake into sys.modules. Its Qwen2.5-VL builds a tower, splits the tower's result
by item, and calls `load_weights` of its children with names without their prefix, in several
pieces.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen_vit import VisionEncoder

OUR_MODULE = "qwen_vit.integrations.vllm.model"
BUDGET = 130  # the most merged tokens that the engine encodes in one step


class UnquantizedLinearMethod:
    pass


class AWQLinearMethod:
    pass


class TheirTower(nn.Module):
    """vLLM's `Qwen2_5_VisionTransformer`."""

    method: type = UnquantizedLinearMethod

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.proj.quant_method = self.method()

    @property
    def device(self) -> torch.device:
        return self.proj.weight.device


class TheirModel(nn.Module):
    """vLLM's `Qwen2_5_VLForConditionalGeneration`, without a language model."""

    supports_tower_connector_lora = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.multimodal_config = vllm_config.model_config.multimodal_config
        limits = self.multimodal_config
        off = all(limits.get_limit_per_prompt(kind) == 0 for kind in ("image", "video"))
        self.visual: Any = nn.Identity() if off else vllm_config.tower()

    def _process_image_input(self, image_input: dict[str, Any]) -> tuple[Tensor, ...]:
        return self._split(image_input["pixel_values"], image_input["image_grid_thw"])

    def _process_video_input(self, video_input: dict[str, Any]) -> tuple[Tensor, ...]:
        return self._split(video_input["pixel_values_videos"], video_input["video_grid_thw"])

    def _split(self, rows: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        embeds = self.visual(rows, grid_thw=grids.tolist())
        sizes = (grids.prod(-1) // self.visual.spatial_merge_size**2).tolist()
        return tuple(embeds.split(sizes))

    def forward(self) -> None:
        """The language model's."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = set()
        for child, piece in groupby(weights, lambda pair: pair[0].split(".", 1)[0]):
            bare = ((name.split(".", 1)[1], tensor) for name, tensor in piece)
            names = getattr(self, child).load_weights(bare)
            loaded |= {f"{child}.{name}" for name in names}
        return loaded


def reload_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Imitate vLLM's `reload_weights`, and return the layers of the warning "Failed to load
    weights". During the reload, tensors without memory replace all parameters except the parameters
    named "bias".
    Source: vllm/model_executor/model_loader/reload/layerwise.py of 0.32.0.
    """
    kept = [
        (layer, name, parameter)
        for layer in model.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if name != "bias"
    ]
    for layer, name, parameter in kept:
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        layer.register_parameter(name, empty)
    model.load_weights(weights)  # type: ignore[operator]
    for layer, name, parameter in kept:
        layer.register_parameter(name, parameter)
    return [
        type(layer).__name__
        for layer, _, parameter in kept
        if getattr(parameter, "weight_loader_numel", parameter.numel())
    ]


@dataclass
class LayerReloadingInfo:
    """Imitate the part of vLLM 0.32 that the plugin reads."""

    kernel_non_persistent_buffers: set[str] = field(default_factory=set)


@dataclass
class Limits:
    """Hold the engine's limits of images and videos in a prompt."""

    image: int = 8
    video: int = 8
    skip_mm_profiling: bool = False

    def get_limit_per_prompt(self, kind: str) -> int:
        return int(getattr(self, kind))


@dataclass
class Config:
    """Hold the values of `VllmConfig` that the plugin reads."""

    encoder: VisionEncoder
    dtype: torch.dtype = torch.float32
    limits: Limits = field(default_factory=Limits)
    compilation: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    tower: type[nn.Module] = TheirTower
    hf_config: dict[str, Any] | None = None

    @property
    def model_config(self) -> Any:
        vision = self.encoder.config.to_json()
        document = self.hf_config or {"model_type": "qwen2_5_vl", "vision_config": vision}
        return SimpleNamespace(
            dtype=self.dtype,
            hf_config=SimpleNamespace(to_dict=lambda: document),
            multimodal_config=self.limits,
            image_processor=SimpleNamespace(
                # the flags of a processor whose engine normalises in the tower
                to_dict=lambda: {
                    **self.encoder.image_config.to_json(),
                    "do_rescale": False,
                    "do_normalize": False,
                }
            ),
        )

    @property
    def compilation_config(self) -> Any:
        return SimpleNamespace(**self.compilation)

    @property
    def lora_config(self) -> Any:
        return None if self.lora is None else SimpleNamespace(**self.lora)


def install(monkeypatch: pytest.MonkeyPatch, *, version: str = "0.32.0", names: bool = True) -> Any:
    """Put the fake into sys.modules, and return its dict of registered models."""
    registered: dict[str, str] = {}
    model = type("Qwen2_5_VLForConditionalGeneration", (TheirModel,), {})
    if not names:
        model = type("Qwen2_5_VLForConditionalGeneration", (nn.Module,), {})
    modules: dict[str, dict[str, Any]] = {
        "vllm": {
            "__version__": version,
            "__path__": [],
            "ModelRegistry": SimpleNamespace(register_model=registered.__setitem__),
        },
        "vllm.model_executor": {"__path__": []},
        "vllm.model_executor.model_loader": {"__path__": []},
        "vllm.model_executor.model_loader.reload": {"__path__": []},
        "vllm.model_executor.model_loader.reload.types": {"LayerReloadingInfo": LayerReloadingInfo},
        "vllm.model_executor.models": {"__path__": []},
        "vllm.model_executor.models.qwen2_5_vl": {
            "Qwen2_5_VLForConditionalGeneration": model,
            "Qwen2_5_VisionTransformer": TheirTower,
        },
        "vllm.multimodal": {"__path__": [], "MULTIMODAL_REGISTRY": object()},
        "vllm.multimodal.encoder_budget": {
            "MultiModalBudget": lambda *_: SimpleNamespace(get_encoder_budget=lambda: BUDGET)
        },
        "vllm.transformers_utils": {"__path__": []},
        "vllm.transformers_utils.processor": {
            "cached_image_processor_from_config": lambda config: config.image_processor
        },
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.delitem(sys.modules, OUR_MODULE, raising=False)
    return registered
