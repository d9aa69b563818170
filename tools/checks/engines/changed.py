"""Write the small model with different weights, and the correct answers, for update checks."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from shutil import copytree

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.checks.engines.answers import Result, compare
from tools.checks.engines.context import Context
from tools.checks.engines.reference import reference_answers

UPDATED = ("several", "video", "videos and a picture")  # the cases after an update
IN_PIECES = "changed in pieces"  # the prefix of ways with the changed model's answers
INT8 = {  # llm-compressor's config for all linear layers except the head
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}  # fmt: skip
PIECE = 7  # tensors in one message of an update


def write_model_with(work: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a copy of the model with other weights."""
    folder = work / name
    copytree(work / "model", folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_unfit(work: Path) -> None:
    """Write copies that our tower rejects: WORK/quantised, WORK/compressed and WORK/incomplete."""
    tensors = load_file(work / "model" / "model.safetensors")
    weight = "visual.blocks.1.mlp.down_proj.weight"
    quantised = tensors[weight].clamp(-400, 400).to(torch.float8_e4m3fn)
    write_model_with(work, "quantised", {**tensors, weight: quantised})
    fewer = {name: tensor for name, tensor in tensors.items() if name != weight}
    write_model_with(work, "incomplete", fewer)
    write_model_with(work, "compressed", tensors)  # our tower rejects it before it reads a weight
    path = work / "compressed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": INT8}))


def pieces(work: Path) -> list[list[tuple[str, Tensor]]]:
    """Return the changed vision tensors in pieces, in an order that separates partners."""
    tensors = load_file(work / "changed" / "model.safetensors")
    vision = [(name, tensor) for name, tensor in tensors.items() if name.startswith("visual.")]
    Random(0).shuffle(vision)
    return [vision[begin : begin + PIECE] for begin in range(0, len(vision), PIECE)]


@dataclass(frozen=True, slots=True)
class Changed:
    """Hold the model and a copy with different vision weights, with both correct answers."""

    before: Context
    after: Context

    @classmethod
    def write(cls, context: Context) -> "Changed":
        """Write the copy into WORK/changed, and answer the cases with it."""
        tensors = load_file(context.work / "model" / "model.safetensors")
        for name, tensor in tensors.items():
            if name.startswith("visual."):
                tensors[name] = tensor * (1.25 if "norm" in name or "ln_q" in name else 0.9)
        write_model_with(context.work, "changed", tensors)
        reference = reference_answers(context.work / "changed")
        return cls(context, replace(context, reference=reference))

    def compare(self, name: str, label: Callable[[str], str]) -> list[Result]:
        """Compare a child's answers with the answers for the weights that the child had at the
        time."""
        return [
            *(row for row in self.before.compare(name, label) if IN_PIECES not in row.scenario),
            *(row for row in self.after.compare(name, label) if IN_PIECES in row.scenario),
            *(
                compare("control", f"changed: {case}", self.after.reference[case],
                        self.before.reference[case], must_differ=True)
                for case in UPDATED
            ),
        ]  # fmt: skip
