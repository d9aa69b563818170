"""Published tensors -> the model's parameters: renamed, permuted, concatenated, padded, folded.

Nothing is lost on the way: every published weight lands in one place. The weights of a block's two
norms are multiplied into the products that follow them; the patch embedding is stored once as
published (for float rows) and once folded for uint8 pixels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError
from qwen_vit.finite import all_finite

__all__ = [
    "check_finite",
    "convert",
    "padded_mlp_size",
    "padded_pixel_size",
    "pixel_weight_exponent",
    "rotary_permutation",
]

# Published name -> the model's, for what is copied as it is.
RENAMES = (
    ("merger.ln_q.weight", "merger.norm_weight"),
    ("merger.mlp.0.weight", "merger.fc1.weight"),
    ("merger.mlp.0.bias", "merger.fc1.bias"),
    ("merger.mlp.2.weight", "merger.fc2.weight"),
    ("merger.mlp.2.bias", "merger.fc2.bias"),
)
PATCH_WEIGHT = "patch_embed.proj.weight"
# Block by block, (published, the model's).
RENAMES_IN_BLOCKS = (
    ("attn.proj.weight", "attn.proj.weight"),
    ("attn.proj.bias", "attn.proj.bias"),
    ("mlp.down_proj.bias", "mlp.down.bias"),
)

MLP_MULTIPLE = 128  # one tile of the products; 3420 alone, not aligned to 16 bytes, costs 3.5x
GATE_UP_TURN = 8  # rows of the gate, then of up: a matrix instruction's thread holds both of a pair
PIXEL_MULTIPLE = 64
PIXEL_ZERO = 128  # uint8 pixels enter as pixel - 128, so that fp16 holds every one exactly


def pixel_weight_exponent(dtype: torch.dtype) -> int:
    """Return e, where pixel_weight is stored times 2**e: 10 for bfloat16, 0 for float32.

    With bfloat16 the folded weights are float16, which has 3 more bits but a smaller range: the
    factor keeps weights of about 1e-4 out of its subnormal numbers.

    >>> pixel_weight_exponent(torch.bfloat16)
    10
    """
    exponents = {torch.bfloat16: 10, torch.float32: 0}
    if dtype == torch.float16:
        raise ArgumentError(
            "dtype float16 is refused: the published weights overflow it in the last block; "
            "use bfloat16 or float32"
        )
    if dtype not in exponents:
        raise ArgumentError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float32")
    return exponents[dtype]


def padded_mlp_size(config: VisionConfig) -> int:
    """Return I', the MLP size with zero padding: a multiple of 128."""
    return _round_up(config.intermediate_size, MLP_MULTIPLE)


def padded_pixel_size(config: VisionConfig) -> int:
    """Return K, the values of one patch in one frame, with zero padding: a multiple of 64."""
    return _round_up(config.in_channels * config.patch_px**2, PIXEL_MULTIPLE)


