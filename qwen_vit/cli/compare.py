"""Compare our encoder with Hugging Face's encoder, stage by stage: `qwen-vit compare`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from qwen_vit.cli.checks import check_distinct, check_not_weights, check_output, check_paths
from qwen_vit.cli.console import command_again, is_verbose, print_data, print_log
from qwen_vit.cli.exit_codes import EXIT_ERROR, EXIT_SKIPPED
from qwen_vit.cli.images import warn_of_pixels
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    FILE,
    LOCAL_FOLDER,
    NAME,
    device_option,
    dtype_option,
    json_option,
    model_option,
    pixel_options,
    quantization_option,
    source_options,
    take_video_options,
    verbosity_options,
    video_options,
)
from qwen_vit.cli.sections import SectionedCommand
from qwen_vit.common.progress import shows_progress
from qwen_vit.compare.choices import ATTENTIONS, PROCESSORS
from qwen_vit.errors import display_name

__all__ = ["compare"]


@click.command(
    cls=SectionedCommand, short_help="Compare the encoder with Hugging Face's, stage by stage."
)
@click.argument("images", nargs=-1, type=NAME)
@model_option
@click.option("--golden", type=FILE, help="Compare with this golden file, without transformers.")
@click.option("--save-golden", type=FILE, help="Save Hugging Face's results in a golden file.")
@click.option("--report", type=LOCAL_FOLDER, help="Write a page with pictures into this folder.")
@click.option(
    "--overwrite", is_flag=True,
    help="Replace an existing golden file or report, or write a report into a folder with files.",
)  # fmt: skip
@click.option(
    "--attention", type=click.Choice(ATTENTIONS),
    help="Set Hugging Face's attention implementation.  [default: sdpa]",
)  # fmt: skip
@click.option(
    "--processor", type=click.Choice(PROCESSORS), default="pillow", show_default=True,
    help="Choose Hugging Face's processor for the pixels.",
)  # fmt: skip
@device_option()
@dtype_option
@quantization_option
@pixel_options
@video_options
@json_option
@source_options
@verbosity_options
def compare(
    images: tuple[str, ...], save_golden: Path | None, report: Path | None, overwrite: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Compare the encoder with Hugging Face's, and both with float64, on IMAGES or videos.

    \b
    qwen-vit compare photo.jpg --model tiny --report page
    qwen-vit compare clip.mp4 --model tiny --n-frames 4
    qwen-vit compare --model Qwen/Qwen2.5-VL-7B-Instruct --golden 7b.safetensors

    The exit code is 0 if pixels, sampled frames and stages agree. It is 1 if a stage exceeds its
    tolerance, if frames or the Pillow processor's pixels differ, or if the command skipped an
    image. It is 2 if the command skipped every image.

    Without --golden, transformers computes the reference. --save-golden writes this reference to a
    golden file. With --golden, the named file contains the reference, and you may omit IMAGES. -v
    lists every stage.

    transformers needs the extra `hf`, and --report needs `show`. In a checkout:
    pip install -e '.[hf,show]'.
    """
    video = take_video_options(options)["video"]
    if overwrite and save_golden is None and report is None:
        print_log("--overwrite has no effect without --save-golden or --report")
    if save_golden is not None:
        check_output(save_golden, overwrite, "--save-golden")
        check_not_weights(save_golden, options["model"], "--save-golden")
        check_distinct(images)
    with slow_imports():
        from qwen_vit.compare.report import check_report, write_report
        from qwen_vit.compare.run import compare_checkpoint
        from qwen_vit.compare.text import as_text
        from qwen_vit.images.image import ADDRESS, ImageLimits
        from qwen_vit.images.load import read_image_file
        from qwen_vit.inputs.listing import Item
        from qwen_vit.inputs.unused import UnusedOptions
    if report is not None:
        check_report(report, overwrite=overwrite)
    check_paths(images, must_exist=True)
    if images and all(os.path.isdir(each) or ADDRESS.match(each) for each in images):
        read_image_file(images[0], images[0], ImageLimits())  # raises the error
    if images or options["golden"] is not None:  # the stored pixels of videos need no sampling
        unused = UnusedOptions(video=video.changed)
        items = list(unused.watch(Item(path, path) for path in images))
        unused.warn()
        warn_of_pixels(items)
    comparison = compare_checkpoint(
        images, save_golden=save_golden, overwrite=overwrite, keep_maps=report is not None,
        video=video, show_progress=shows_progress(), **options,
    )  # fmt: skip
    for _, error in comparison.skipped:
        print_log(f"skipped: {error.text(in_shell=True)}")
    print_data(
        json.dumps(comparison.to_json(), indent=2)
        if as_json
        else as_text(comparison, has_stages=is_verbose())
    )
    print_written = print_log if as_json else print_data
    if save_golden is not None:
        print_written(f"wrote {display_name(str(save_golden))}")
    if report is not None and comparison.images:
        page = write_report(report, comparison, command=command_again())
        print_written(f"wrote {display_name(str(page))}")
    elif report is not None:
        print_log(f"wrote nothing to {display_name(str(report))}: no image was compared")
    if not comparison.images:
        sys.exit(EXIT_ERROR)
    if not comparison.passed:
        sys.exit(EXIT_SKIPPED)
