"""Fetch a checkpoint's vision tower: `qwen-vit download`."""

import json
from typing import Any

import click

from qwen_vit.cli.console import print_data, warn_of_ignored
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import json_option, model_argument, source_options, verbosity_options
from qwen_vit.cli.sections import SectionedCommand

__all__ = ["download"]


@click.command(cls=SectionedCommand, short_help="Fetch a checkpoint's vision tower.")
@model_argument
@click.option("--full", is_flag=True, help="Download whole shards and check the Hub's sha256.")
@json_option
@source_options
@verbosity_options
def download(model: str, full: bool, as_json: bool, **finding: Any) -> None:
    """Download MODEL's vision tower and configs once, for later use without a network.

    \b
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct --revision main --json

    By default, the command downloads only the vision tensors of the weights to the Hub's cache.
    With --full, or if a server rejects byte ranges, it downloads whole shards. In the output,
    saved_bytes counts the bytes of the weights that stay on the Hub.
    """
    with slow_imports():
        from qwen_vit.checkpoint.hub import download as fetch
        from qwen_vit.checkpoint.load import find_tower
        from qwen_vit.cli.describe import describe_download
        from qwen_vit.cli.text import facts_text
    fetched = fetch(model, full=full, **finding)
    find_tower(fetched.source.folder)  # a local folder may have no tower
    if fetched.kept_bytes is None:
        warn_of_ignored(["full"], "MODEL is no repository on the Hub")
    facts = describe_download(fetched)
    print_data(json.dumps(facts, indent=2) if as_json else facts_text(facts))
