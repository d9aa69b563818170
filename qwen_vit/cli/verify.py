"""Check a checkpoint, a feature file or an export folder: `qwen-vit verify`."""

import json
import sys
from typing import Any

import click

from qwen_vit.cli.checks import check_model_or_features
from qwen_vit.cli.console import print_data, warn_of_ignored
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    SOURCE_NAMES,
    json_option,
    model_or_features_argument,
    source_options,
    verbosity_options,
)
from qwen_vit.cli.sections import SectionedCommand

__all__ = ["verify"]


@click.command(cls=SectionedCommand, short_help="Check that a checkpoint or features are whole.")
@model_or_features_argument
@json_option
@source_options
@verbosity_options
def verify(model: str, as_json: bool, **finding: Any) -> None:
    """Check a checkpoint, a feature file or an export folder. Exit with 1 if a check fails.

    \b
    qwen-vit verify Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit verify features/ --json

    For a checkpoint, the command hashes every file with a recorded hash, and compares the hashes.
    For a folder without hashes, it reads the weights and searches for NaN and infinity. For
    features, it reads every row, and checks the number of rows, finite values and the recorded
    digests. An export must have all its shards. If only shards are missing, the command prints "not
    complete" and the number of remaining images.
    """
    with slow_imports():
        from qwen_vit.checkpoint.hub import find_checkpoint
        from qwen_vit.cli.verification import verify_checkpoint, verify_stored
        from qwen_vit.feature_files.describe import holds_features
    if holds_features(model):
        warn_of_ignored(SOURCE_NAMES, "features need no checkpoint")
        found = verify_stored(model)
    else:
        check_model_or_features(model, finding["subfolder"])
        found = verify_checkpoint(find_checkpoint(model, **finding))
    document = {"path": model, **found.to_json()}
    print_data(json.dumps(document, indent=2) if as_json else found.text())
    if found.problems:
        sys.exit(EXIT_SKIPPED)
