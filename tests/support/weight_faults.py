"""Inject a fault into one tensor of a checkpoint at a time, as from a damaged download."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen_vit.checkpoint.published_tensors import GivenTensors
from qwen_vit.encoder import VisionEncoder
from tests.support.towers import build_tower


@dataclass(frozen=True, slots=True)
class WeightFault:
    """Hold one tensor, its fault, and the first stage that uses the tensor."""

    tensor: str
    fault: str
    stage: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.tensor}"


def every_fault(tensors: Mapping[str, Tensor]) -> Iterator[WeightFault]:
    """Define the faults: one row times 1.05 (weights), a dropped bias (biases), two swapped rows
    (all)."""
    for name in tensors:
        stage = f"block.{name.split('.')[1]}" if name.startswith("blocks.") else name.split(".")[0]
        first = "bias dropped" if name.endswith("bias") else "row scaled"
        for fault in (first, "rows swapped"):
            yield WeightFault(name, fault, stage)


def damaged(tensor: Tensor, fault: str, seed: int) -> Tensor:
    """Return the tensor with the fault, in rows that a seed selects."""
    wrong = tensor.clone()
    first, second = torch.randperm(
        len(tensor), generator=torch.Generator().manual_seed(seed)
    ).tolist()[:2]
    if fault == "row scaled":
        wrong[first] *= 1.05
    elif fault == "bias dropped":
        wrong.zero_()
    else:
        wrong[[first, second]] = wrong[[second, first]]
    return wrong


def inject_fault(encoder: VisionEncoder, fault: WeightFault, seed: int = 0) -> VisionEncoder:
    """Return the same encoder with a damaged checkpoint."""
    tensors = dict(encoder.checkpoint.tensors)
    tensors[fault.tensor] = damaged(tensors[fault.tensor], fault.fault, seed)
    given = GivenTensors({name: (tensor,) for name, tensor in tensors.items()})
    tower = build_tower(tensors, encoder.config, encoder.image_config, encoder.dtype)
    return replace(encoder, tower=tower, checkpoint=replace(encoder.checkpoint, tensors=given))
