"""Run Qwen2.5-VL in vLLM with this package's vision tower in place of vLLM's tower.

After `plugin.register` registers this module, vLLM imports it to build a Qwen2.5-VL. vLLM provides
all other parts: processor, scheduler, caches and language model.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.model_executor.models import qwen2_5_vl as theirs

from qwen_vit.common.arguments import short_repr
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.integrations.engine_tower import EngineTower

__all__ = ["RUN_WITH", "Qwen2_5_VLForConditionalGeneration"]

logger = logging.getLogger("vllm.qwen_vit")  # below vLLM's logger, so that vLLM prints it

RUN_WITH = ("0.25.1", "0.32.0")  # vLLM versions that tools/checks/engines has tested


class Qwen2_5_VLForConditionalGeneration(  # noqa: N801  # vLLM finds models by this name
    theirs.Qwen2_5_VLForConditionalGeneration  # type: ignore[misc]
):
    """Define vLLM's Qwen2.5-VL with an `EngineTower` as `visual`."""

    visual: Any

    # the tower stores weights in its own format, which vLLM's adapters do not support
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _refuse(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(self.visual, theirs.Qwen2_5_VisionTransformer):
            return  # with limits of 0 images and 0 videos, vLLM uses a placeholder
        _refuse_quantised(self.visual)
        model_config = vllm_config.model_config
        dtype, device = model_config.dtype, self.visual.device
        try:
            config = VisionConfig.from_json(model_config.hf_config.to_dict(), source="the config")
            settings = _image_settings(model_config)
            image_config = ImageConfig.from_json(settings, source="the image processor")
            self.visual = None  # frees vLLM's tower before ours is allocated
            self.visual = EngineTower(
                config, image_config, dtype, device, _quantization(vllm_config)
            )
            if _puts_back_what_it_does_not_load():
                for parameter in self.visual.parameters():
                    parameter.weight_loader_numel = 0
        except CheckpointError as error:
            raise ArgumentError(
                f"qwen_vit cannot run this vision tower: {error.fact}",
                expected=error.expected,
                remedy="start vLLM without qwen_vit in VLLM_PLUGINS",
            ) from error
        self._vllm_config = vllm_config
        self._prepare_hooks = [self.visual.register_forward_pre_hook(self._prepare)]
        if not self.multimodal_config.skip_mm_profiling:
            self._prepare_hooks.append(self.register_forward_pre_hook(self._profile_tower))
        logger.info(
            "qwen_vit runs the vision tower, in %s on %s.",
            self.visual.tower.quantization or dtype, device,
        )  # fmt: skip

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(self.visual, EngineTower):
            return super()._process_image_input(image_input)
        with self.visual.reading_images():
            return super()._process_image_input(image_input)

    def _prepare(self, visual: EngineTower, inputs: tuple[Tensor, ...]) -> None:
        """At the first call, compile kernels and capture CUDA graphs, before vLLM measures
        memory."""
        for hook in self._prepare_hooks:
            hook.remove()
        rows = inputs[0]
        dtypes = [rows.dtype]
        if rows.dtype == torch.uint8 and self.multimodal_config.get_limit_per_prompt("video"):
            dtypes.append(torch.float32)
        kept = visual.prepare(dtypes, len(rows))
        if kept and not _counts_reserved_memory():
            self._hold(kept, visual.device)

    def _profile_tower(self, *_: Any) -> None:
        """If vLLM has not called the tower, call it with the largest square image of vLLM's budget.

        The second model runner of vLLM 0.25, which is the default, measures only the language
        model. Without this call, the first request would have to wait until the kernels compile.
        """
        if self.visual.device.type == "cpu":
            return  # a CPU compiles nothing

        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.multimodal.encoder_budget import MultiModalBudget

        n_tokens = MultiModalBudget(self._vllm_config, MULTIMODAL_REGISTRY).get_encoder_budget()
        side = 2 * math.isqrt(n_tokens)  # in patches: a square of at most this number of tokens
        as_pixels = getattr(self.multimodal_config, "mm_device_do_normalize", False)
        rows = torch.zeros(
            side * side, self.visual.config.patch_dim,
            dtype=torch.uint8 if as_pixels else self.visual.dtype, device=self.visual.device,
        )  # fmt: skip
        with self.visual.reading_images():
            self.visual(rows, [[1, side, side]])

    def _hold(self, n_bytes: int, device: torch.device) -> None:
        """While vLLM measures memory, allocate as much as the graphs reserve.

        vLLM 0.25 measures torch's allocated memory, which excludes the graphs' memory. The
        measurement includes the language model's first call but not its second.
        """
        held = [torch.empty(n_bytes, dtype=torch.uint8, device=device)]
        calls = iter(range(2))

        def release(*_: Any) -> None:
            if next(calls, None) == 1:
                handle.remove()
                held.clear()

        handle = self.register_forward_hook(release)


def _quantization(vllm_config: Any) -> Any:
    """Return the value of "quantization" in `--additional-config '{"qwen_vit": {...}}'`.

    The function rejects other options, because vLLM itself does not check them.
    """
    given = getattr(vllm_config, "additional_config", None)
    ours = given.get("qwen_vit", {}) if isinstance(given, Mapping) else {}
    if not isinstance(ours, Mapping) or ours.keys() - {"quantization"}:
        raise ArgumentError(
            f"additional_config has {short_repr(ours)} for qwen_vit",
            expected='{"qwen_vit": {"quantization": "fp8"}}, or nothing for qwen_vit',
        )
    return ours.get("quantization")


def _refuse(vllm_config: Any) -> None:
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    for option, is_set, reason in (
        ("cudagraph_mm_encoder", getattr(compilation, "cudagraph_mm_encoder", False),
         "it captures vLLM's tower, and this one captures its own CUDA graphs"),
        ("compile_mm_encoder", getattr(compilation, "compile_mm_encoder", False),
         "it compiles vLLM's tower, which qwen_vit replaces with its own kernels"),
        ("enable_tower_connector_lora", getattr(lora, "enable_tower_connector_lora", False),
         "this tower's weights are stored in a format that adapters do not support"),
    ):  # fmt: skip
        if is_set:
            raise ArgumentError(
                f"qwen_vit does not run with {option}: {reason}",
                remedy=f"switch {option} off, or start vLLM without qwen_vit in VLLM_PLUGINS",
            )


def _refuse_quantised(tower: nn.Module) -> None:
    for name, module in tower.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in ("NoneType", "UnquantizedLinearMethod"):
            raise ArgumentError(
                f"this checkpoint's vision tower is quantised (visual.{name}: {method})",
                expected="vision weights in bfloat16, float16 or float32",
                remedy="use a checkpoint that leaves the vision tower unquantised, or start vLLM "
                "without qwen_vit in VLLM_PLUGINS",
            )


def _image_settings(model_config: Any) -> dict[str, Any]:
    """Return the image processor's mean, std and sizes, but not its `do_` flags: vLLM sets them to
    False if the tower normalises."""
    from vllm.transformers_utils.processor import cached_image_processor_from_config

    settings = cached_image_processor_from_config(model_config).to_dict()
    names = ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    return {name: settings[name] for name in names if name in settings}


def _counts_reserved_memory() -> bool:
    """Return whether this vLLM measures free GPU memory, which accounts for the graphs' memory."""
    from vllm.utils.mem_utils import MemoryProfilingResult

    fields = {field.name for field in dataclasses.fields(MemoryProfilingResult)}
    return "transient_peak_headroom" in fields


def _puts_back_what_it_does_not_load() -> bool:
    """Return whether vLLM's reload keeps parameters with a `weight_loader_numel` of 0 as they are.

    The tower writes its parameters itself. With another number, vLLM warns "Failed to load weights"
    for each of the tower's layers. Versions of vLLM that keep such parameters have the field that
    this function reads.
    """
    try:
        from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
    except ImportError:
        return False
    fields = {field.name for field in dataclasses.fields(LayerReloadingInfo)}
    return "kernel_non_persistent_buffers" in fields


def _missing_names() -> list[str]:
    """Return the names that this module needs from vLLM's model and that this vLLM lacks."""
    model = theirs.Qwen2_5_VLForConditionalGeneration
    return [
        f"{owner.__name__}.{name}"
        for owner, name in (
            (theirs, "Qwen2_5_VisionTransformer"),
            (model, "_process_image_input"),
            (model, "load_weights"),
        )
        if not hasattr(owner, name)
    ]


if names := _missing_names():
    logger.warning(
        "qwen_vit does not fit vLLM %s, which has no %s. vLLM's own vision tower runs.",
        vllm.__version__, ", ".join(names),
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration = theirs.Qwen2_5_VLForConditionalGeneration  # type: ignore[misc]
elif vllm.__version__.split("+")[0] not in RUN_WITH:
    logger.warning(
        "We tested qwen_vit with vLLM %s, not with %s. This version has the names that "
        "qwen_vit needs, so qwen_vit continues.",
        " and ".join(RUN_WITH), vllm.__version__,
    )  # fmt: skip