def rotary_permutation(head_dim: int) -> Tensor:
    """Return the order that puts the rotary pair (j, j + D/2) of a head at (2j, 2j + 1).

    >>> rotary_permutation(6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return torch.arange(head_dim).view(2, head_dim // 2).T.flatten()


def convert(
    tensors: Mapping[str, Tensor],
    config: VisionConfig,
    image_config: ImageConfig,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the state of model.VisionTower, in bfloat16 or float32, from published tensors.

    Each is read when its turn comes. Raises CheckpointError for NaN or infinite weights, by name.
    """
    exponent = pixel_weight_exponent(dtype)

    def read(name: str) -> Tensor:
        # A copy, since the source may be a map of a file that is gone tomorrow.
        return check_finite(tensors[name], name).to(dtype, copy=True)

    def read_folded(name: str, norm: str) -> Tensor:
        # W (g * x) = (W g) x, and the product of two bfloat16 numbers is exact in float32
        weight, gain = (check_finite(tensors[n], n).float() for n in (name, norm))
        return check_finite((weight * gain).to(dtype), f"{name} times {norm}")

    state = {ours: read(published) for published, ours in RENAMES}
    state |= _patch_embedding(
        check_finite(tensors[PATCH_WEIGHT], PATCH_WEIGHT),
        image_config,
        exponent,
        padded_pixel_size(config),
    )
    I_padded = padded_mlp_size(config)
    for i in range(config.depth):
        block = f"blocks.{i}."
        for published, ours in RENAMES_IN_BLOCKS:
            state[block + ours] = read(block + published)
        down = read(f"{block}mlp.down_proj.weight")
        state[f"{block}mlp.down.weight"] = _pad(down, 1, I_padded)
        qkv, gate_up = f"{block}attn.qkv", f"{block}mlp.gate_up"
        halves = [f"{block}mlp.{half}_proj" for half in ("gate", "up")]
        norm1, norm2 = f"{block}norm1.weight", f"{block}norm2.weight"
        state[f"{qkv}.weight"] = _permute_rotary(read_folded(f"{qkv}.weight", norm1), config)
        state[f"{qkv}.bias"] = _permute_rotary(read(f"{qkv}.bias"), config)
        state[f"{gate_up}.weight"] = _take_turns(
            *(_pad(read_folded(f"{half}.weight", norm2), 0, I_padded) for half in halves)
        )
        state[f"{gate_up}.bias"] = _take_turns(
            *(_pad(read(f"{half}.bias"), 0, I_padded) for half in halves)
        )
    return state


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor, or raise CheckpointError with its name and its NaN and infinite values."""
    if not all_finite(tensor):
        raise CheckpointError(
            f"{name} holds {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} "
            f"infinite values of {tensor.numel()}, expected finite weights; delete the file and "
            "download it again (qwen-vit download MODEL)"
        )
    return tensor


def _patch_embedding(
    weight: Tensor, image_config: ImageConfig, exponent: int, K: int
) -> dict[str, Tensor]:
    w = weight.double()  # (C, 3, frames, patch_px, patch_px)
    mean = torch.tensor(image_config.image_mean, dtype=torch.float64).view(3, 1, 1, 1)
    std = torch.tensor(image_config.image_std, dtype=torch.float64).view(3, 1, 1, 1)
    # w * (pixel / 255 - mean) / std, split at pixel = 128, both frames being the same image
    folded = (w / (255 * std)).sum(2).flatten(1) * 2.0**exponent  # (C, 3 * patch_px * patch_px)
    pixel_weight = _pad(folded, 1, K).to(torch.float32 if exponent == 0 else torch.float16)
    row_weight = (w * 2.0**exponent).flatten(1).to(pixel_weight.dtype)  # bfloat16 fits exactly
    pixel_bias = (w * ((PIXEL_ZERO / 255 - mean) / std)).flatten(1).sum(1).float()  # (C,)
    for name, tensor in (
        ("weights", row_weight),
        ("folded weights", pixel_weight),
        ("folded biases", pixel_bias),
    ):
        if not all_finite(tensor):
            raise CheckpointError(
                f"{PATCH_WEIGHT} reaches {weight.abs().max().item():g}: its {name} "
                f"overflow {tensor.dtype}; use dtype float32, or download the checkpoint again"
            )
    return {
        "patch_embed.weight": row_weight,
        "patch_embed.pixel_weight": pixel_weight,
        "patch_embed.pixel_bias": pixel_bias,
    }


def _permute_rotary(qkv: Tensor, config: VisionConfig) -> Tensor:
    D = config.head_dim
    rows = torch.arange(len(qkv)).view(3, config.num_heads, D)  # q, k, v
    rows[:2] = rows[:2, :, rotary_permutation(D)]
    return qkv[rows.flatten()]


def _take_turns(gate: Tensor, up: Tensor) -> Tensor:
    """8 rows of the gate, 8 of up, and so on; the zeros at their ends give silu(0) * 0 = 0."""
    turns = [half.view(-1, GATE_UP_TURN, *half.shape[1:]) for half in (gate, up)]
    return torch.stack(turns, 1).flatten(0, 2)


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
