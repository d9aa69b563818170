"""Define the names, shapes and types of a vision tower's tensors, and check tensors."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from qwen_vit.common.safetensors_header import TensorInfo
from qwen_vit.config import VisionConfig
from qwen_vit.errors import CheckpointError, plural

__all__ = [
    "ANCHOR_KEY",
    "check_tensor",
    "check_tower",
    "expected_tensors",
    "find_prefix",
    "joined_name",
    "part_names",
    "plain_name",
    "tensor_info",
    "tower_prefixes",
]

# The prefixes of a tower's names: "visual." (the Hub's files), "model.visual." (transformers >=
# 4.52 in memory), "thinker.visual." (Qwen2.5-Omni), nothing (a tower saved alone), or a longer path
# in a larger model. One name that every tower has once identifies each prefix.
ANCHOR_KEY = "patch_embed.proj.weight"

# The types that a tower may have, by their names in safetensors headers.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
STORED_DTYPES = tuple(DTYPE_NAMES.values())
SPLIT_QKV = re.compile(r"\.attn\.[qkv]\.")  # as Qwen2.5-Omni stores them
USE_ITS_CONFIG = "use the config.json that belongs to the weights"

# Names that only other towers have.
OTHER_TOWERS = (
    (re.compile(r"\.mlp\.fc1\.|^merger\.ln_q\.bias$"), "Qwen2-VL"),
    (re.compile(r"^pos_embed\.|\.mlp\.linear_fc1\.|^deepstack_merger_list\."), "Qwen3-VL"),
)
# Parts of names in a state dict that was saved from a wrapped module.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
MERGE = "merge it first (peft's merge_and_unload) and save the result"
# Names in state dicts of training tools that contain no complete tower: what they are, the remedy.
SAVED_BY_TOOLS = (
    (
        re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\."),
        "a LoRA without its base weights",
        MERGE,
    ),
    (re.compile(r"\.(modules_to_save|original_module)\."), "PEFT's modules_to_save", MERGE),
    (re.compile(r"\.base_layer\."), "a LoRA's base layers", MERGE),
    (
        re.compile(r"(^|\.)_flat_param(_\d+)?$|\.flat_param$"),
        "FSDP's flat parameters",
        "save a full state dict (StateDictType.FULL_STATE_DICT)",
    ),
)
# Names that quantisers store in addition to a weight, or instead of it.
QUANTISED = re.compile(
    r"\.(weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape|input_scale"
    r"|scales|qweight|qzeros|g_idx|SCB|weight_format|weight\.(absmax|quant_map|quant_state).*)$"
)


def expected_tensors(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the published name and shape of every tensor of a tower: 390 at depth 32."""
    C, I = config.hidden_size, config.intermediate_size  # noqa: E741
    merged = C * config.merge_unit
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (C,),
        "attn.qkv.weight": (3 * C, C),
        "attn.qkv.bias": (3 * C,),
        "attn.proj.weight": (C, C),
        "attn.proj.bias": (C,),
        "norm2.weight": (C,),
        "mlp.gate_proj.weight": (I, C),
        "mlp.gate_proj.bias": (I,),
        "mlp.up_proj.weight": (I, C),
        "mlp.up_proj.bias": (I,),
        "mlp.down_proj.weight": (C, I),
        "mlp.down_proj.bias": (C,),
    }
    frames, side = config.temporal_patch_size, config.patch_px
    return {
        ANCHOR_KEY: (C, config.in_channels, frames, side, side),
        **{f"blocks.{i}.{k}": shape for i in range(config.depth) for k, shape in block.items()},
        "merger.ln_q.weight": (C,),
        "merger.mlp.0.weight": (merged, merged),
        "merger.mlp.0.bias": (merged,),
        "merger.mlp.2.weight": (config.out_hidden_size, merged),
        "merger.mlp.2.bias": (config.out_hidden_size,),
    }


