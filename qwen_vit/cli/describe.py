"""Describe a checkpoint without building the model."""

import math
import os
from typing import Any

from qwen_vit.checkpoint import cache
from qwen_vit.checkpoint.hub import Download, Source
from qwen_vit.checkpoint.load import config_hash, load_checkpoint
from qwen_vit.checkpoint.published import published_checkpoints
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.errors import ArgumentError
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import patchify
from qwen_vit.inputs.suffixes import VIDEO_SUFFIXES, suffix_of

__all__ = ["describe", "describe_download", "licence_of"]

UNVERIFIED = "unverified"  # in published.toml: the value was not found anywhere
UNKNOWN_LICENCE = "unknown: see the model's own page"


def describe(
    source: Source,
    image: str | os.PathLike[str] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> dict[str, Any]:
    """Return a checkpoint's name, licence, architecture, sizes and hashes, and an image's tokens.

    `min_pixels` and `max_pixels` apply only to the image, as in `VisionEncoder.from_pretrained`.

    >>> from qwen_vit.checkpoint.hub import find_checkpoint
    >>> describe(find_checkpoint("tiny"))["tensors"]
    66
    """
    checkpoint = load_checkpoint(source.folder)
    config, image_config = checkpoint.config, checkpoint.image_config
    expected = expected_tensors(config)
    facts: dict[str, Any] = {
        "model": source.name,
        "commit": source.commit,
        "licence": _licence(source, cache.recorded_licence(source.folder)),
        "folder": str(source.folder),
        "files": [path.name for path in checkpoint.files],
        "tensors": len(expected),
        "parameters": sum(math.prod(shape) for shape in expected.values()),
        "stored_dtype": ", ".join(checkpoint.dtypes),
        "weights_sha256": checkpoint.weights_sha256(),
        "config_sha256": config_hash(config, image_config),
        "vision_config": config.to_json(),
        "image_config": image_config.to_json(),
    }
    if image is not None:
        if suffix_of(os.fspath(image)) in VIDEO_SUFFIXES:
            raise ArgumentError(
                "a video, and --image counts the tokens of an image",
                name=os.fspath(image),
                remedy="run `qwen-vit export --dry-run` for the tokens of a video",
            )
        bounded = image_config.bounded(min_pixels, max_pixels)
        rgb = load_image(image)
        [grid] = patchify(rgb.picture, bounded, name=rgb.name).grids
        facts["image"] = {
            "id": rgb.name,
            "size_px": [rgb.height, rgb.width],
            "format": rgb.format,
            "notes": list(rgb.notes),
            "grid_thw": [grid.t, grid.h, grid.w],
            "patches": grid.n_patches,
            "tokens": grid.n_tokens(config.merge_unit),
        }
    return facts


def describe_download(done: Download) -> dict[str, Any]:
    """Return a JSON document that describes a download.

    >>> from qwen_vit.checkpoint.hub import download
    >>> describe_download(download("tiny"))["fetched_bytes"]
    0
    """
    return {
        "model": done.source.name,
        "commit": done.source.commit,
        "licence": _licence(
            done.source, done.licence or cache.recorded_licence(done.source.folder)
        ),
        "folder": str(done.source.folder),
        "fetched_bytes": done.fetched_bytes,
        "kept_bytes": done.kept_bytes,
        "saved_bytes": done.saved_bytes,
    }


def _licence(source: Source, on_card: str | None) -> str:
    known = licence_of(source.name)
    return on_card if on_card is not None and known == UNKNOWN_LICENCE else known


def licence_of(model: str) -> str:
    """Return the licence of a checkpoint that this package lists by name, or UNKNOWN_LICENCE.

    >>> licence_of("Qwen/Qwen2.5-VL-7B-Instruct")
    'Apache-2.0'
    """
    if model == "tiny":
        return "Apache-2.0"
    licence = str(published_checkpoints().get(model, {}).get("licence", UNVERIFIED))
    return licence if licence != UNVERIFIED else UNKNOWN_LICENCE
