"""Draw features as pictures: `qwen-vit show`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qwen_vit.cli.checks import check_not_input, check_paths
from qwen_vit.cli.console import command_again, print_data, print_log, warn_of_ignored
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    FILE_OR_FOLDER,
    NAME,
    SOURCE_NAMES,
    complete_model,
    device_option,
    dtype_option,
    json_option,
    pixel_options,
    quantization_option,
    source_options,
    verbosity_options,
)
from qwen_vit.cli.sections import SectionedCommand
from qwen_vit.errors import ArgumentError, display_name, plural

__all__ = ["show"]

DEFAULT_OUT = "show.html"
OF_ENCODING = ("device", "dtype", "quantization", "min_pixels", "max_pixels", *SOURCE_NAMES)


class _Point(click.ParamType[tuple[float, float]]):
    name = "X,Y"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, float]:
        """Return a pixel's column and row."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)[,x](\d+(?:\.\d+)?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a pixel. Expected X,Y such as 120,80.", param, ctx)
        return float(match[1]), float(match[2])


@click.command(cls=SectionedCommand, short_help="Draw features as pictures or a page.")
@click.argument("inputs", nargs=-1, required=True, type=NAME)
@click.option("--model", shell_complete=complete_model, help="Encode images with this model.")
@click.option(
    "--out", type=FILE_OR_FOLDER, default=DEFAULT_OUT, show_default=True,
    help="Write a page (.html), a picture of one image (.png), or a folder with both.",
)  # fmt: skip
@click.option(
    "--overwrite", is_flag=True,
    help="Replace existing files of the same names, or write into a folder with files.",
)  # fmt: skip
@click.option(
    "--point",
    type=_Point(),
    help="Compare every cell with the cell at this pixel of the first image.",
)
@click.option(
    "--output", type=click.Choice(["patch", "merged"]), default="patch", show_default=True,
    help="Draw one cell per patch (14 x 14 pixels) or per merged token (28 x 28 pixels).",
)  # fmt: skip
@click.option(
    "--layer", type=click.IntRange(min=0),
    help="Draw the features after this block instead of the output. The first block is 0.",
)  # fmt: skip
@click.option(
    "--images", "pictures", multiple=True, type=NAME,
    help="Find the images of stored features in this folder, pattern or list.",
)  # fmt: skip
@click.option("--id", "ids", multiple=True, help="Draw only this image of stored features.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=24, show_default=True,
    help="Draw at most this many images, starting with the first. --id ignores this limit.",
)  # fmt: skip
@device_option()
@dtype_option
@quantization_option
@pixel_options
@json_option
@source_options
@verbosity_options
def show(
    *, inputs: tuple[str, ...], model: str | None, out: Path, overwrite: bool,
    point: tuple[float, float] | None, output: str, layer: int | None, pictures: tuple[str, ...],
    ids: tuple[str, ...], limit: int, as_json: bool, **loading: Any,
) -> None:  # fmt: skip
    """Draw attention windows, feature maps and, with --point, similarities.

    \b
    qwen-vit show photos/ --model tiny --out photos.html
    qwen-vit show cat.jpg dog.jpg --model Qwen/Qwen2.5-VL-7B-Instruct --point 120,80
    qwen-vit show features.safetensors --images photos/ --out pictures

    INPUTS are images and videos, one feature file, or one export folder. Images and videos may have
    any form that `qwen-vit encode` accepts, except Parquet files and https:// addresses. For a
    video, `show` draws the features of the first two sampled frames, without the frames themselves.
    The command skips and reports images that it cannot encode. It then exits with 1, or with 2 if
    it encodes no image.

    A feature map shows three principal components as colours. `show` fits the
    components to all images together, so the same colour means similar features.

    Drawing needs the extra `show`. In a checkout: pip install -e '.[show]'.
    """
    with slow_imports():
        from qwen_vit.cli.show_input import encode_images, read_stored
        from qwen_vit.cli.show_output import check_target, older_pictures, write
        from qwen_vit.feature_files.describe import holds_features
        from qwen_vit.inputs.find import check_inputs
        from qwen_vit.show.draw import check_packages
        from qwen_vit.show.views import view_features
    check_packages("qwen-vit show", "jinja2", "matplotlib")
    check_not_input(out, (*inputs, *pictures))
    check_paths(inputs, must_exist=True)
    if any(map(holds_features, inputs)):
        _check_stored(inputs, model)
    else:
        check_inputs(inputs)
        _check_images(model, has_stored_options=bool(pictures or ids))
    check_target(out, overwrite)
    required = _required_output(output, layer)
    if model is None:  # stored features, as checked above
        given = read_stored(inputs[0], ids, limit, pictures, output=required)
    else:
        given = encode_images(inputs, model, output, layer, limit, out, point=point, **loading)
    shown = len(given.features) + len(given.failed)
    if shown < given.total:
        print_log(
            f"showing the first {shown:,} of {plural(given.total, 'image')}; --limit shows more"
        )
    if not given.features:
        raise ArgumentError(
            "no image to show, because all images failed",
            remedy="fix the printed causes",
        )
    views = view_features(
        given.features, given.pictures, point=point, layer=layer, window=given.window,
        on_error="skip",
    )  # fmt: skip
    files, report = write(out, views, given, command_again(), layer)
    if as_json:
        print_data(json.dumps(report, indent=2))
    else:
        print_data("\n".join(f"wrote {display_name(str(file))}" for file in files))
    if older := older_pictures(out, files):
        print_log(
            f"{display_name(str(out))} still contains {plural(len(older), 'older picture')}, first "
            f"{older[0]}"
        )
    if given.failed:
        sys.exit(EXIT_SKIPPED)


def _required_output(output: str, layer: int | None) -> str | None:
    """Return the output that stored features must have, or None if the user passed none."""
    if layer is not None:
        warn_of_ignored(["output"], "--layer selects other features")
        return None
    source = click.get_current_context().get_parameter_source("output")
    return output if source is ParameterSource.COMMANDLINE else None


def _check_stored(inputs: tuple[str, ...], model: str | None) -> None:
    if len(inputs) > 1:
        raise ArgumentError(
            f"{len(inputs)} inputs, but stored features must be the only input",
            expected="one feature file or export folder",
            remedy="omit the other inputs",
        )  # fmt: skip
    if model is not None:
        raise ArgumentError(
            "--model works only for images",
            name=inputs[0],
            remedy="omit --model for stored features",
        )
    warn_of_ignored(OF_ENCODING, "stored features are already encoded")


def _check_images(model: str | None, *, has_stored_options: bool) -> None:
    if model is None:
        raise ArgumentError(
            "--model is missing",
            expected="--model for images, or one feature file or export folder",
            remedy="pass --model to encode images",
        )
    if has_stored_options:
        raise ArgumentError(
            "--images and --id work only for stored features",
            remedy="omit both options for images",
        )
