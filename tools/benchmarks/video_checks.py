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

MIN_COSINE = 0.99  # of a token, both towers in bf16 with random weights
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
        mine = [np.asarray(video.upright(each))[..., :3] for each in video.frames(chosen)]
    plain = []
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                picture: Any = frame.reformat(format="rgb24", threads=1)
                plain.append(picture.to_ndarray())
    equal = sum(np.array_equal(a, b) for a, b in zip(mine, plain, strict=True))
    if equal < len(chosen):
        raise click.ClickException(f"{equal} of {len(chosen)} frames are those of PyAV")
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
        click.echo(f"transformers' tower is left out: {error!r}", err=True)
        return None


def _grid_of(piece: Any) -> torch.Tensor:
    [grid] = piece.grids
    return torch.tensor([[grid.t, grid.h, grid.w]])


BARS = (
    ("transformers, processor and tower", "transformers_clips_per_s", "#8a93a0"),
    ("qwen_vit, from files to features", "whole_clips_per_s", "#1f6fc4"),
    ("the tower alone", "tower_clips_per_s", "#c3c9d1"),
    ("PyAV alone", "pyav_clips_per_s", "#c3c9d1"),
    ("torchcodec alone", "torchcodec_clips_per_s", "#c3c9d1"),
)


def draw(row: dict[str, Any], path: Path) -> None:
    """Draw a bar for each rate of a row."""
    from matplotlib.figure import Figure

    bars = [(title, row[key], colour) for title, key, colour in BARS if row.get(key)]
    figure = Figure(figsize=(7.2, 0.5 + 0.42 * len(bars)), dpi=150, layout="constrained")
    axes = figure.subplots()
    titles, rates, colours = zip(*bars[::-1], strict=True)
    axes.barh(titles, rates, color=colours, height=0.62)
    for place, rate in enumerate(rates):
        axes.annotate(f" {rate:.3g}", (rate, place), va="center", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"clips a second; {row['clips']} clips of {row['seconds']} s, {row['size']}, "
        f"{row['device']}, {row['cpu_cores']} cores",
        fontsize=8,
    )
    figure.savefig(path, metadata={"Software": None})
