"""What a checkpoint is, told without building the model."""

import math
import os
import tomllib
from typing import Any

from qwen_vit.checkpoint import config_hash, expected_tensors, load_checkpoint
from qwen_vit.hub import Source, packaged_weights
from qwen_vit.image import load_image
from qwen_vit.patches import patchify

__all__ = ["describe", "licence_of"]


def describe(source: Source, image: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Name, licence, architecture, parameters, stored types and hashes; and an image's tokens.

    >>> from qwen_vit.hub import find_checkpoint
    >>> describe(find_checkpoint("tiny"))["tensors"]
    66

    The values are those of a JSON document. Raises CheckpointError for a damaged checkpoint, and
    ImageError for an image that cannot be encoded.
    """
    checkpoint = load_checkpoint(source.folder)
    config, image_config = checkpoint.config, checkpoint.image_config
    expected = expected_tensors(config)
    facts: dict[str, Any] = {
        "model": source.name,
        "commit": source.commit,
        "licence": licence_of(source.name),
        "folder": str(source.folder),
        "files": ", ".join(path.name for path in checkpoint.files),
        "tensors": len(expected),
        "parameters": sum(math.prod(shape) for shape in expected.values()),
        "stored_dtype": ", ".join(checkpoint.dtypes),
        "weights_sha256": checkpoint.weights_sha256(),
        "config_sha256": config_hash(config, image_config),
        "vision_config": config.to_json(),
        "image_config": image_config.to_json(),
    }
    if image is not None:
        rgb = load_image(image)
        [grid] = patchify(rgb.pixels, image_config, name=rgb.name).grids
        facts["image"] = {
            "id": rgb.name,
            "size_px": f"{rgb.width} x {rgb.height}",
            "format": rgb.format,
            "notes": ", ".join(rgb.notes),
            "grid_thw": f"({grid.t}, {grid.h}, {grid.w})",
            "patches": grid.n_patches,
            "tokens": grid.n_tokens(config.merge_unit),
        }
    return facts


def licence_of(model: str) -> str:
    """The licence of a checkpoint that this package knows by name.

    >>> licence_of("Qwen/Qwen2.5-VL-7B-Instruct")
    'Apache-2.0'
    """
    if model == "tiny":
        return "Apache-2.0"
    with open(packaged_weights() / "published.toml", "rb") as file:
        table = tomllib.load(file)
    for entry in table.get("checkpoint", []):
        if entry["repo"] == model:
            return str(entry["licence"])
    return "unknown: see the model's own page"
