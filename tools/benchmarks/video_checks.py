"""Check, report and draw the video benchmark."""

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from qwen_vit.batching import TOKEN_BUDGET
from qwen_vit.encoder import VisionEncoder
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits
from qwen_vit.video.reader import open_video
from tools.benchmarks.tower_report import DPI, WIDTH_IN

MIN_COSINE = 0.99  # per token, between two bf16 towers with random weights
FRAMES_CHECKED = 8


class Figures:
    """Collect the results. Print each result with the time, and write all results to a file."""

    def __init__(self, partial: Path | None) -> None:
        self.found: dict[str, Any] = {}
        self._partial, self._begin = partial, time.perf_counter()

    def add(self, **figures: Any) -> None:
        """Add results."""
        self.found.update(figures)
        for key, value in figures.items():
            spent = time.perf_counter() - self._begin
            click.echo(f"{spent:7.1f} s  {key:28} {value}", err=True)
        if self._partial is not None:
            self._partial.write_text(json.dumps(self.found) + "\n")


def check_clip(encoder: VisionEncoder, path: Path, indices: list[int]) -> dict[str, Any]:
    """Compare the reader's frames with PyAV's plain frames, and a clip in pieces with the whole
    clip. Raises ClickException for a difference.
    """
    import av

    chosen = indices[:: max(1, len(indices) // FRAMES_CHECKED)]
    with open_video(str(path), str(path), VideoLimits()) as video:
        ours = [np.asarray(video.upright(each))[..., :3] for each in video.frames(chosen)]
    plain = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                picture: Any = frame.reformat(format="rgb24", threads=1)
                plain.append(picture.to_ndarray())
    equal = sum(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))
    if equal < len(chosen):
        raise click.ClickException(f"only {equal} of {len(chosen)} frames equal PyAV's")
    clip: Any = next(iter(encoder.encode_iter([Video(str(path))])))
    rows = load_video(Video(str(path)), encoder.image_config).patches
    budget = TOKEN_BUDGET[encoder.device.type]
    parts = [
        encoder.encode_patches(piece.to_rows(encoder.image_config), _grid_of(piece))
        for piece in rows.split_steps(budget)
    ]
    same = torch.equal(torch.cat(parts), clip.embeds)
    if encoder.device.type == "cuda" and not same:
        raise click.ClickException("a clip in pieces has other bits than its rows")
    return {
        "frames_equal_to_pyav": f"{equal} of {len(chosen)}",
        "clip_has_the_bits_of_its_rows": same,
        "grid_thw": clip.grid_thw,
    }


def check_features(encoder: VisionEncoder, hf: Any, path: Path) -> dict[str, Any]:
    """Compare the first piece of a clip in both towers. Raises ClickException if the directions
    differ."""
    rows = load_video(Video(str(path)), encoder.image_config).patches
    piece = rows.split_steps(TOKEN_BUDGET[encoder.device.type] // 4)[0]
    values, grid = piece.to_rows(encoder.image_config).to(encoder.device), _grid_of(piece)
    ours = encoder.encode_patches(values, grid).float()
    with torch.no_grad():
        theirs = hf(values.to(encoder.dtype), grid_thw=grid.to(encoder.device)).pooler_output
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs.float(), dim=1).min())
    if cosine < MIN_COSINE:
        raise click.ClickException(f"the worst cosine of a token with transformers is {cosine}")
    return {"worst_cosine_with_transformers": round(cosine, 6)}


def hf_tower_like(encoder: VisionEncoder) -> Any:
    """Return transformers' tower with the encoder's weights, or None without transformers."""
    try:
        from qwen_vit.compare.huggingface import hf_tower

        return hf_tower(encoder.checkpoint.tensors, encoder.config, encoder.dtype, encoder.device)
    except Exception as error:  # noqa: BLE001 - versions of it differ; the other figures stand
        click.echo(f"transformers' tower is skipped: {error!r}", err=True)
        return None


def _grid_of(piece: Any) -> torch.Tensor:
    [grid] = piece.grids
    return torch.tensor([[grid.t, grid.h, grid.w]])


BARS = (
    ("files to features", "whole_clips_per_s"),
    ("the tower alone", "tower_clips_per_s"),
    ("PyAV alone", "pyav_clips_per_s"),
    ("torchcodec alone", "torchcodec_clips_per_s"),
    ("transformers, files to features", "transformers_clips_per_s"),
)


def draw(row: dict[str, Any], path: Path) -> None:
    """Draw a bar for each rate of a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = ["#2563eb", *["#cbd5e1"] * (len(BARS) - 1)]
    bars = axes.barh([name for name, _ in BARS], [row[key] for _, key in BARS], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_title(
        f"Clips per second: {row['clips']} clips of {row['seconds']} s, {row['size']} px",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_visible(False)  # each bar shows its value
    axes.tick_params(labelsize=9, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(
        f"{row['device']}, {row['cpu_cores']} cores, {row['commit']}, {row['date']}",
        fontsize=9, color="#64748b", x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
