"""Describe a checkpoint, a feature file or an export folder: `qwen-vit info`."""

import json
import os
import sys
from typing import Any

import click

from qwen_vit.cli.checks import check_model_or_features
from qwen_vit.cli.console import print_data, warn_of_ignored
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    NAME,
    SOURCE_NAMES,
    json_option,
    model_or_features_argument,
    pixel_options,
    source_options,
    verbosity_options,
)
from qwen_vit.cli.sections import SectionedCommand
from qwen_vit.errors import ArgumentError

__all__ = ["info"]

PIXEL_NAMES = ("min_pixels", "max_pixels")


@click.command(cls=SectionedCommand)
@model_or_features_argument
@click.option("--image", type=NAME, help="Count this image's tokens.")
@click.option("--verify", is_flag=True, help="Run the checks of `qwen-vit verify`.")
@pixel_options
@json_option
@source_options
@verbosity_options
def info(
    *, model: str, image: str | None, verify: bool, min_pixels: int | None, max_pixels: int | None,
    as_json: bool, **finding: Any,
) -> None:  # fmt: skip
    """Describe a checkpoint, a feature file or an export folder.

    \b
    qwen-vit info tiny
    qwen-vit info Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg --json
    qwen-vit info tiny --image photo.jpg --max-pixels 50176
    qwen-vit info features.safetensors

    For a checkpoint, the command prints the architecture, licence, parameter count and hashes. For
    features, it prints the number of images and rows, the width and dtype of a row, and the model.
    """
    with slow_imports():
        from qwen_vit.checkpoint.hub import find_checkpoint
        from qwen_vit.cli.describe import describe
        from qwen_vit.cli.text import facts_text, features_text
        from qwen_vit.cli.verification import verify_checkpoint, verify_stored
        from qwen_vit.feature_files.describe import describe_features, holds_features
    if image is not None and os.path.isdir(image):
        raise ArgumentError("--image names a folder", name=image, remedy="pass one of its files")
    is_stored = holds_features(model)
    if not is_stored:
        check_model_or_features(model, finding["subfolder"])
    else:
        warn_of_ignored(SOURCE_NAMES, "features need no checkpoint")
    if image is None:
        warn_of_ignored(PIXEL_NAMES, "without --image, there is no image to resize")
    if is_stored and image is not None:
        raise ArgumentError(
            "--image works only for checkpoints", name=model, remedy="omit --image for features"
        )
    source = None if is_stored else find_checkpoint(model, **finding)
    found = None
    if verify:
        found = verify_stored(model) if source is None else verify_checkpoint(source)
    facts: dict[str, Any] = {}
    lines = []
    if found is None or not found.is_damaged:  # a damaged file cannot be described
        facts = (
            describe_features(model)
            if source is None
            else describe(source, image, min_pixels, max_pixels)
        )
        lines.append(features_text(facts) if source is None else facts_text(facts))
    if found is not None:
        facts |= found.to_json()
        lines.append(found.text())
    print_data(json.dumps(facts, indent=2) if as_json else "\n".join(lines))
    if found is not None and found.problems:
        sys.exit(EXIT_SKIPPED)