def tower_prefixes(names: Iterable[str]) -> list[str]:
    """Return the sorted prefixes of the vision towers.

    >>> tower_prefixes(["visual.patch_embed.proj.weight", "model.norm.weight"])
    ['visual.']
    """
    return sorted(
        name.removesuffix(ANCHOR_KEY)
        for name in names
        if name == ANCHOR_KEY or name.endswith(f".{ANCHOR_KEY}")
    )


def find_prefix(names: Collection[str], source: str) -> str:
    """Return the prefix of the one tower among `names`.

    >>> find_prefix(["visual.patch_embed.proj.weight", "model.norm.weight"], "folder")
    'visual.'
    """
    prefixes = tower_prefixes(names)
    if not prefixes:
        _refuse_as_tools_save(dict.fromkeys(names), source)
    if len(prefixes) > 1:
        listed = ", ".join(prefix or "no prefix" for prefix in prefixes[:5])
        raise CheckpointError(
            f"contains {len(prefixes)} vision towers, under {listed}",
            name=source,
            expected="one",
            remedy="save the right tower alone",
        )
    if not prefixes:
        raise CheckpointError(
            f"no vision tower: none of its {len(names)} tensors ({_some(names)}) is named "
            f"{ANCHOR_KEY}",
            name=source,
            remedy="use a Qwen2.5-VL checkpoint",
        )
    return prefixes[0]


