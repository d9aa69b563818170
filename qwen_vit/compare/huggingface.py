"""Run Hugging Face's processors and tower, stage by stage, as the reference of a comparison.

Its functions import transformers only when they run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.transformers_version import require_transformers
from qwen_vit.compare.choices import Processor
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.stages import record_stages
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, ImageError, Wording, with_options
from qwen_vit.metadata import decoder_versions

__all__ = [
    "Processed",
    "check_transformers",
    "hf_config",
    "hf_tower",
    "hf_trace",
    "package_versions",
    "process",
    "process_pairs",
]


class Processed(NamedTuple):
    """Hold a processor's output for one image: (N, P) float32 rows in grid order, and the grid."""

    pixel_values: Tensor
    grid: Grid


def package_versions() -> dict[str, str]:
    found = {}
    for package in ("numpy", "pillow", "torch", "torchvision", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {name: number for name, number in decoder_versions().items() if number}


def check_transformers() -> None:
    require_transformers(
        "a comparison with Hugging Face",
        alternative=Wording(
            "pass a saved golden file to compare_with_golden",
            shell="pass a saved golden file with --golden",
        ),
    )


@contextmanager
def _importing() -> Iterator[None]:
    try:
        yield
    except (AttributeError, ImportError, RuntimeError) as error:
        found = " and ".join(
            f"{name} {number}"
            for name, number in package_versions().items()
            if name.startswith("t")
        )
        reason = str(error).strip().rpartition("\n")[2]
        raise ArgumentError(
            f"transformers cannot be imported ({reason}) with {found}",
            remedy=with_options(
                "install versions that belong together, or pass a saved golden file as {}",
                "golden",
            ),
        ) from error


def process(
    rgb: NDArray[np.uint8], config: ImageConfig, processor: Processor, *, name: str = ""
) -> Processed:
    """Run one of Hugging Face's processors on an RGB image (height, width, 3).

    "pillow" is the reference. "torchvision", transformers' default, resizes differently and needs
    torchvision. Raises ImageError, with `name`, for an image that the processor rejects.
    """
    check_transformers()
    settings: dict[str, Any] = {
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "patch_size": config.patch_px,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
    }
    if processor == "torchvision" and "torchvision" not in package_versions():
        raise ArgumentError(
            "the torchvision processor needs torchvision, which is not installed",
            remedy=with_options(
                "install the one that belongs to your torch, or pass {}", ("processor", "pillow")
            ),
        )
    with _importing():
        if processor == "pillow":
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
                Qwen2VLImageProcessorPil as ImageProcessor,
            )
        else:
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
                Qwen2VLImageProcessor as ImageProcessor,
            )
    try:
        done: Any = ImageProcessor(**settings)(
            images=[rgb],
            input_data_format="channels_last",  # a guess would be wrong for 1, 3 or 4 rows
            return_tensors="pt",
        )
    except ValueError as error:
        raise ImageError(
            f"Hugging Face's processor rejects the image ({error})",
            name=name,
            remedy="omit the image",
            code="reference",
        ) from None
    [grid] = done["image_grid_thw"].tolist()
    return Processed(done["pixel_values"].float(), Grid(*grid))


def process_pairs(frames: Sequence[NDArray[np.uint8]], config: ImageConfig, name: str) -> Processed:
    """Return a video's rows. Hugging Face's Pillow processor makes the rows of each frame.

    Hugging Face's video processor needs torchvision. Both processors put a frame's values at the
    same positions of a row, but the image processor repeats one image for both frames. Therefore
    each row joins the first frame of one result with the second frame of the next.
    """
    height, width = frames[0].shape[:2]
    exact = replace(config, min_pixels=height * width, max_pixels=height * width)
    done = [process(frame, exact, "pillow", name=name) for frame in frames]
    halves = [each.pixel_values.view(len(each.pixel_values), 3, 2, -1) for each in done]
    steps = [
        torch.stack([first[:, :, 0], second[:, :, 1]], dim=2).flatten(1)
        for first, second in zip(halves[::2], halves[1::2], strict=True)
    ]
    grid = done[0].grid
    return Processed(torch.cat(steps), Grid(len(steps), grid.h, grid.w))


def hf_config(config: Any) -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

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
    tensors: Mapping[str, Tensor],
    config: VisionConfig | Any,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> Any:
    """Build Hugging Face's tower from tensors by published name, without random weights.

    The function casts only the parameters to `dtype`, because a cast of the whole module would
    change the rotary frequencies, which stay in float32.
    """
    check_transformers()
    if "flash" in attention and dtype == torch.float32:
        raise ArgumentError(
            with_options(
                "{} does not support float32, the dtype of this run", ("attention", attention)
            ),
            remedy=with_options("pass {} on a GPU, or use sdpa or eager", ("dtype", "bfloat16")),
        )
    with _importing():
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )
    theirs = hf_config(config)
    theirs._attn_implementation = attention
    try:
        with torch.device("meta"):
            model: Any = Qwen2_5_VisionTransformerPretrainedModel(theirs)
    except (ImportError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            with_options(
                "transformers rejects {} here ({reason})", ("attention", attention), reason=reason
            ),
            remedy="use sdpa or eager",
        ) from None
    state = {name: tensors[name].to(device=device, dtype=dtype) for name in tensors}
    model.load_state_dict(state, strict=True, assign=True)
    # no checkpoint has the buffers, so create them again, off the meta device
    model.rotary_pos_emb = type(model.rotary_pos_emb)(theirs).to(device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hf_trace(model: Any, rows: Tensor, grids: Iterable[Any]) -> Trace:
    """Run Hugging Face's tower, and return its stages by name, in the orders of `Oracle.stages`."""
    first = next(model.parameters())
    trace: Trace = {}

    def keep(name: str, output: Any) -> None:
        trace[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    sizes = [(g.t, g.h, g.w) if hasattr(g, "t") else tuple(g) for g in grids]
    grid_thw = torch.tensor(sizes, device=first.device)
    with record_stages(model, keep), _ieee_float32(first.device):
        out = model(rows.to(first.device, first.dtype), grid_thw=grid_thw)
    trace["merger"] = out.pooler_output
    return trace


@contextmanager
def _ieee_float32(device: torch.device) -> Iterator[None]:
    """Disable TF32, which torch uses by default for the patch embedding's convolution."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
