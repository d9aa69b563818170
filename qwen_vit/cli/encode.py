"""Encode images into one feature file: `qwen-vit encode`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_vit.cli.checks import check_not_weights, check_output
from qwen_vit.cli.console import print_data
from qwen_vit.cli.exit_codes import EXIT_SKIPPED
from qwen_vit.cli.images import encode_one_by_one, list_images, load_encoder
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    FILE,
    NAME,
    allow_failed_option,
    allow_urls_option,
    as_video_option,
    column_options,
    device_option,
    dtype_option,
    exif_option,
    format_options,
    json_option,
    model_option,
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
from qwen_vit.errors import display_name

if TYPE_CHECKING:
    from qwen_vit.loading import OnError

__all__ = ["encode"]


@click.command(cls=SectionedCommand)
@click.argument("images", nargs=-1, required=True, type=NAME)
@model_option
@click.option("--out", required=True, type=FILE, help="Write this feature file.")
@click.option("--overwrite", is_flag=True, help="Replace an existing feature file.")
@column_options
@format_options
@allow_urls_option
@output_options
@device_option()
@dtype_option
@quantization_option
@pixel_options
@exif_option
@video_options
@as_video_option
@on_error_option
@allow_failed_option
@json_option
@source_options
@verbosity_options
def encode(
    *, images: tuple[str, ...], model: str, out: Path, overwrite: bool, output: Any,
    normalize: bool, layers: tuple[int, ...], on_error: "OnError", allow_failed: int,
    as_json: bool, column: str | None, id_column: str | None, formats: tuple[str, ...], pages: Any,
    exif: Any, allow_urls: tuple[str, ...], **loading: Any,
) -> None:  # fmt: skip
    """Encode images and videos into one feature file.

    \b
    qwen-vit encode photos/*.jpg --model tiny --out features.safetensors
    qwen-vit encode a.png --model Qwen/Qwen2.5-VL-7B-Instruct --out a.safetensors
    find . -name '*.png' | qwen-vit encode - --model tiny --out features.safetensors
    qwen-vit encode *.jpg --model tiny --out vectors.safetensors --output mean --normalize
    qwen-vit encode *.jpg --model tiny --out dense.safetensors --layers 1,3
    qwen-vit encode clip.mp4 --model tiny --out clip.safetensors --fps 1

    IMAGES are images, videos, folders, quoted patterns, tars and lists. The command searches
    folders recursively. A .txt list has one path per line. Each line of a .jsonl list has a "path"
    and, optionally, an "id". Paths in a list are relative to the list's folder. Pass '-' to read a
    list from standard input. Paths in this list are relative to the current folder. Parquet files
    need --column, and https:// addresses in a list need --allow-urls.

    The file contains image_embeds, image_grid_thw and image_token_offsets. Each block of --layers
    adds a tensor layer_K. Read the file with qwen_vit.load_features. By default, the command skips
    and reports images that it cannot encode. It then exits with 1, or with 2 if it encodes no
    image. It writes the file once, at the end. For many images, use `qwen-vit export`, which saves
    finished shards.
    """
    check_output(out, overwrite)
    check_not_weights(out, model)
    with slow_imports():
        from qwen_vit import write_features
        from qwen_vit.cli.text import encoded_json, encoded_table
        from qwen_vit.images.image import ImageLimits
        from qwen_vit.outputs import check_normalize
    check_normalize(output, normalize)
    videos = take_video_options(loading)
    limits = ImageLimits(formats=formats, allow_urls=allow_urls)
    items = list_images(
        images, out, column=column, id_column=id_column, limits=limits, pages=pages,
        video=videos["video"].changed, as_video=videos["as_video"], exif=exif,
    )  # fmt: skip
    encoder = load_encoder(model, **loading)
    rows = {"output": output, "normalize": normalize, "layers": layers}
    encoder.encode([], **rows)  # raises for a block that the tower lacks, before any image
    decoding = {"exif": exif, "limits": limits, **videos}
    done = list(encode_one_by_one(encoder, items, on_error, **decoding, **rows))
    features, milliseconds = [each for each, _ in done], [ms for _, ms in done]
    write_features(out, features, encoder.metadata(), overwrite=overwrite)
    if as_json:
        document = encoded_json(features, milliseconds, out, encoder, rows)
        print_data(json.dumps(document, indent=2))
    else:
        print_data(encoded_table(features, milliseconds))
        print_data(f"wrote {display_name(str(out))} ({out.stat().st_size:,} bytes)")
    if sum(feature.error is not None for feature in features) > allow_failed:
        sys.exit(EXIT_SKIPPED)