def check_tower(
    infos: Mapping[str, TensorInfo],
    config: VisionConfig,
    *,
    source: str,
    locate: Callable[[str], str],
) -> dict[str, tuple[str, ...]]:
    """Check a tower. Return each published tensor's stored names: its own, or the names of q, k and
    v.

    `infos` maps names without prefix to header entries.
    """
    _refuse_other_towers(infos, source, locate)
    _refuse_as_tools_save({name: info.shape for name, info in infos.items()}, source)
    _refuse_quantised(infos, source, locate)
    shapes = expected_tensors(config)
    split = "blocks.0.attn.q.weight" in infos
    parts_of = {name: part_names(name, split=split) for name in shapes}
    expected = {part for parts in parts_of.values() for part in parts}
    missing, extra = expected - infos.keys(), infos.keys() - expected
    if missing or extra:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} vision tensors are missing ({_some(missing)}) and "
            f"{len(extra)} are unknown ({_some(extra)})",
            name=source,
            remedy=f"{USE_ITS_CONFIG}, or download the weights again",
        )
    for name, parts in parts_of.items():
        shape = (shapes[name][0] // len(parts), *shapes[name][1:])
        for part in parts:
            if infos[part].shape != shape:
                _check_shape(locate(part), infos[part], shape)
    return parts_of


def check_tensor(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if the name or shape contradicts `shapes`, or if the type is not
    float32, bfloat16 or float16.

    `shapes` contains q, k and v as one tensor. Each of the three must be a third of this tensor.

    >>> shapes = {"merger.ln_q.weight": (1280,)}
    >>> check_tensor("merger.ln_q.weight", torch.ones(80), shapes)
    Traceback (most recent call last):
    qwen_vit.errors.CheckpointError: merger.ln_q.weight: has the shape [80]. \
Expected [1280] from config.json. Use the config.json that belongs to the weights.
    """
    info = tensor_info(tensor)
    _refuse_other_towers({name: info}, "the vision weights", str)
    _refuse_as_tools_save({name: info.shape}, "the vision weights")
    _refuse_quantised({name: info}, "the vision weights", str)
    joined = joined_name(name)
    if joined not in shapes:
        raise CheckpointError("not a tensor of this vision tower", name=name, remedy=USE_ITS_CONFIG)
    n_parts = 1 if joined == name else 3
    _check_shape(name, info, (shapes[joined][0] // n_parts, *shapes[joined][1:]))


def tensor_info(tensor: Tensor) -> TensorInfo:
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    return TensorInfo(dtype, tuple(tensor.shape), 0, tensor.nbytes)


def _check_shape(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"has the shape {list(info.shape)}",
            name=name,
            expected=f"{list(shape)} from config.json",
            remedy=USE_ITS_CONFIG,
        )


def joined_name(name: str) -> str:
    """Return a stored tensor's published name: for q, k and v, the joined tensor's name.

    >>> joined_name("blocks.0.attn.k.bias")
    'blocks.0.attn.qkv.bias'
    """
    return SPLIT_QKV.sub(".attn.qkv.", name)


def part_names(name: str, *, split: bool) -> tuple[str, ...]:
    """Return the stored names of a published tensor: its own name, or the names of q, k and v.

    >>> part_names("blocks.0.attn.qkv.bias", split=True)
    ('blocks.0.attn.q.bias', 'blocks.0.attn.k.bias', 'blocks.0.attn.v.bias')
    """
    if split and ".attn.qkv." in name:
        return tuple(name.replace(".qkv.", f".{letter}.") for letter in "qkv")
    return (name,)


def _refuse_other_towers(
    infos: Mapping[str, TensorInfo], source: str, locate: Callable[[str], str]
) -> None:
    for pattern, model in OTHER_TOWERS:
        for name in sorted(infos):
            if pattern.search(name):
                raise CheckpointError(
                    f"contains the vision tower of {model} ({locate(name)})",
                    name=source,
                    expected="Qwen2.5-VL",
                    remedy="use transformers for this model",
                )


def _refuse_as_tools_save(shapes: Mapping[str, tuple[int, ...] | None], source: str) -> None:
    """Raise CheckpointError if a tool saved the tensors incompletely or in another layout: LoRA,
    FSDP, DeepSpeed ZeRO-3 or MLX."""
    for pattern, what, remedy in SAVED_BY_TOOLS:
        found = [name for name in shapes if pattern.search(name)]
        if found:
            raise CheckpointError(
                f"contains {what} ({_some(found)})",
                name=source,
                expected="a whole vision tower",
                remedy=remedy,
            )
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    empty = [name for name, shape in known.items() if 0 in shape]
    if empty:
        raise CheckpointError(
            f"it has {plural(len(empty), 'empty vision tensor')} ({_some(empty)}), because "
            "DeepSpeed ZeRO-3 saved the state dict without gathering the tensors",
            name=source,
            remedy="run DeepSpeed's zero_to_fp32.py, or save with "
            "stage3_gather_16bit_weights_on_model_save",
        )
    anchor = known.get(ANCHOR_KEY)
    if anchor is not None and len(anchor) == 5 and anchor[-1] == 3 != anchor[1]:
        raise CheckpointError(
            f"stored in MLX's layout: {ANCHOR_KEY} has the channels last, {list(anchor)}",
            name=source,
            expected="the published layout",
            remedy="use the safetensors checkpoint from before the conversion",
        )


def plain_name(name: str) -> str:
    """Return a name without the parts that torch.compile, FSDP, DDP and checkpointing add.

    >>> plain_name("module.visual._orig_mod.blocks.0._fsdp_wrapped_module.norm1.weight")
    'visual.blocks.0.norm1.weight'
    """
    return WRAPPERS.sub("", name)


def _refuse_quantised(
    infos: Mapping[str, TensorInfo], source: str, locate: Callable[[str], str]
) -> None:
    quantised = {name for name in infos if QUANTISED.search(name)}
    other = {name for name, info in infos.items() if info.dtype not in STORED_DTYPES}
    if quantised or other:
        first = min(other or quantised)
        raise CheckpointError(
            f"it has {plural(len(quantised | other), 'vision tensor')} of a quantised or other "
            f"type ({_some(quantised | other)}; {locate(first)} is {infos[first].dtype})",
            name=source,
            expected=", ".join(STORED_DTYPES),
            remedy="use a checkpoint that leaves the vision tower unquantised",
        )


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"
