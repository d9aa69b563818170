"""`qwen-vit encode`: images to one feature file."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vit.cli.checks import check_output
from qwen_vit.cli.console import print_data, print_log
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    FILE,
    NAME,
    device_option,
    dtype_option,
    json_option,
    model_option,
    on_error_option,
    pixel_options,
    source_options,
)
from qwen_vit.errors import display_name

if TYPE_CHECKING:
    from qwen_vit.batching import OnError
    from qwen_vit.encoder import VisionEncoder
    from qwen_vit.features import FailedImage, ImageFeatures

__all__ = ["encode"]


@click.command()
@click.argument("images", nargs=-1, required=True, type=NAME)
@model_option
@click.option("--out", required=True, type=FILE, help="Feature file to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing feature file.")
@device_option()
@dtype_option
@pixel_options
@on_error_option
@json_option
@source_options
def encode(
    images: tuple[str, ...], model: str, out: Path, overwrite: bool, on_error: "OnError",
    as_json: bool, **loading: Any,
) -> None:  # fmt: skip
    """Encode IMAGES into one feature file.

    \b
    qwen-vit encode photos/*.jpg --model tiny --out features.safetensors
    qwen-vit encode a.png --model Qwen/Qwen2.5-VL-7B-Instruct --out a.safetensors

    The file holds image_embeds, image_grid_thw and image_token_offsets; read it with
    qwen_vit.load_features. An image that cannot be encoded is reported and skipped (exit code 1).
    The file is written whole, at the end: for many images use `qwen-vit export`, which keeps what
    is finished.
    """
    check_output(out, overwrite, images)
    with slow_imports():
        from qwen_vit import VisionEncoder, write_features
        from qwen_vit.cli.text import encoded_json, encoded_table
    encoder = VisionEncoder.from_pretrained(model, **loading)
    features, milliseconds = _encode_one_by_one(encoder, images, on_error)
    write_features(out, features, encoder.metadata(), overwrite=overwrite)
    if as_json:
        print_data(json.dumps(encoded_json(features, milliseconds, out, encoder), indent=2))
    else:
        print_data(encoded_table(features, milliseconds))
        print_data(f"wrote {display_name(str(out))} ({out.stat().st_size:,} bytes)")
    if any(feature.error is not None for feature in features):
        sys.exit(EXIT_SKIPPED)


def _encode_one_by_one(
    encoder: "VisionEncoder", images: Sequence[str], on_error: "OnError"
) -> "tuple[list[ImageFeatures | FailedImage], list[float]]":
    """Every image's features, and the milliseconds from opening the file to its embeddings."""
    from tqdm import tqdm

    from qwen_vit.common.tensors import all_finite
    from qwen_vit.features import FailedImage, ImageFeatures, not_finite

    results: list[ImageFeatures | FailedImage] = []
    milliseconds = []
    for image in tqdm(images, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()):
        start = time.perf_counter()
        result = encoder.encode(image, on_error=on_error)
        if isinstance(result, ImageFeatures) and not all_finite(result.embeds):
            error = not_finite(image)
            if on_error == "raise":
                raise error
            result = FailedImage(image, error, size_px=result.size_px)
        if isinstance(result, ImageFeatures):
            result = replace(result, embeds=result.embeds.cpu())  # the GPU's memory is for encoding
        else:
            print_log(f"skipped: {result.error}")
        milliseconds.append(1000 * (time.perf_counter() - start))
        results.append(result)
    return results, milliseconds
