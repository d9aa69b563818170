"""Define the options that several commands share."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from qwen_vit.checkpoint.published import PACKAGED, cached_repositories, published_checkpoints
from qwen_vit.cli.console import set_verbosity
from qwen_vit.common.arguments import is_address
from qwen_vit.common.storage import is_remote
from qwen_vit.common.store_path import as_path
from qwen_vit.errors import FLOAT16_OVERFLOWS, ArgumentError

__all__ = [
    "FILE",
    "FILE_OR_FOLDER",
    "FOLDER",
    "LOCAL_FOLDER",
    "MODEL_HELP",
    "NAME",
    "SOURCE_NAMES",
    "Dtype",
    "allow_failed_option",
    "allow_urls_option",
    "as_video_option",
    "column_options",
    "complete_model",
    "device_option",
    "dtype_option",
    "exif_option",
    "format_options",
    "json_option",
    "model_argument",
    "model_name_option",
    "model_option",
    "model_or_features_argument",
    "on_error_option",
    "output_options",
    "pixel_options",
    "quantization_option",
    "source_options",
    "take_video_options",
    "verbosity_options",
    "video_options",
]

FILE_SUFFIXES = (".html", ".json", ".parquet", ".safetensors")  # of the files that commands write
NAME = click.Path(readable=False, path_type=str)  # the command skips a file that it cannot read


class NamedPath(click.Path):
    """Convert an argument to a path. Reject an empty string, and `-`, which stands for standard
    input or output."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("", "-"):
            self.fail(f"{value!r} is not a path. Pass the path of a file or folder.", param, ctx)
        return super().convert(value, param, ctx)


class LocalPath(NamedPath):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_address(value):
            self.fail(f"{value} is an address. Pass a path on this machine.", param, ctx)
        return super().convert(value, param, ctx)


class LocalFile(LocalPath):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.endswith(os.sep):
            self.fail(f"{value} names a folder. Pass the path of a file.", param, ctx)
        return super().convert(value, param, ctx)


class LocalFolder(LocalPath):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).lower().endswith(FILE_SUFFIXES) and not os.path.isdir(value):
            self.fail(f"{value} names a file. Pass the path of a folder.", param, ctx)
        return super().convert(value, param, ctx)


