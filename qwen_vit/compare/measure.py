"""Compare our pixels and stages of one image with Hugging Face's, and both towers with float64."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from qwen_vit.compare.golden import Case
from qwen_vit.compare.huggingface import Processed
from qwen_vit.compare.oracle import Oracle, Trace
from qwen_vit.compare.result import (
    FeatureMaps,
    ImageComparison,
    Preprocessing,
    SampledFrames,
    Stage,
    StepError,
    StepMaps,
)
from qwen_vit.compare.stages import layout_for, trace_tower
from qwen_vit.compare.tolerance import Difference, judge, relative_error
from qwen_vit.config import Grid, ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.images.patches import Patches
from qwen_vit.images.rows import pixels_for_tower
from qwen_vit.layout import Layout

__all__ = ["compare_case", "compare_pixels"]

MAX_STEPS_DRAWN = 8


def compare_case(
    encoder: VisionEncoder,
    case: Case,
    pixels: Sequence[Preprocessing],
    patches: Patches | None,
    processor: str,
    keep_maps: bool,
    *,
    frames: SampledFrames | None = None,
) -> ImageComparison:
    """Run our tower, and measure each stage when the oracle has computed it.

    `pixels` are the results of `compare_pixels`. `patches` are our own pixels, or None. Our tower
    receives our own pixels if they agree with the input of Hugging Face's tower. Otherwise it
    receives the same input as Hugging Face's tower.
    """
    rows = case.pixel_values.to(encoder.device)
    # our own pixels only if they agree with the input of Hugging Face's tower
    are_equal = any(part.processor == processor and part.passed for part in pixels)
    tower_input = patches.pixels if patches is not None and are_equal else rows
    layout = layout_for([case.grid], encoder.config, encoder.device, encoder.dtype)
    if tower_input.dtype == torch.uint8 and tower_input.shape[1] == encoder.config.patch_dim:
        moved = tower_input.to(encoder.device)  # a video's rows have two frames
        tower_input = pixels_for_tower(moved, encoder.config, encoder.image_config, still=False)
    ours = trace_tower(encoder.tower, tower_input, layout)
    theirs = {name: values.to(encoder.device) for name, values in case.trace.items()}
    oracle = Oracle(encoder.checkpoint.tensors, encoder.config, device=encoder.device)
    stages: list[Stage] = []
    steps: tuple[StepError, ...] = ()
    for name, truth in oracle.stages(rows, [case.grid]):
        difference = Difference.between(ours[name], theirs[name])
        our_error, their_error = (
            relative_error(ours[name], truth),
            relative_error(theirs[name], truth),
        )
        verdict = judge(
            encoder.dtype,
            distance=difference.relative,
            ours=our_error,
            theirs=their_error,
            recorded=None if case.errors is None else case.errors[name],
            quantization=encoder.quantization,
        )
        stages.append(Stage(name, difference, our_error, their_error, verdict))
        if name == "merger" and case.grid.t > 1:
            steps = _step_errors(ours[name], theirs[name], truth, case.grid.t)
    maps = _feature_maps(encoder, case, ours, theirs, layout) if keep_maps else None
    return ImageComparison(
        case.id, case.sha256, case.size_px, case.grid,
        "the pixel values of the processor" if tower_input is rows else "uint8 pixels",
        tuple(pixels), tuple(stages), maps, frames, steps,
    )  # fmt: skip


def _step_errors(ours: Tensor, theirs: Tensor, truth: Tensor, t: int) -> tuple[StepError, ...]:
    """Return the errors of each time step of a video, whose merged tokens are in time order."""
    parts = zip(ours.chunk(t), theirs.chunk(t), truth.chunk(t), strict=True)
    return tuple(
        StepError(relative_error(a, b), relative_error(a, c), relative_error(b, c))
        for a, b, c in parts
    )


def compare_pixels(
    processor: str, patches: Patches, theirs: Processed, config: ImageConfig
) -> Preprocessing:
    [grid] = patches.grids
    grid_thw = (theirs.grid.t, theirs.grid.h, theirs.grid.w)
    if grid != theirs.grid:
        return Preprocessing(
            processor, grid_thw, False, theirs.pixel_values.numel(), None, None, None
        )
    ours = patches.to_rows(config)
    std = torch.tensor(config.image_std).repeat_interleave(ours.shape[1] // 3)
    levels = ((ours - theirs.pixel_values).abs() * std * 255).round()
    return Preprocessing(
        processor,
        grid_thw,
        True,
        ours.numel(),
        int(levels.count_nonzero()),
        int(levels.max()),
        relative_error(ours, theirs.pixel_values),
    )


def _feature_maps(
    encoder: VisionEncoder, case: Case, ours: Trace, theirs: Trace, layout: Layout
) -> FeatureMaps:
    """Return up to four stages in raster order, and the image of the processor's pixels.

    For a video, return the stages of the first pair of frames, and the merged tokens of some pairs.
    """
    config, grid = encoder.config, case.grid
    h, w, merge = grid.h, grid.w, config.spatial_merge_size
    raster, index = layout.raster_order.long(), layout.grid_index.long()
    full = min(config.fullatt_block_indexes, default=0)
    drawn = dict.fromkeys(("patch_embed", f"block.{full}", f"block.{config.depth - 1}", "merger"))

    def merged(values: Tensor, step: int = 0) -> Tensor:
        return values.view(grid.t, h // merge, w // merge, -1)[step].cpu()

    def as_map(name: str, values: Tensor) -> Tensor:
        if name == "merger":
            return merged(values)
        ordered = (values[index] if name == "patch_embed" else values)[raster]
        return ordered[: h * w].view(h, w, -1).cpu()

    def picture(step: int) -> Tensor:
        return _picture(case.pixel_values[step * h * w : (step + 1) * h * w], case.grid, encoder)

    count = min(grid.t, MAX_STEPS_DRAWN)
    chosen = torch.linspace(0, grid.t - 1, count).round().long().tolist() if grid.t > 1 else []
    return FeatureMaps(
        picture(0),
        {name: (as_map(name, ours[name]), as_map(name, theirs[name])) for name in drawn},
        tuple(
            StepMaps(k, picture(k), merged(ours["merger"], k), merged(theirs["merger"], k))
            for k in chosen
        ),
    )


def _picture(rows: Tensor, grid: Grid, encoder: VisionEncoder) -> Tensor:
    """Return the image that the processor's rows of one time step show: the first frame."""
    config, image_config = encoder.config, encoder.image_config
    merge = config.spatial_merge_size
    mean, std = (torch.tensor(x) for x in (image_config.image_mean, image_config.image_std))
    picture = rearrange(
        rows,
        "(h w mh mw) (c frames ph pw) -> frames (h mh ph) (w mw pw) c",
        h=grid.h // merge, w=grid.w // merge, mh=merge, mw=merge, c=3,
        ph=config.patch_px, pw=config.patch_px,
    )[0]  # fmt: skip
    return ((picture * std + mean) * 255).round().clamp(0, 255).byte()
