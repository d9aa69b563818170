"""`qwen-vit info`: what a checkpoint is."""

import json
from typing import Any

import click

from qwen_vit.cli.console import print_data
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    NAME,
    json_option,
    model_argument,
    source_options,
    verbosity_options,
)

__all__ = ["info"]


@click.command()
@model_argument
@click.option("--image", type=NAME, help="Also count this image's tokens.")
@click.option("--verify", is_flag=True, help="Hash every file again, and compare.")
@json_option
@source_options
@verbosity_options
def info(model: str, image: str | None, verify: bool, as_json: bool, **finding: Any) -> None:
    """Describe the checkpoint MODEL: architecture, licence, parameters, hashes, token counts.

    \b
    qwen-vit info tiny
    qwen-vit info Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg --json
    """
    with slow_imports():
        from qwen_vit.checkpoint.hub import find_checkpoint
        from qwen_vit.cli.describe import describe
        from qwen_vit.cli.text import facts_text
    facts = describe(find_checkpoint(model, **finding), image, verify=verify)
    print_data(json.dumps(facts, indent=2) if as_json else facts_text(facts))