class Folder(LocalFolder):
    """Convert an argument to a folder on this machine, or to a prefix in object storage."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_remote(value):
            return as_path(value)
        if isinstance(value, str) and is_address(value):
            self.fail(
                f"{value} is an address of another kind. Pass a path on this machine, or an "
                "address such as s3://BUCKET/NAME.", param, ctx,
            )  # fmt: skip
        return super().convert(value, param, ctx)


SOURCE_NAMES = ("revision", "subfolder", "cache_dir", "local_files_only")
FILE = LocalFile(path_type=Path)
FILE_OR_FOLDER = LocalPath(path_type=Path)
FOLDER = Folder(path_type=Path)
LOCAL_FOLDER = LocalFolder(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])


class Dtype(click.Choice[str]):
    SHORT = {"bf16": "bfloat16", "fp32": "float32"}  # noqa: RUF012 - never changed
    REFUSED = ("float16", "fp16", "half")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.REFUSED:
            fact = f"{value!r}, and {FLOAT16_OVERFLOWS}"
            self.fail(f"{fact}. Use bfloat16 or float32.", param, ctx)
        return super().convert(self.SHORT.get(value, value), param, ctx)


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    names = dict.fromkeys([*PACKAGED, *published_checkpoints(), *cached_repositories()])
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    # first, because bash drops the items before it
    return [CompletionItem(incomplete, type="dir"), *found]


def _complete_model_or_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    _, *names = complete_model(ctx, param, incomplete)
    return [CompletionItem(incomplete, type="file"), *names]


model_or_features_argument = click.argument(
    "model", metavar="MODEL|FEATURES", shell_complete=_complete_model_or_file
)
model_argument = click.argument("model", shell_complete=complete_model)
MODEL_HELP = "Use this Hub repository or local folder, or 'tiny'."
model_option = click.option(
    "--model", required=True, shell_complete=complete_model, help=MODEL_HELP
)
model_name_option = click.option("--model", shell_complete=complete_model, help=MODEL_HELP)
dtype_option = click.option(
    "--dtype", type=Dtype(["auto", "bfloat16", "float32"]), default="auto", show_default=True,
    help="Compute in this dtype. bf16 and fp32 are short names.",
)  # fmt: skip
quantization_option = click.option(
    "--quantization", type=click.Choice(["fp8"]),
    help="Experimental: compute the MLP in 8-bit floats, less accurately. The option "
    "needs an Ada GPU or a newer GPU.",
)  # fmt: skip


def _check_failures(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    given = {**ctx.params, str(param.name): value}  # the user may pass the options in any order
    if given.get("on_error") == "raise" and given.get("allow_failed"):
        raise click.UsageError(
            "--allow-failed works only with --on-error skip. Omit one of the two."
        )
    return value


on_error_option = click.option(
    "--on-error",
    type=click.Choice(["skip", "raise"]),
    default="skip",
    show_default=True,
    callback=_check_failures,
    help="Skip a failed image, or stop at the first failed image.",
)
allow_failed_option = click.option(
    "--allow-failed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    callback=_check_failures,
    help="Exit with 1 only if more than N images failed in this run.",
)  # fmt: skip
allow_urls_option = click.option(
    "--allow-urls", default="", metavar="HOST,HOST,...",
    callback=lambda _, __, text: tuple(filter(None, text.split(","))),
    help="Fetch https:// addresses of these hosts.",
)  # fmt: skip
json_option = click.option(
    "--json", "as_json", is_flag=True,
    help="Print one JSON document. Each size_px is [height, width].",
)  # fmt: skip


def device_option(help: str = "Compute on cuda, cuda:1 or cpu.") -> Callable[[Command], Command]:
    return click.option("--device", default="auto", show_default=True, help=help)


def output_options(command: Command) -> Command:
    options = (
        click.option(
            "--output", type=click.Choice(["merged", "patch", "mean"]), default="merged",
            show_default=True,
            help="Write the language model's tokens (merged), the rows before the merger (patch), "
            "or one vector per image (mean).",
        ),
        click.option("--normalize", is_flag=True, help="Scale each mean vector to unit length."),
        click.option(
            "--layers", metavar="K,K,...", callback=lambda _, __, text: _layers(text),
            help="Add the features after these blocks, before any norm. The first block is 0.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _layers(text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,9} *", part) for part in parts):
        raise click.BadParameter(
            f"--layers is {text!r}, expected block numbers such as 7,15, counted from 0"
        )
    return tuple(map(int, parts))


def column_options(command: Command) -> Command:
    options = (
        click.option("--column", metavar="NAME", help="Read images from this Parquet column."),
        click.option(
            "--id-column",
            metavar="NAME",
            help="Read ids from this Parquet column.  [default: FILE:ROW]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def format_options(command: Command) -> Command:
    options = (
        click.option(
            "--formats", default="", metavar="F,F,...", callback=lambda _, __, text: _formats(text),
            help="Also decode ppm, ico, tga or jpeg2000.",
        ),
        click.option(
            "--pages", type=click.Choice(["first", "all"]), default="first", show_default=True,
            help="Encode only the first page or frame, or each page and frame as an image.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _formats(text: str) -> tuple[str, ...]:
    if not text:  # completing a word must not import NumPy
        return ()
    from qwen_vit.images.image import check_formats

    try:
        return check_formats([part.strip() for part in text.split(",") if part.strip()])
    except ArgumentError as error:
        raise click.UsageError(error.text(in_shell=True)) from None


def pixel_options(command: Command) -> Command:
    # help lists the option first that is added last
    for side, word in (("max", "largest"), ("min", "smallest")):
        help = f"Set the {word} height x width of an image after resizing."
        command = click.option(f"--{side}-pixels", type=int, help=help)(command)
    return command


exif_option = click.option(
    "--exif", type=click.Choice(["apply", "ignore"]), default="apply", show_default=True,
    help="Apply the EXIF orientation, or ignore it for pixels that are already upright.",
)  # fmt: skip


def video_options(command: Command) -> Command:
    options = (
        click.option(
            "--fps", type=float, default=2.0, show_default=True,
            help="Sample this many video frames per second."
        ),
        click.option(
            "--n-frames", type=int,
            help="Sample this many video frames, rounded to an even number, instead of using "
            "--fps.",
        ),
        click.option(
            "--start", type=float, metavar="SECONDS", help="Sample a video from this time."
        ),
        click.option(
            "--end", type=float, metavar="SECONDS", help="Sample a video up to this time."
        ),
        click.option(
            "--max-frames", type=int,
            help="Sample at most this many frames with --fps.  [default: 768]",
        ),
        click.option(
            "--max-frame-pixels", type=int,
            help="Set the largest height x width of a resized video frame.  [default: 602112]",
        ),
        click.option(
            "--min-frame-pixels", type=int,
            help="Set the smallest height x width of a resized video frame.  [default: 100352]",
        ),
        click.option(
            "--sampling", type=click.Choice(["qwen", "transformers"]), default="qwen",
            show_default=True,
            help="Choose frames and their size like qwen-vl-utils (qwen) or transformers.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


as_video_option = click.option(
    "--as-video", is_flag=True, help="Encode an animated GIF, WebP or PNG as a video."
)


def take_video_options(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the video options from `options`, and return the arguments `video` and `as_video`."""
    from qwen_vit.video.options import VideoOptions

    source = click.get_current_context().get_parameter_source
    for flag in ("fps", "max_frames"):
        if options["n_frames"] is not None and source(flag) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--n-frames works only without --{flag.replace('_', '-')}. Omit one of the two."
            )
    names = ("fps", "n_frames", "start", "end", "max_frames", "sampling")
    chosen = {name: options.pop(name) for name in names}
    for side in ("min", "max"):
        chosen[f"{side}_pixels"] = options.pop(f"{side}_frame_pixels")
    return {"video": VideoOptions(**chosen), "as_video": options.pop("as_video", False)}


def source_options(command: Command) -> Command:
    options = (
        click.option("--revision", help="Use this branch, tag or commit of the Hub's repository."),
        click.option("--subfolder", help="Use this folder inside MODEL."),
        click.option(
            "--cache-dir",
            type=LOCAL_FOLDER,
            help="Set the Hub's cache folder.  [default: huggingface_hub's folder]",
        ),
        click.option("--local-files-only", is_flag=True, help="Do not contact the Hub."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def verbosity_options(command: Command) -> Command:
    def apply(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        given = ctx.meta.setdefault("qwen_vit.verbosity", set())
        if value:
            given.add(param.name)
        if len(given) > 1:
            raise click.UsageError("--quiet works only without --verbose. Omit one of the two.")
        set_verbosity(1 if "verbose" in given else -1 if given else 0)

    for short, long, help in (
        ("-v", "--verbose", "Show more details."),
        ("-q", "--quiet", "Show only results, errors and skipped images."),
    ):
        command = click.option(
            short, long, is_flag=True, expose_value=False, is_eager=True, callback=apply, help=help
        )(command)
    return command
