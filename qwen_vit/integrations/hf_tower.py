"""Use a `VisionEncoder` as the vision tower of transformers' Qwen2.5-VL and Qwen2.5-Omni.

The module has no parameters, because other code trains, casts or saves every parameter that it
finds, and the encoder's weights are folded, permuted and padded. `state_dict` reads the published
tensors instead, and `load_state_dict` converts them again. The module's parts have the published
names. PEFT cannot adapt them, and other modules cannot replace them.

Import this module late, because torch.compiler.disable imports torch._dynamo, which takes 1.5 s.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.device import choose_device, choose_dtype, choose_quantization
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import FLOAT16_OVERFLOWS, ArgumentError, QwenVitError

__all__ = ["HFTower"]

logger = logging.getLogger("qwen_vit")

# PEFT's error for a module that it cannot adapt contains the module's repr.
NO_ADAPTERS = (
    "takes no adapters: pass exclude_modules=r'.*visual.*', or merge the adapter into the "
    "checkpoint and load the encoder from it"
)
TRAIN_THEIRS = "train transformers' own tower, and load an encoder from what it saves"


class _Shown:
    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self.shapes: dict[str, torch.Size] = {}
        for name, (size, *others) in expected_tensors(encoder.config).items():
            parts = encoder.checkpoint.tensors.stored_as(name)
            self.shapes |= dict.fromkeys(parts, torch.Size([size // len(parts), *others]))
        self.dtype = encoder.dtype  # the requested dtype; a CPU computes in float32 instead
        self.cuda_graphs = encoder.graphs is not None or encoder.device.type != "cuda"


@dataclass(frozen=True, slots=True)
class PublishedWeight:
    """Describe a part's weight or bias, without a tensor.

    Writing to a tensor would have no effect.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Frozen(nn.Module):
    """Define a module without gradients that rejects replacements of its parts."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            raise ArgumentError(
                f"{name} of qwen_vit's vision tower cannot be replaced by a {type(value).__name__}",
                remedy=TRAIN_THEIRS,
            )
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise ArgumentError(
                "qwen_vit's vision tower computes no gradients",
                expected="requires_grad_(False)",
                remedy=TRAIN_THEIRS,
            )
        return self


class _Part(_Frozen):
    """Represent a published module of the tower by name only, because the tower runs as a whole."""

    def __init__(self, shown: _Shown, path: str) -> None:
        super().__init__()
        self.shown = shown
        self.path = path

    def __getattr__(self, name: str) -> Any:
        full_name = f"{self.__dict__.get('path')}.{name}"
        if name not in ("weight", "bias") or full_name not in self.shown.shapes:
            return super().__getattr__(name)
        encoder = self.shown.encoder
        return PublishedWeight(
            full_name, self.shown.shapes[full_name], encoder.dtype, encoder.device
        )

    def __repr__(self) -> str:
        return f"{self.path!r} of qwen_vit's vision tower ({NO_ADAPTERS})"

    def forward(self, *_: object, **__: object) -> Any:
        raise ArgumentError(
            f"{self.path} of qwen_vit's vision tower does not run alone",
            remedy="call the tower",
        )

    def _load_from_state_dict(self, *_: object) -> None:
        """Do nothing, because the tower loads all weights."""


class _Blocks(_Frozen, nn.ModuleList):
    def _load_from_state_dict(self, *_: object) -> None:
        """Do nothing, because the tower loads all weights."""


class HFTower(_Frozen):
    """Give a `VisionEncoder` the interface of transformers' vision tower. See `as_hf_tower`."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.shown = shown = _Shown(encoder)
        self.spatial_merge_size = encoder.config.spatial_merge_size
        self.has_warned = False
        for name in shown.shapes:
            *steps, _ = name.split(".")
            module: nn.Module = self
            for depth, step in enumerate(steps, start=1):
                if step not in module._modules:
                    is_list = "".join(steps[depth : depth + 1]).isdigit()
                    path = ".".join(steps[:depth])
                    module.add_module(step, _Blocks() if is_list else _Part(shown, path))
                module = module.get_submodule(step)
        self.eval()  # a loaded model is also in eval mode

    @property
    def encoder(self) -> VisionEncoder:
        return self.shown.encoder

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the computation."""
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the computation. Inputs may be on any device."""
        return self.encoder.device

    def __repr__(self) -> str:
        return f"HFTower({self.encoder!r}, qwen_vit's vision tower ({NO_ADAPTERS}))"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **options: Any) -> Any:
        """Encode rows (N, 1176) with grids (images, 3). `pooler_output` has the merged rows."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if torch.is_grad_enabled():
            if hidden_states.requires_grad:
                raise ArgumentError(
                    "the pixel rows require gradients, and qwen_vit's vision tower computes none",
                    remedy="pass pixel_values.detach(), or use transformers' own tower",
                )
            if self.training and not self.has_warned:
                self.has_warned = True
                logger.warning("the vision tower is frozen in this training: it has no gradients")
        merged = self.encoder.encode_patches(hidden_states, grid_thw)
        output = BaseModelOutputWithPooling(pooler_output=merged)
        return output if options.get("return_dict") is not False else output.to_tuple()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply .to, .cuda, .half and similar calls, whose effect on an empty tensor shows what
        they change."""
        shown = self.shown
        moved = fn(torch.empty(0, dtype=shown.dtype, device=self.device))
        self._move(choose_device(moved.device), moved.dtype)
        return self

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        shown, encoder = self.shown, self.encoder
        if dtype == torch.float16:
            raise ArgumentError(
                FLOAT16_OVERFLOWS,
                expected="bfloat16 or float32",
                remedy="convert the language model before you replace the tower, or convert only "
                "the language model",
            )
        is_replaced = device.type == "cpu" and dtype == torch.bfloat16
        computed = choose_dtype(torch.float32 if is_replaced else dtype, device)
        if is_replaced and (device, dtype) != (encoder.device, shown.dtype):
            logger.warning("the vision tower computes in float32 on a CPU, not in bfloat16")
        if (device, computed) != (encoder.device, encoder.dtype):
            image = encoder.image_config
            shown.encoder = VisionEncoder.from_checkpoint(
                encoder.checkpoint, encoder.source, device, computed,
                quantization=choose_quantization(encoder.quantization, device, computed),
                min_pixels=image.min_pixels, max_pixels=image.max_pixels,
                cuda_graphs=shown.cuda_graphs,
            )  # fmt: skip
        shown.dtype = dtype

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.encoder.checkpoint.tensors.as_stored():
            # a copy, because changes must not affect a mapped file or the caller's tensor
            destination[prefix + name] = tensor.to("cpu", copy=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
        strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load all or some weights, because transformers loads a model shard by shard."""
        names = self.shown.shapes
        missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
        given = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        unexpected_keys += [prefix + name for name in given.keys() - names.keys()]
        new = {name: given[name] for name in names if name in given}
        if not new:
            return
        old = dict(self.encoder.checkpoint.tensors.as_stored())
        if all(_same(tensor, old[name]) for name, tensor in new.items()):
            return
        try:
            self.shown.encoder = self._with_tensors(old | new)
        except QwenVitError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")

    def _with_tensors(self, tensors: dict[str, Tensor]) -> VisionEncoder:
        encoder = self.encoder
        return VisionEncoder.from_tensors(
            {name: _own(tensor) for name, tensor in tensors.items()},
            encoder.config,
            encoder.image_config,
            name=encoder.source.name,
            device=encoder.device,
            dtype=encoder.dtype,
            quantization=encoder.quantization,
            cuda_graphs=self.shown.cuda_graphs,
        )


def _own(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, because the caller may continue to train the original."""
    return tensor if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta:
        return False
    return torch.equal(one.detach().to(other.device), other)
