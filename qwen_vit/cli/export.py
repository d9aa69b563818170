"""Export many images to a folder of feature files: `qwen-vit export`."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen_vit.cli.checks import check_paths
from qwen_vit.cli.console import is_quiet, is_verbose, print_data, print_log
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    FOLDER,
    LOCAL_FOLDER,
    NAME,
    Dtype,
    allow_failed_option,
    allow_urls_option,
    as_video_option,
    column_options,
    device_option,
    exif_option,
    format_options,
    json_option,
    model_name_option,
    on_error_option,
    output_options,
    pixel_options,
    quantization_option,
    source_options,
    take_video_options,
    verbosity_options,
    video_options,
)
from qwen_vit.cli.sections import SectionedCommand
from qwen_vit.common.progress import shows_progress
from qwen_vit.errors import ExportError, QwenVitError, Wording, display_name, plural, with_options

if TYPE_CHECKING:
    from qwen_vit.common.store_path import AnyPath
    from qwen_vit.export.estimate import Estimate
    from qwen_vit.export.options import ExportOptions
    from qwen_vit.export.result import ExportReport

__all__ = ["export"]

ASK_ABOVE_BYTES = 100 * 10**9
# options of an export's start, which --resume does not accept again
OF_START = (
    "model", "out", "revision", "device", "dtype", "output", "normalize", "layers", "shard_size",
    "min_pixels", "max_pixels", "exif", "column", "id_column", "formats", "pages", "allow_urls",
    "subfolder", "as_video", "quantization",
    "fps", "n_frames", "start", "end", "max_frames", "max_frame_pixels", "min_frame_pixels",
    "sampling",
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Encode many images into a folder, or resume.")
@click.argument("inputs", nargs=-1, type=NAME)
@model_name_option
@click.option(
    "--out",
    type=FOLDER,
    help="Write or resume this folder, or this s3://, gs:// or az:// address.",
)
@click.option(
    "--resume", type=FOLDER, metavar="OUT",
    help="Resume this export with its recorded inputs, model and options.",
)  # fmt: skip
@click.option("--extend", is_flag=True, help="Add new and changed images.")
@click.option("--retry-failed", is_flag=True, help="Encode failed images again.")
@click.option(
    "--accept-versions", is_flag=True,
    help="Resume with different package versions or on a different GPU model. Each shard records "
    "its package versions and its GPU model.",
)  # fmt: skip
@column_options
@format_options
@allow_urls_option
@output_options
@click.option(
    "--dtype", type=Dtype(["float32", "bfloat16"]),
    help="Store features in this dtype. A GPU also computes in this dtype.  [default: as computed]",
)  # fmt: skip
@quantization_option
@device_option()
@pixel_options
@exif_option
@video_options
@as_video_option
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
    help="Set the number of images per shard.",
)  # fmt: skip
@click.option(
    "--part", default="1/1", metavar="I/N", callback=lambda _, __, text: _part(text),
    help="Export only shards I, I+N, I+2N and so on, counted from 1. The N parts share one folder.",
)  # fmt: skip
@click.option(
    "--shard-seconds", type=click.FloatRange(min=0, min_open=True), metavar="S",
    help="Save an unfinished shard every S seconds.  [default: only at an interrupt]",
)  # fmt: skip
@on_error_option
@allow_failed_option
@click.option(
    "--max-failures", type=click.IntRange(min=0), default=200, show_default=True,
    help="Stop after this many consecutive failures. 0 never stops.",
)  # fmt: skip
@click.option(
    "--decode-threads", type=click.IntRange(1, 1_000),
    help="Set the number of threads that read and decode.  [default: half the cores, 2 to 16]",
)  # fmt: skip
@click.option(
    "--ray", "address", is_flag=False, flag_value="", metavar="[ADDRESS]",
    help="Run on every GPU of a Ray cluster, or on its CPUs if it has no GPU. Without ADDRESS, use "
    "RAY_ADDRESS or this machine.",
)  # fmt: skip
@click.option(
    "--ec-cache", type=LOCAL_FOLDER, metavar="DIR",
    help="Also write vLLM's encoder cache to DIR. The cache takes about as many bytes as the "
    "export.",
)  # fmt: skip
@click.option(
    "--profile",
    is_flag=True,
    help="Print the share of the time for which the export waited for each stage.",
)
@click.option("--dry-run", is_flag=True, help="Estimate rows, bytes and hours. Write nothing.")
@click.option(
    "--yes", is_flag=True,
    help="Do not ask before writing more than 100 GB, or more than the disk has free.",
)  # fmt: skip
@json_option
@source_options
@verbosity_options
def export(
    *, inputs: tuple[str, ...], model: str | None, out: "AnyPath | None", resume: "AnyPath | None",
    extend: bool, retry_failed: bool, accept_versions: bool, dry_run: bool, yes: bool,
    as_json: bool, output: Any, normalize: bool, layers: tuple[int, ...], dtype: Any,
    shard_size: int, part: tuple[int, int], on_error: Any, max_failures: int,
    allow_failed: int, shard_seconds: float | None, decode_threads: int | None,
    address: str | None, ec_cache: Path | None, profile: bool, column: str | None,
    id_column: str | None, formats: tuple[str, ...], pages: Any, exif: Any,
    allow_urls: tuple[str, ...], **loading: Any,
) -> None:  # fmt: skip
    """Export the images and videos of INPUTS into a folder of shards.

    Run the command again to resume.

    \b
    qwen-vit export photos/ --model tiny --out features --dry-run
    qwen-vit export tars/ --model Qwen/Qwen2.5-VL-7B-Instruct --out features --part 2/8
    qwen-vit export tars/ --model Qwen/Qwen2.5-VL-7B-Instruct --out features --ray
    qwen-vit export photos/ --model tiny --out vectors --output mean --normalize
    qwen-vit export photos/ --model tiny --out dense --output mean --layers 1,3
    qwen-vit export --resume features
    qwen-vit export --resume features --extend --retry-failed
    qwen-vit export 'data/*.parquet' --column image --model tiny --out features

    INPUTS are images, videos, folders, quoted patterns, tars and lists. The command searches
    folders recursively. A .txt list has one path per line. Each line of a .jsonl list has a "path"
    and, optionally, an "id". Paths in a list are relative to the list's folder. With
    --column, each row of a Parquet file is an image.

    Pass '-' to read a list from standard input. Paths in this list are relative to the current
    folder. Read the output folder with qwen_vit.load_features. The folder's manifest has a row for
    each image. By default, the command skips and reports images that it cannot encode. It exits
    with 1 if images failed in this run. Ctrl-C saves the images encoded so far.
    """
    with slow_imports():
        from qwen_vit.export.options import ExportOptions
        from qwen_vit.export.plan import check_folder
        from qwen_vit.export.ray_cluster import export_on_ray
        from qwen_vit.export.resume import read_start_options
        from qwen_vit.export.run import export_features, load_encoder
        from qwen_vit.export.stop import StopSignals
        from qwen_vit.images.image import ImageLimits
        from qwen_vit.inputs.find import check_inputs
    of_this_run: dict[str, Any] = {
        "on_error": on_error, "part": part, "max_failures": max_failures, "extend": extend,
        "shard_seconds": shard_seconds, "retry_failed": retry_failed,
        "accept_versions": accept_versions,
    }  # fmt: skip
    options = ExportOptions(
        output, dtype, shard_size, normalize=normalize, layers=layers, column=column,
        id_column=id_column, exif=exif, pages=pages,
        limits=ImageLimits(formats=formats, allow_urls=allow_urls), **of_this_run,
        **take_video_options(loading),
    )  # fmt: skip
    if resume is not None:
        _refuse_start_options(click.get_current_context())
        start = read_start_options(resume)
        model, out = start.model, resume
        loading |= start.loading
        options = replace(start.options, **of_this_run)
    elif not inputs or model is None or out is None:
        raise _missing({"INPUTS": inputs, "--model": model, "--out": out})
    running: dict[str, Any] = {"decode_threads": decode_threads, "ec_cache": ec_cache}
    running |= {"confirm": None if yes else partial(_ask_if_large, folder=out)}
    running |= {"show_progress": not is_quiet()}
    with nullcontext() if resume is None else _explain_recorded():
        if images := inputs or None:
            check_paths(images)
            check_inputs(images, options.columns)
        check_folder(out, make=False)
        if dry_run:
            _print_estimate(model, images, options, out, as_json=as_json, **loading)
            return
        with StopSignals() as stop, _hint_resume(out):
            if address is None:
                encoder = load_encoder(model, options, **loading)
                done = export_features(encoder, images, out, options, stop=stop, **running)
            else:
                done = export_on_ray(
                    model, images, out, options, address=address or None, **running, **loading
                )
    _print_report(done, as_json=as_json, with_waits=profile or is_verbose())
    if sum(done.failed.values()) - done.failed_earlier > allow_failed:
        sys.exit(EXIT_SKIPPED)


def _print_estimate(
    model: str,
    images: tuple[str, ...] | None,
    options: "ExportOptions",
    out: "AnyPath",
    *,
    as_json: bool,
    **loading: Any,
) -> None:
    from qwen_vit.cli.text import estimate_text
    from qwen_vit.export.estimate import estimate_export
    from qwen_vit.export.run import load_encoder

    encoder = load_encoder(model, options, **loading)
    estimate = estimate_export(encoder, images, options, folder=out, show_progress=shows_progress())
    text = json.dumps(asdict(estimate), indent=2) if as_json else estimate_text(estimate, out)
    print_data(text)


def _print_report(done: "ExportReport", *, as_json: bool, with_waits: bool) -> None:
    from qwen_vit.cli.text import export_text, waits_text

    summary = export_text(done) + (f"\n{waits_text(done)}" if with_waits else "")
    print_data(json.dumps(done.to_json(), indent=2) if as_json else summary)


def _missing(wanted: dict[str, object]) -> click.UsageError:
    missing = ", ".join(name for name, given in wanted.items() if not given)
    return click.UsageError(
        f"missing: {missing}. Pass INPUTS, --model and --out, or only --resume OUT"
    )


def _refuse_start_options(ctx: click.Context) -> None:
    for name in OF_START:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            why = "OUT names the folder" if name == "out" else "the export has recorded this option"
            raise click.UsageError(f"{_flag(name)} does not work with --resume, because {why}")


@contextmanager
def _explain_recorded() -> Iterator[None]:
    """If an error's remedy names options that --resume rejects, explain how to change them."""
    try:
        yield
    except QwenVitError as error:
        named = error.remedy.options if isinstance(error.remedy, Wording) else ()
        flags = [_flag(name) for name in dict.fromkeys(named) if name in OF_START]
        if flags:
            error.remedy += (
                f" --resume keeps the recorded {' and '.join(flags)}: to change "
                f"{'this option' if len(flags) == 1 else 'these options'}, start a new export with "
                "another --out."
            )
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"--part is {text!r}, expected I/N such as 2/8, I from 1 to N")
    return int(match[1]), int(match[2])


