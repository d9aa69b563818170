"""Format a comparison as text tables."""

import math
from collections.abc import Sequence
from typing import Any

from qwen_vit.compare.result import (
    Comparison,
    ImageComparison,
    Preprocessing,
    SampledFrames,
)
from qwen_vit.errors import display_name, plural

__all__ = [
    "as_text",
    "closer_line",
    "computed_in",
    "frame_lines",
    "reference_line",
    "verdict_lines",
]

STAGE_HEAD = (
    "stage", "ours - HF", "largest", "worst cos", "mean cos", "ours - f64", "HF - f64", "ratio",
    "measured", "allowed", "",
)  # fmt: skip
STEP_HEAD = ("merged tokens", "at", "ours - HF", "ours - f64", "HF - f64")
IMAGE_HEAD = ("image", "verdict", "ours - HF", "ours - f64", "HF - f64", "ratio", "size", "grid")
RATIO = "ratio"
PIXEL_HEAD = ("processor", "grid (t, h, w)", "different levels", "largest", "")


def as_text(comparison: Comparison, *, has_stages: bool = False) -> str:
    """Return the verdict and a table of images or, with `has_stages`, tables of each image."""
    facts, closer = comparison.facts, closer_line(comparison)
    lines = [
        *verdict_lines(comparison),
        *([closer] if closer else []),
        "",
        f"model      {facts['model']}, weights {facts['weights_sha256'][:16]}, "
        + computed_in(facts),
        f"reference  {reference_line(facts)}",
        "columns    a - b: |a - b| / |b|; f64: the same model in float64"
        + "; ratio: of ours - f64 to HF - f64, below 1 ours is closer"
        * comparison.has_same_weights,
    ]
    if comparison.images and not has_stages:
        rows = [IMAGE_HEAD, *map(_image_row, comparison.images)]
        lines += ["", "merged tokens; -v shows every stage"]
        lines += _table(_with_ratios(rows, comparison))
    for image in comparison.images if has_stages else ():
        lines += ["", *_image_lines(image, comparison)]
    return "\n".join(lines)


def computed_in(facts: dict[str, Any]) -> str:
    quantization = facts["quantization"]
    mlp = f", the MLP in {quantization}," if quantization else ""
    return f"{facts['dtype']}{mlp} on {facts['device']}"


def reference_line(facts: dict[str, Any]) -> str:
    reference, golden = facts["reference"], facts["golden"]
    versions = ", ".join(f"{name} {number}" for name, number in reference["versions"].items())
    where = f"golden {golden['path']}, made" if golden else "Hugging Face, run"
    return (
        f"{where} on {reference['device']} with {reference['attention']} attention, the "
        f"{reference['processor']} processor, {versions}"
    )


def closer_line(comparison: Comparison) -> str:
    """Return which tower is closer to float64, by its errors at all stages.

    The text is empty without images, if an error ratio of merged tokens is not finite, or if the
    weights differ from those of the golden file.
    """
    if not comparison.has_same_weights:
        return ""
    stages = [stage for image in comparison.images for stage in image.stages]
    ours, theirs = (
        sum(stage.ours < stage.theirs for stage in stages),
        sum(stage.theirs < stage.ours for stage in stages),
    )
    ratios = sorted(image.stages[-1].ratio for image in comparison.images)
    if not ratios or not all(map(math.isfinite, ratios)):
        return ""
    who = "both equally" if ours == theirs else "ours" if ours > theirs else "Hugging Face"
    least, most = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
    return (
        f"closer to float64: {who}, at {max(ours, theirs)} of {plural(len(stages), 'stage')}; "
        f"in the merged tokens our error is {least if least == most else f'{least} to {most}'} "
        "times Hugging Face's"
    )


def verdict_lines(comparison: Comparison) -> list[str]:
    lines = []
    golden = comparison.facts["golden"]
    if golden and golden["weights_sha256"] != comparison.facts["weights_sha256"]:
        changed = golden["changed_weights"]
        lines.append(
            f"weights differ from the golden's ({comparison.facts['weights_sha256'][:16]} here, "
            f"{golden['weights_sha256'][:16]} in the golden): {plural(len(changed), 'tensor')}, "
            f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
        )
    for image in comparison.images:
        if image.problems:
            lines.append(
                f"differs: {display_name(image.id)}: first at {image.problems[0]}{_others(image)}"
            )
    agreeing = [image for image in comparison.images if not image.problems]
    if agreeing:
        stages = [(stage, image) for image in agreeing for stage in image.stages]
        worst, image = max(stages, key=lambda s: s[0].verdict.excess)
        is_fp32 = comparison.facts["dtype"] == "float32"
        n_videos = sum(bool(each.steps or each.frames) for each in comparison.images)
        n_images = len(comparison.images) - n_videos
        counts = [plural(n_images, "image")] * bool(n_images) + [plural(n_videos, "video")] * bool(
            n_videos
        )
        n_skipped = len(comparison.skipped)
        skipped = f" ({n_skipped:,} skipped)" if n_skipped else ""
        unit = " relative" if is_fp32 else " times Hugging Face's error"
        lines.append(
            f"agrees: {len(agreeing)} of {' and '.join(counts)}{skipped}, "
            f"{plural(len(stages), 'stage')}; the worst is {worst.verdict.measured:.2g}{unit}, "
            f"allowed {worst.verdict.allowed:.2g} ({worst.name} of {display_name(image.id)})"
        )
    if not comparison.images:
        lines.append("nothing was compared: every image was skipped")
    return lines


