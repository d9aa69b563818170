"""Our features of the cases' pictures and videos, with the small model's tower."""

from functools import cache
from pathlib import Path

import torch

from qwen_vit import ImageFeatures, VisionEncoder
from tools.checks.engines.cases import PICTURES, SECONDS_PER_GRID, Case, frames, grid, rows


@cache
def encoder(work: Path) -> VisionEncoder:
    """Our encoder, in float32 on the CPU."""
    return VisionEncoder.from_pretrained(work / "model", device="cpu", dtype="float32")


@cache
def features(work: Path, name: str) -> ImageFeatures:
    """Our features of a picture by `encode`, of a video by `encode_patches`."""
    ours = encoder(work)
    if name in PICTURES:
        [made] = ours.encode([frames(name)[0]])
        return ImageFeatures(name, made.embeds, made.grid_thw)
    image = ours.image_config
    values = rows([name], image.image_mean, image.image_std).float()
    embeds = ours.encode_patches(values, torch.tensor([grid(name)]))
    return ImageFeatures(name, embeds, grid(name))


def of_case(work: Path, each: Case) -> tuple[list[ImageFeatures], list[ImageFeatures], list[float]]:
    """A case's features: of its pictures, of its videos, and the videos' seconds."""
    pictures = [features(work, name) for name in each.pictures]
    videos = [features(work, name) for name in each.videos]
    return pictures, videos, len(videos) * [SECONDS_PER_GRID]