@contextmanager
def _hint_resume(out: "AnyPath") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from qwen_vit.export.segments import count_kept

        kept = count_kept(out) if isinstance(out, Path) and out.is_dir() else 0
        if not isinstance(out, Path):
            print_log("run the same command again to resume")
        elif kept:
            print_log(
                f"the export saved {plural(kept, 'image')}; run the same command again to resume"
            )
        else:
            print_log("the export saved no image; run the same command again to start over")
        raise click.Abort from None  # click would print an empty line for KeyboardInterrupt


def _ask_if_large(estimate: "Estimate", folder: "AnyPath") -> None:
    from qwen_vit.cli.text import size_text

    fact, most = f"the export will take about {size_text(estimate.bytes)}", ASK_ABOVE_BYTES
    remedy = "pass fewer images, or pass --yes to export without a confirmation"
    if isinstance(folder, Path):
        free = shutil.disk_usage(folder).free
        fact, most = f"{fact}, and the disk has {size_text(free)} free", min(most, free)
        if estimate.bytes > free:
            remedy = "pass an --out on another disk, or fewer images. --yes skips this check"
    if estimate.bytes <= most:
        return
    if not sys.stdin.isatty():
        raise ExportError(fact, name=str(folder), remedy=remedy)
    if not click.confirm(f"{display_name(str(folder))}: {fact}. Continue?", err=True):
        raise ExportError(
            "export cancelled",
            remedy=with_options(
                "to make the export smaller, pass fewer images, {}, {} or {}",
                "max_pixels",
                ("output", "mean"),
                ("dtype", "bfloat16"),
            ),
        )
