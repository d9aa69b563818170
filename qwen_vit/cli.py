"""The `qwen-vit` command: each body parses, calls one function and prints.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 all good; 1 finished, with inputs
skipped; 2 usage, configuration or output error; 130 interrupted.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from qwen_vit import __version__
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, ImageError, QwenVitError
from qwen_vit.features import ImageFeatures, write_features
from qwen_vit.hub import find_checkpoint
from qwen_vit.info import describe, licence_of

__all__ = ["main"]

EXIT_SKIPPED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """The options that say which checkpoint, for every command that opens one."""
    options = (
        click.option("--revision", help="Branch, tag or commit on the Hub."),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Instead of HF_HOME."),
        click.option("--local-files-only", is_flag=True, help="Never ask the network."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qwen-vit")
def cli() -> None:
    """Images to the embeddings that Qwen2.5-VL's language model sees.

    \b
    qwen-vit encode cat.jpg dog.png --model Qwen/Qwen2.5-VL-7B-Instruct --out features.safetensors
    qwen-vit info tiny
    """


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=str))
@click.option("--model", required=True, help="Hub repository, local folder, or 'tiny'.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Feature file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing feature file.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1 or cpu.")
@click.option("--dtype", default="auto", show_default=True, help="bfloat16 or float32.")
@click.option("--min-pixels", type=int, help="Smallest height x width after resizing.")
@click.option("--max-pixels", type=int, help="Largest height x width after resizing.")
@click.option("--on-error", type=click.Choice(["skip", "raise"]), default="skip", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def encode(
    images: tuple[str, ...], model: str, out: Path, overwrite: bool, on_error: str, as_json: bool,
    **loading: Any,
) -> None:  # fmt: skip
    """Encode IMAGES into one feature file.

    \b
    qwen-vit encode photos/*.jpg --model tiny --out features.safetensors
    qwen-vit encode a.png --model Qwen/Qwen2.5-VL-7B-Instruct --out a.safetensors

    The file holds image_embeds, image_grid_thw and image_token_offsets; read it with
    qwen_vit.load_features. An image that cannot be encoded is reported and skipped (exit code 1).
    """
    _check_output(out, overwrite, images)
    encoder = VisionEncoder.from_pretrained(model, **loading)
    features, milliseconds = _encode_one_by_one(encoder, images, on_error)
    write_features(out, features, encoder.metadata())
    if as_json:
        click.echo(json.dumps(_encode_report(features, milliseconds, out, encoder), indent=2))
    else:
        click.echo(_table(features, milliseconds))
        click.echo(f"wrote {_shown(str(out))} ({out.stat().st_size:,} bytes)")
    if any(feature.error for feature in features):
        sys.exit(EXIT_SKIPPED)


@cli.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def download(model: str, as_json: bool, **finding: Any) -> None:
    """Fetch what MODEL needs here, into the Hub's cache: configs, and shards with vision tensors.

    \b
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct --revision main --json

    Afterwards the checkpoint works offline (--local-files-only).
    """
    source = find_checkpoint(model, **finding)
    facts = {
        "model": source.name,
        "commit": source.commit,
        "licence": licence_of(source.name),
        "folder": str(source.folder),
    }
    click.echo(json.dumps(facts, indent=2) if as_json else _listing(facts))


@cli.command()
@click.argument("model")
@click.option("--image", type=click.Path(), help="Also count this image's tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def info(model: str, image: str | None, as_json: bool, **finding: Any) -> None:
    """Describe the checkpoint MODEL: architecture, licence, parameters, hashes, token counts.

    \b
    qwen-vit info tiny
    qwen-vit info Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg --json
    """
    facts = describe(find_checkpoint(model, **finding), image)
    click.echo(json.dumps(facts, indent=2) if as_json else _listing(facts))


def _check_output(out: Path, overwrite: bool, images: Sequence[str]) -> None:
    """Before any work: what would make its result impossible to write."""
    if out.is_dir():
        raise ExportError(f"{out} is a folder, expected a file to write; pass another --out")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out.parent} is not a folder, expected one; create it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise ExportError(f"{out.parent} cannot be written to; check its permissions")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists; pass --overwrite to replace it, or another --out")
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise ExportError(
            f"{_shown(twice)} is given twice, expected each image once; leave one out"
        )


def _encode_one_by_one(
    encoder: VisionEncoder, images: Sequence[str], on_error: str
) -> tuple[list[ImageFeatures], list[float]]:
    """Every image's features, and the milliseconds from opening the file to its embeddings."""
    features, milliseconds = [], []
    for image in tqdm(images, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()):
        start = time.perf_counter()
        [result] = encoder.encode([image], on_error=on_error)  # type: ignore[arg-type]
        if result.embeds is not None and not result.embeds.isfinite().all():
            error = ImageError(
                f"{_shown(image)}: its embeddings hold NaN or infinity; check the checkpoint with "
                "`qwen-vit info`, and try --dtype float32",
                code="not-finite",
            )
            if on_error == "raise":
                raise error
            result = ImageFeatures(image, None, None, result.size_px, error=error)
        if result.embeds is not None:
            result = replace(result, embeds=result.embeds.cpu())  # the GPU's memory is for encoding
        milliseconds.append(1000 * (time.perf_counter() - start))
        features.append(result)
        if result.error is not None:
            click.echo(f"skipped: {result.error}", err=True)
    return features, milliseconds


def _table(features: Sequence[ImageFeatures], milliseconds: Sequence[float]) -> str:
    rows = [("file", "size", "grid (t, h, w)", "tokens", "width", "ms")]
    for feature, duration in zip(features, milliseconds, strict=True):
        if feature.embeds is None or feature.size_px is None:
            rows.append((_shown(feature.id), "-", f"skipped: {_code(feature)}", "-", "-", "-"))
            continue
        height, width = feature.size_px
        tokens, embedding_width = feature.embeds.shape
        rows.append(
            (
                _shown(feature.id), f"{width} x {height}", str(feature.grid_thw), str(tokens),
                str(embedding_width), f"{duration:.0f}",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        name, *values = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([name, *values]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _encode_report(
    features: Sequence[ImageFeatures], milliseconds: Sequence[float], out: Path,
    encoder: VisionEncoder,
) -> dict[str, Any]:  # fmt: skip
    return {
        "out": str(out),
        "model": encoder.source.name,
        "commit": encoder.source.commit,
        "device": str(encoder.device),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "images": [
            {
                "id": feature.id,
                "size_px": feature.size_px,
                "grid_thw": feature.grid_thw,
                "tokens": None if feature.embeds is None else feature.embeds.shape[0],
                "width": None if feature.embeds is None else feature.embeds.shape[1],
                "ms": round(duration, 3),
                "notes": feature.notes,
                "error": None
                if feature.error is None
                else {"code": _code(feature), "message": str(feature.error)},
            }
            for feature, duration in zip(features, milliseconds, strict=True)
        ],
    }


def _shown(name: str) -> str:
    """A file name on one line of any terminal: odd ones escaped, as in the error messages."""
    return name if name.isprintable() else ascii(name)


def _code(feature: ImageFeatures) -> str:
    return feature.error.code if feature.error is not None else ""


def _listing(facts: dict[str, Any]) -> str:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append((name, ""))
            lines.extend((f"  {key}", str(item)) for key, item in value.items())
        else:
            lines.append((name, str(value)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in lines)


def main() -> None:
    """Run the command line; turn this package's errors into one line and an exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_ERROR)
    except QwenVitError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_ERROR)
    except Exception:  # Python's own exit code would be 1: finished, with inputs skipped
        logging.getLogger("qwen_vit").exception("error: this should not happen; please report it")
        sys.exit(EXIT_ERROR)
