"""transformers' own tower from published tensors, and its stages under the oracle's names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from oracle import Trace, read_checkpoint
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)


def hf_config(config: Any) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        depth=config.depth,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        out_hidden_size=config.out_hidden_size,
        in_channels=config.in_channels,
        patch_size=config.patch_px,
        temporal_patch_size=config.temporal_patch_size,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_px,
        fullatt_block_indexes=list(config.fullatt_block_indexes),
        hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": config.rope_theta},
    )


def hf_tower(
    folder_or_tensors: Path | str | Mapping[str, Tensor],
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn: str = "sdpa",
) -> nn.Module:
    """Build the tower from a folder, or from bare-named tensors and a config; nothing is random.

    Parameters are cast to `dtype`; the rotary frequencies stay float32, as a cast of the whole
    module would not leave them.
    """
    if isinstance(folder_or_tensors, Mapping):
        tensors = folder_or_tensors
    else:
        tensors, own_config = read_checkpoint(folder_or_tensors)
        config = own_config if config is None else config
    theirs = hf_config(config)
    theirs._attn_implementation = attn
    with torch.device("meta"):
        model = Qwen2_5_VisionTransformerPretrainedModel(theirs)
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    # its buffers are in no checkpoint: made again, off the meta device
    model.rotary_pos_emb = type(model.rotary_pos_emb)(theirs).to(device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hf_trace(model: nn.Module, rows: Tensor, grids: Iterable[Any]) -> Trace:
    """Run the tower; stages "patch_embed", "block.0".., "merger" (row-major), on its device."""
    first = next(model.parameters())
    trace: Trace = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            trace[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    stages = {"patch_embed": model.patch_embed}
    stages |= {f"block.{i}": block for i, block in enumerate(model.blocks)}
    hooks = [module.register_forward_hook(record(name)) for name, module in stages.items()]
    sizes = [(g.t, g.h, g.w) if hasattr(g, "t") else tuple(g) for g in grids]
    try:
        grid_thw = torch.tensor(sizes, device=first.device)
        out = model(rows.to(first.device, first.dtype), grid_thw=grid_thw)
    finally:
        for hook in hooks:
            hook.remove()
    trace["merger"] = out.pooler_output
    return trace
