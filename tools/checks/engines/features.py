"""Compute our features of the cases' images and videos with the small model's tower."""

from functools import cache
from pathlib import Path

import torch

from qwen_vit import ImageFeatures, VisionEncoder
from tools.checks.engines.cases import PICTURES, SECONDS_PER_GRID, Case, frames, grid, rows


@cache
def encoder(work: Path) -> VisionEncoder:
    """Return our encoder, in float32 on the CPU."""
    return VisionEncoder.from_pretrained(work / "model", device="cpu", dtype="float32")


@cache
def features(work: Path, name: str) -> ImageFeatures:
    """Compute our features of an image with `encode`, or of a video with `encode_patches`."""
    ours = encoder(work)
    if name in PICTURES:
        [made] = ours.encode([frames(name)[0]])
        return ImageFeatures(name, made.embeds, made.grid_thw)
    image = ours.image_config
    values = rows([name], image.image_mean, image.image_std).float()
    embeds = ours.encode_patches(values, torch.tensor([grid(name)]))
    return ImageFeatures(name, embeds, grid(name))


def of_case(work: Path, each: Case) -> tuple[list[ImageFeatures], list[ImageFeatures], list[float]]:
    """Return the features of a case's images and videos, and the videos' seconds."""
    pictures = [features(work, name) for name in each.pictures]
    videos = [features(work, name) for name in each.videos]
    return pictures, videos, len(videos) * [SECONDS_PER_GRID]
