"""Collect the origin that a feature file records, such as model, hashes and versions."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from PIL import features as pillow

from qwen_vit.checkpoint.hub import Origin
from qwen_vit.checkpoint.load import Checkpoint, config_hash
from qwen_vit.config import ImageConfig
from qwen_vit.features import dtype_name

__all__ = ["decoder_versions", "origin_metadata"]

PACKAGES = ("qwen-vit", "torch", "triton", "pillow", "pillow-heif")
DECODERS = {"libjpeg-turbo": "libjpeg_turbo", "libwebp": "webp"}  # our name -> Pillow's


def origin_metadata(
    origin: Origin,
    checkpoint: Checkpoint,
    image_config: ImageConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
) -> dict[str, Any]:
    """Return where features come from, as JSON values. None marks a fact that does not apply or is
    unknown."""
    return {
        "model": origin.name,
        "commit": origin.commit,
        "weights_sha256": checkpoint.weights_sha256(),
        "config_sha256": config_hash(checkpoint.config, image_config),
        "versions": {
            **{name: _version(name) for name in PACKAGES},
            **decoder_versions(),
        },
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": dtype_name(dtype),
        "quantization": quantization,
        "image_policy": {
            **image_config.to_json(),
            "resample": "Pillow bicubic on uint8",
            "orientation": "EXIF applied",
            "alpha": "composited on white",
        },
    }


def decoder_versions() -> dict[str, str | None]:
    """Return the versions of libjpeg-turbo and libwebp in Pillow, because pixels depend on them."""
    return {name: pillow.version(theirs) for name, theirs in DECODERS.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
