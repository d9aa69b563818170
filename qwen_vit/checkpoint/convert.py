"""Convert published tensors to parameters: rename, permute, interleave, pad, fold and quantise.

The weights of a block's two norms become factors of the linear layers that follow them. The patch
embedding has two sets of weights: the published ones for float rows, and folded ones for uint8
pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from qwen_vit.checkpoint.to_device import to_device
from qwen_vit.common.tensors import all_finite, check_finite, extremes
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import CheckpointError, with_options
from qwen_vit.weight_format import (
    PIXEL_ZERO,
    Quantization,
    fp8_column_order,
    interleave_fp8,
    padded_mlp_size,
    padded_pixel_size,
    pixel_weight_exponent,
    quantize,
)

__all__ = [
    "Recipe",
    "convert",
    "recipes",
    "rotary_permutation",
]

CPU = torch.device("cpu")

# Published name -> the model's name, for tensors of which only the dtype may change.
RENAMES = (
    ("merger.ln_q.weight", "merger.norm_weight"),
    ("merger.mlp.0.weight", "merger.fc1.weight"),
    ("merger.mlp.0.bias", "merger.fc1.bias"),
    ("merger.mlp.2.weight", "merger.fc2.weight"),
    ("merger.mlp.2.bias", "merger.fc2.bias"),
)
PATCH_WEIGHT = "patch_embed.proj.weight"
PATCH_TENSORS = ("patch_embed.weight", "patch_embed.pixel_weight", "patch_embed.pixel_bias")
# For each block: (published name, the model's name).
RENAMES_IN_BLOCKS = (
    ("attn.proj.weight", "attn.proj.weight"),
    ("attn.proj.bias", "attn.proj.bias"),
    ("mlp.down_proj.bias", "mlp.down.bias"),
)

GATE_UP_TURN = (
    8  # rows of gate, then of up: one thread of a matrix instruction has both values of a pair
)
ROWS_FOLDED_AT_ONCE = 64  # for the patch embedding


def rotary_permutation(head_dim: int) -> Tensor:
    """Return the permutation that moves the rotary pair (j, j + D/2) of a head to (2j, 2j + 1).

    >>> rotary_permutation(6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return torch.arange(head_dim).view(2, head_dim // 2).T.flatten()


def convert(
    tensors: Mapping[str, Tensor],
    config: VisionConfig,
    image_config: ImageConfig,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    quantization: Quantization | None = None,
    locate: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Return the state of model.VisionTower from published tensors.

    `dtype` is bfloat16 or float32. For bfloat16, the patch embedding's weights are float16. With
    `quantization`, the MLP's weights are e4m3 with scales.

    The function reads each tensor on demand and converts it on `device`. It converts only the patch
    embedding, a small tensor, on the CPU, in float64. The bits do not depend on the device.

    Raises CheckpointError for weights that are NaN or infinite, or that overflow during the
    conversion. `locate` gives the place of a NaN or infinite weight for the message.
    """
    planned = list(
        recipes(config, image_config, dtype, device, quantization=quantization, locate=locate)
    )
    sources = [name for recipe in planned for name in recipe.sources]
    arriving = to_device((tensors[name] for name in sources), device)
    state: dict[str, Tensor] = {}
    limits = []
    for recipe in planned:
        made = recipe.make(*islice(arriving, len(recipe.sources)))
        state |= zip(recipe.targets, made, strict=True)
        # a product with a NaN or infinite factor is not finite, so checking products also checks
        # their sources
        limits += [extremes(tensor).float() for tensor in made]
    are_finite = iter(torch.stack(limits).isfinite().all(1).tolist())  # waits for the device, once
    for recipe in planned:
        if not all(list(islice(are_finite, len(recipe.targets)))):
            for name in recipe.sources:
                check_finite(tensors[name], locate(name))
            for target in recipe.targets:
                check_finite(state[target], f"{' with '.join(recipe.sources)} in {dtype}")
    return state


@dataclass(frozen=True, slots=True)
class Recipe:
    """Compute some of the model's tensors, the `targets`, from published tensors, the `sources`."""

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[..., tuple[Tensor, ...]]


def recipes(
    config: VisionConfig,
    image_config: ImageConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: Quantization | None = None,
    locate: Callable[[str], str] = str,
) -> Iterator[Recipe]:
    """Yield the recipes that together compute all of the model's tensors.

    Every published tensor is a source of one recipe. A recipe takes its sources on `device`.
    """
    order = _rotary_order(config).to(device)

    def same(tensor: Tensor) -> tuple[Tensor]:
        # copy it: the source may be a map of a file that is deleted later, or a caller's tensor
        return (tensor.to(dtype, copy=True),)

    def qkv_weight(weight: Tensor, gain: Tensor) -> tuple[Tensor]:
        return (_folded(weight, gain).to(dtype)[order],)

    def qkv_bias(bias: Tensor) -> tuple[Tensor]:
        return (bias.to(dtype)[order],)

    def patch_embedding(weight: Tensor) -> tuple[Tensor, ...]:
        # small, and in float64: convert it on the CPU, so that the bits do not depend on the device
        checked = check_finite(weight, locate(PATCH_WEIGHT)).cpu()
        exponent, width = pixel_weight_exponent(dtype), padded_pixel_size(config)
        parts = _patch_embedding(checked, image_config, exponent, width)
        return tuple(part.to(device) for part in parts)

    for published, ours in RENAMES:
        yield Recipe((ours,), (published,), same)
    for i in range(config.depth):
        block = f"blocks.{i}."
        norm1, norm2 = f"{block}norm1.weight", f"{block}norm2.weight"
        qkv = f"{block}attn.qkv"
        for published, ours in RENAMES_IN_BLOCKS:
            yield Recipe((block + ours,), (block + published,), same)
        yield Recipe((f"{qkv}.weight",), (f"{qkv}.weight", norm1), qkv_weight)
        yield Recipe((f"{qkv}.bias",), (f"{qkv}.bias",), qkv_bias)
        yield from _mlp_recipes(f"{block}mlp", norm2, config, dtype, quantization)
    yield Recipe(PATCH_TENSORS, (PATCH_WEIGHT,), patch_embedding)


def _mlp_recipes(
    mlp: str, gain: str, config: VisionConfig, dtype: torch.dtype, quantization: Quantization | None
) -> Iterator[Recipe]:
    I_padded = padded_mlp_size(config)
    woven = interleave if quantization is None else interleave_fp8
    parts = ("weight",) if quantization is None else ("weight", "weight_scale")
    columns = None if quantization is None else fp8_column_order(config.hidden_size)

    def stored(weight: Tensor) -> tuple[Tensor, ...]:
        if quantization is None:
            return (weight.to(dtype),)
        # rounded once, with a scale per output column; NaN and infinity stay
        quantized = quantize(weight, weight.shape[1])
        return quantized.values, quantized.scales[0]

    def gate_up_weight(gate: Tensor, up: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        weight = woven(*(_pad(_folded(half, gain), 0, I_padded) for half in (gate, up)))
        if columns is not None:
            weight = weight[:, columns.to(weight.device)]
        return stored(weight)

    def gate_up_bias(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (woven(*(_pad(half.to(dtype), 0, I_padded) for half in (gate, up))),)

    def down_weight(down: Tensor) -> tuple[Tensor, ...]:
        return stored(_pad(down.float(), 1, I_padded))

    halves = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    weights, biases = ([f"{half}.{part}" for half in halves] for part in ("weight", "bias"))
    targets = tuple(f"{mlp}.gate_up.{part}" for part in parts)
    yield Recipe(targets, (*weights, gain), gate_up_weight)
    yield Recipe((f"{mlp}.gate_up.bias",), (*biases,), gate_up_bias)
    targets = tuple(f"{mlp}.down.{part}" for part in parts)
    yield Recipe(targets, (f"{mlp}.down_proj.weight",), down_weight)


def _folded(weight: Tensor, gain: Tensor) -> Tensor:
    # W (g * x) = (W g) x, and the product of two bfloat16 numbers is exact in float32
    return weight.float() * gain.float()


def _patch_embedding(
    weight: Tensor, image_config: ImageConfig, exponent: int, K: int
) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.tensor(image_config.image_mean, dtype=torch.float64).view(3, 1, 1, 1)
    std = torch.tensor(image_config.image_std, dtype=torch.float64).view(3, 1, 1, 1)
    stored = torch.float32 if exponent == 0 else torch.float16

    def fold(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = rows.double()  # (rows, 3, frames, patch_px, patch_px)
        # w * (pixel / 255 - mean) / std, split at pixel = 128; both frames are the same image
        folded = (w / (255 * std)).sum(2).flatten(1) * 2.0**exponent
        bias = (w * ((PIXEL_ZERO / 255 - mean) / std)).flatten(1).sum(1)
        row_weight = (w * 2.0**exponent).flatten(
            1
        )  # bfloat16 values stay exact in float16's normal range
        return row_weight.to(stored), _pad(folded, 1, K).to(stored), bias.float()

    # few rows at a time: float64 takes four times the bytes, for several intermediate results
    parts = zip(*map(fold, weight.split(ROWS_FOLDED_AT_ONCE)), strict=True)
    row_weight, pixel_weight, pixel_bias = (torch.cat(part) for part in parts)
    for name, tensor in (
        ("weights", row_weight),
        ("folded weights", pixel_weight),
        ("folded biases", pixel_bias),
    ):
        if not all_finite(tensor):
            raise CheckpointError(
                f"has values up to {weight.abs().max().item():g}, and its {name} overflow "
                f"{tensor.dtype}",
                name=PATCH_WEIGHT,
                remedy=with_options(
                    "use {}, or download the checkpoint again", ("dtype", "float32")
                ),
            )
    return row_weight, pixel_weight, pixel_bias


def _rotary_order(config: VisionConfig) -> Tensor:
    """Return the stored row order of q, k and v, in which rotary pairs of q and k are adjacent."""
    D = config.head_dim
    rows = torch.arange(3 * config.hidden_size).view(3, config.num_heads, D)
    rows[:2] = rows[:2, :, rotary_permutation(D)]
    return rows.flatten()


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Alternate 8 rows of gate with 8 rows of up. Padding rows of zeros give silu(0) * 0 = 0."""
    turns = [half.view(-1, GATE_UP_TURN, *half.shape[1:]) for half in (gate, up)]
    return torch.stack(turns, 1).flatten(0, 2)


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim)
