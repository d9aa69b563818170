"""Check on a GPU, for `tools.checks.trust`, equal bits in any batch, and the kernel alone."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.graphs import GraphRunner, bucket_for
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.model import VisionTower, plan_layout
from qwen_vit.weight_format import Quantization
from tests.support.attention_cases import (
    attention_oracle,
    random_case,
    stock_attention,
    tower_attention,
)
from tests.support.towers import (
    GridTuple,
    as_grids,
    build_tower,
    n_patches,
    random_pixels,
)
from tools.checks.trust_values import CheckCounts
from tools.random_tower import SHAPE, random_weights

KERNEL_LARGEST, KERNEL_MEAN = 1.25, 1.05


@dataclass(frozen=True, slots=True)
class Bitwise:
    """Hold a tower of the 7B shape with one window and one full block, and images for it."""

    tower: VisionTower
    graphs: GraphRunner
    device: torch.device
    dtype: torch.dtype
    grids: list[GridTuple]
    pixels: list[Tensor]

    @classmethod
    def make(
        cls, seed: int, device: torch.device, dtype: torch.dtype,
        quantization: Quantization | None,
    ) -> "Bitwise":  # fmt: skip
        config = VisionConfig.from_json({**SHAPE, "depth": 2, "fullatt_block_indexes": [1]})
        tensors = random_weights(config, seed, device)
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        tower = build_tower(on_host, config, ImageConfig.from_json({}), dtype, device, quantization)
        generator = random.Random(seed)
        grids = [(1, 2, 2), (1, 32, 32), (1, 46, 74), (1, 2, 60), (1, 58, 2), (1, 8, 8)]
        grids += [
            (1, 2 * generator.randint(1, 24), 2 * generator.randint(1, 24)) for _ in range(18)
        ]
        pixels = [random_pixels(n_patches([g]), i).to(device) for i, g in enumerate(grids)]
        return cls(tower, GraphRunner(tower, device), device, dtype, grids, pixels)

    def run(self, chosen: list[int], padding: int | None) -> Tensor:
        """Return the merged tokens of a batch, from separate launches with padding rows, or from a
        graph (None)."""
        grids = as_grids(self.grids[i] for i in chosen)
        pixels = torch.cat([self.pixels[i] for i in chosen])
        n_rows = bucket_for(len(pixels)) if padding is None else len(pixels) + padding
        layout = plan_layout(grids, self.tower.config, self.device, self.dtype, n_rows)
        merged = self.graphs.run(pixels, layout) if padding is None else None
        if merged is not None:
            return merged
        with torch.no_grad():
            tokens: Tensor = self.tower(pixels, layout.to(self.device))
        return tokens


def batches(
    count: int, seed: int, device: torch.device, dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> CheckCounts:  # fmt: skip
    """Check random batches, with padding rows or by a graph. Each image must have the bits of the
    image alone."""
    counts = CheckCounts("images with other bits", "0")
    case = Bitwise.make(seed, device, dtype, quantization)
    alone = [case.run([i], 0) for i in range(len(case.grids))]
    generator = random.Random(seed)
    wrong = torch.zeros(count, dtype=torch.int32, device=device)  # one copy to the host, at the end
    seen = []
    for run in range(count):
        chosen = generator.choices(range(len(case.grids)), k=generator.randint(1, 8))
        padding = generator.choice((None, None, 0, 4, 148, 2000))
        seen.append((chosen, padding))
        parts = case.run(chosen, padding).split([len(alone[i]) for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            wrong[run] += (part != alone[i]).any()
    for (chosen, padding), images in zip(seen, wrong.tolist(), strict=True):
        what = f"{[case.grids[i] for i in chosen]}, padding {padding}"
        counts.add(images, images == 0, what)
    return counts


def repeats(
    count: int, seed: int, device: torch.device, dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> CheckCounts:  # fmt: skip
    """Repeat the same batch, alternating between separate launches and a graph."""
    counts = CheckCounts("values with other bits", "0")
    case = Bitwise.make(seed, device, dtype, quantization)
    chosen = [1, 3, 2, 5]
    first = case.run(chosen, 0)
    wrong = torch.zeros(count, dtype=torch.int64, device=device)
    for run in range(count):
        wrong[run] = (case.run(chosen, None if run % 2 else 0) != first).sum()
    for run, values in enumerate(wrong.tolist()):
        counts.add(values, values == 0, f"repeat {run}")
    return counts


def kernel(count: int, seed: int, device: torch.device, kind: str) -> CheckCounts:
    """Compare the bf16 kernel and PyTorch's bf16 attention with fp32 RoPE against float64.

    Over all layouts together, the check bounds the largest error and the mean over all values.
    """
    counts = CheckCounts("x torch's mean error", f"{KERNEL_MEAN}, largest {KERNEL_LARGEST}")
    largest, total = [0.0, 0.0], [0.0, 0.0]
    for case in range(count):
        generator = random.Random(f"{seed} {case} {kind}")
        longest = 64 if kind == "window" else generator.choice((40, 300, 1500))
        lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 12))]
        arguments = random_case(
            lengths, 80, 4, seed=seed + case, device=device, dtype=torch.bfloat16
        )
        qkv, cos, sin, _ = arguments
        truth, stock = attention_oracle(*arguments), stock_attention(*arguments)
        if kind == "alone":
            ours = fused_rope_varlen_attention(*arguments)
        else:
            ours = tower_attention(qkv, cos, sin, lengths, kind)
        for side, result in enumerate((ours, stock)):
            error = (result.double() - truth).abs()
            largest[side] = max(largest[side], float(error.max()))
            total[side] += float(error.sum())
        counts.runs += 1
    counts.worst, ratio = total[0] / total[1], largest[0] / largest[1]
    if not (counts.worst <= KERNEL_MEAN and ratio <= KERNEL_LARGEST):
        counts.failures.append(f"mean {counts.worst:.3f}, largest {ratio:.3f} times torch's")
    counts.allowed += f" (is {ratio:.3f})"
    return counts