def _others(image: ImageComparison) -> str:
    if len(image.problems) == 1:
        return ""
    worst = max(image.stages, key=lambda stage: stage.verdict.excess)
    most = f"; the worst is {worst.name}, at {worst.verdict.excess:.3g} times its tolerance"
    return f" (and {len(image.problems) - 1} more{most if worst.verdict.excess > 1 else ''})"


def _image_row(image: ImageComparison) -> tuple[str, ...]:
    (height, width), last, grid = image.size_px, image.stages[-1], image.grid
    return (
        display_name(image.id), "differs" if image.problems else "agrees",
        f"{last.difference.relative:.2e}", f"{last.ours:.2e}", f"{last.theirs:.2e}",
        f"{last.ratio:.3f}", f"{width} x {height}", f"({grid.t}, {grid.h}, {grid.w})",
    )  # fmt: skip


def _with_ratios(rows: Sequence[Sequence[str]], comparison: Comparison) -> list[Sequence[str]]:
    if comparison.has_same_weights:
        return [*rows]
    place = rows[0].index(RATIO)
    return [[*row[:place], *row[place + 1 :]] for row in rows]


def _image_lines(image: ImageComparison, comparison: Comparison) -> list[str]:
    height, width = image.size_px
    title = (
        f"{display_name(image.id)}  {width} x {height}, grid ({image.grid.t}, {image.grid.h}, "
        f"{image.grid.w}), our tower takes {image.tower_input}"
    )
    frames = [] if image.frames is None else frame_lines(image.frames)
    pixels = [_pixel_row(part) for part in image.preprocessing]
    stages = [
        (
            stage.name,
            f"{stage.difference.relative:.2e}",
            f"{stage.difference.largest:.2e}",
            f"{stage.difference.worst_cosine:.7f}",
            f"{stage.difference.mean_cosine:.7f}",
            f"{stage.ours:.2e}",
            f"{stage.theirs:.2e}",
            f"{stage.ratio:.3f}",
            f"{stage.verdict.measured:.3g}",
            f"{stage.verdict.allowed:.3g}",
            "" if stage.verdict.passed else "<- " + stage.verdict.problem,
        )
        for stage in image.stages
    ]
    tables = [_table([PIXEL_HEAD, *pixels])] if pixels else []
    tables.append(_table(_with_ratios([STAGE_HEAD, *stages], comparison)))
    if image.steps:
        tables.append(_table([STEP_HEAD, *_step_rows(image)]))
    return [title, *frames, *(line for part in tables for line in part)]


def frame_lines(frames: SampledFrames) -> list[str]:
    """Return a line on the sampled frames, and a line on each reference's differences.

    >>> from qwen_vit.compare.result import FrameChoice
    >>> chosen = FrameChoice("qwen-vl-utils 0.0.14", True, True, (0, 20, 39, 59), 0)
    >>> frame_lines(SampledFrames("qwen", 60, 30.0, (0, 20, 39, 59), (0.0,), (chosen,)))
    ['4 of 60 frames, at 30 a second; sampling "qwen"', 'qwen-vl-utils 0.0.14: the same frames']
    """
    count = len(frames.indices)
    lines = [
        f"{count} of {plural(frames.n_frames, 'frame')}, at {frames.rate:.6g} a second; "
        f'sampling "{frames.sampling}"'
    ]
    for each in frames.references:
        if each.indices is None:
            lines.append(f"{each.reference}: takes no frames with these options")
            continue
        words = "the same frames" if each.passed else f"{each.differ} frames differ"
        how = "" if each.is_run else " (its rule; not installed or without torchvision)"
        lines.append(f"{each.reference}{how}: {words}")
    return lines


def _step_rows(image: ImageComparison) -> list[tuple[str, ...]]:
    moments = image.frames.seconds[::2] if image.frames else ()
    return [
        (
            f"step {step}",
            f"{moments[step]:.3f} s" if step < len(moments) else "-",
            f"{each.difference:.2e}", f"{each.ours:.2e}", f"{each.theirs:.2e}",
        )
        for step, each in enumerate(image.steps)
    ]  # fmt: skip


def _pixel_row(part: Preprocessing) -> tuple[str, ...]:
    verdict = ("agrees" if part.passed else "differs") if part.is_judged else "not judged"
    if not part.same_grid:
        return part.processor, str(part.grid_thw), "-", "-", verdict + ": different grid"
    differing = f"{part.values_differ:,} of {part.values:,}"
    return part.processor, str(part.grid_thw), differing, f"{part.largest_levels} of 255", verdict


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        name, *values = row
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        if row[-1]:  # align a remark left
            cells[-1] = row[-1]
        lines.append("  " + "  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines
