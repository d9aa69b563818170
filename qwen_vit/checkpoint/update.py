"""Write published tensors, in any order and a few at a time, into a tower's parameters.

An inference engine reads weights itself, and passes each tensor to this module. A trainer sends new
weights while the tower is in use. The parameters keep their memory, so captured CUDA graphs remain
valid.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qwen_vit.checkpoint.convert import Recipe, recipes
from qwen_vit.checkpoint.tower_names import (
    check_tensor,
    expected_tensors,
    joined_name,
    part_names,
)
from qwen_vit.common.tensors import check_finite, extremes
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.weight_format import Quantization

__all__ = ["WeightUpdates"]


class WeightUpdates:
    """Write each of a tower's parameters once all its published tensors have arrived.

    >>> from qwen_vit import VisionEncoder
    >>> tiny = VisionEncoder.from_pretrained("tiny", device="cpu")
    >>> updates = WeightUpdates(tiny.tower, tiny.config, tiny.image_config)
    >>> sorted(updates.load([("merger.mlp.2.bias", torch.zeros(192))]))
    ['merger.fc2.bias']
    >>> updates.load([("blocks.0.norm1.weight", torch.ones(160))])  # folded into qkv's weight
    set()
    >>> updates.missing
    ('blocks.0.attn.qkv.weight',)

    Args:
        tower: the `VisionTower`, whose parameters this class writes in place.
        image_config: the image settings, on which the weights for uint8 pixels depend.
    """

    def __init__(
        self,
        tower: nn.Module,
        config: VisionConfig,
        image_config: ImageConfig,
        quantization: Quantization | None = None,
    ) -> None:
        self._tower = tower
        self._parameters = dict(tower.named_parameters())
        self._shapes = expected_tensors(config)
        weight = tower.get_parameter("merger.fc1.weight")
        self._device, self._dtype = weight.device, weight.dtype
        with torch.device("cpu"):
            planned = list(
                recipes(config, image_config, self._dtype, self._device, quantization=quantization)
            )
        self._recipe_of: dict[str, Recipe] = {
            source: recipe for recipe in planned for source in recipe.sources
        }
        self._waiting: dict[str, Tensor] = {}

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the sorted published names of tensors that incomplete parameters need."""
        partners = {
            source
            for name in self._waiting
            for source in self._recipe_of[joined_name(name)].sources
        }
        return tuple(sorted(partners - self._waiting.keys()))

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Write all complete parameters, and return their names.

        Args:
            tensors: published names without prefix, such as "blocks.0.attn.qkv.weight", and tensors
                on any device. The method copies the tensors of incomplete parameters, so the caller
                may reuse all memory afterwards.

        Raises:
            CheckpointError: A tensor's name or shape does not match this tower, its dtype is
                unsupported, it contains NaN or infinity, or its values overflow the tower's dtype.
                The parameters written before the error keep their new values, so load all weights
                again.
        """
        # leave a caller's inference mode: parameters made in it could not be written again
        with torch.inference_mode(False), torch.no_grad():
            written, arrived = self._write(tensors)
            for name in arrived & self._waiting.keys():
                self._waiting[name] = self._waiting[name].clone()
            self._check_finite(written)
        return set(written)

    def _write(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> tuple[dict[str, tuple[Recipe, Tensor]], set[str]]:
        """Write complete parameters. Return their recipes and extremes, and all arrived names."""
        written: dict[str, tuple[Recipe, Tensor]] = {}
        arrived: set[str] = set()
        for name, tensor in tensors:
            check_tensor(name, tensor, self._shapes)
            self._waiting[name] = tensor.detach()
            joined = self._join(name)
            arrived |= {name, joined or name}
            recipe = self._recipe_of[joined] if joined else None
            if recipe is None or not all(source in self._waiting for source in recipe.sources):
                continue
            sources = (self._waiting.pop(source) for source in recipe.sources)
            made = recipe.make(*(source.to(self._device) for source in sources))
            for target, value in zip(recipe.targets, made, strict=True):
                self._parameter(target).copy_(value)
                written[target] = recipe, extremes(value).float()
        return written, arrived

    def _join(self, name: str) -> str | None:
        """Join q, k and v. Return the complete published name, or None if a part is missing."""
        joined = joined_name(name)
        if joined == name:
            return name
        parts = part_names(joined, split=True)
        if not all(part in self._waiting for part in parts):
            return None
        tensors = [self._waiting.pop(part).to(self._device) for part in parts]
        self._waiting[joined] = torch.cat(tensors)
        return joined

    def _parameter(self, name: str) -> Tensor:
        """Return the parameter into which a value is written.

        While vLLM reloads weights, the tower contains meta tensors as placeholders. vLLM restores
        the parameters at the end, and would lose a value in a placeholder.
        """
        found = self._tower.get_parameter(name)
        return self._parameters[name] if found.is_meta else found

    def _check_finite(self, written: Mapping[str, tuple[Recipe, Tensor]]) -> None:
        if not written:
            return
        limits = torch.stack([limit for _, limit in written.values()])
        for target, is_finite in zip(written, limits.isfinite().all(1).tolist(), strict=True):
            if not is_finite:
                recipe, _ = written[target]
                check_finite(self._parameter(target), " with ".join(recipe.sources))
