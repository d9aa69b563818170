"""The `qwen-vit` command: each body parses, calls one function and prints.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 all good; 1 finished, with inputs
skipped or a comparison that fails; 2 usage, configuration or output error, or a question answered
with no; 130 interrupted.
"""

import json
import logging
import os
import re
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from tqdm import tqdm

from qwen_vit import __version__
from qwen_vit.batching import OnError
from qwen_vit.benchmark import WORKLOADS, check_device, speed_report, speed_table
from qwen_vit.benchmark import bench as measure_speed
from qwen_vit.checkpoint.hub import download as fetch
from qwen_vit.checkpoint.hub import find_checkpoint
from qwen_vit.checkpoint.load import find_tower
from qwen_vit.cli.info import describe, report
from qwen_vit.cli.text import (
    encoded_json,
    encoded_table,
    estimate_text,
    export_text,
    facts_text,
    waits_text,
)
from qwen_vit.common.atomic_file import cannot_write, check_utf8, refuse_link
from qwen_vit.common.tensors import all_finite
from qwen_vit.compare.huggingface import ATTENTIONS, PROCESSORS
from qwen_vit.compare.report import check_report, write_report
from qwen_vit.compare.run import compare_checkpoint
from qwen_vit.compare.text import as_text
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ExportError, QwenVitError, display_name
from qwen_vit.export.estimate import Estimate, estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import check_folder
from qwen_vit.export.ray_cluster import export_on_ray
from qwen_vit.export.run import export_features, load_encoder
from qwen_vit.export.settings import has_shards
from qwen_vit.features import FailedImage, ImageFeatures, not_finite, write_features
from qwen_vit.inputs.listing import check_inputs

__all__ = ["main"]

EXIT_SKIPPED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130
ASK_ABOVE_BYTES = 100 * 10**9
NAME = click.Path(readable=False, path_type=str)  # what cannot be read is skipped like any other

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """The options that say which checkpoint, for every command that opens one."""
    options = (
        click.option("--revision", help="Branch, tag or commit on the Hub."),
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path),
            help="Instead of HF_HUB_CACHE ($HF_HOME/hub).",
        ),
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
@click.argument("images", nargs=-1, required=True, type=NAME)
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
    images: tuple[str, ...], model: str, out: Path, overwrite: bool, on_error: OnError,
    as_json: bool, **loading: Any,
) -> None:  # fmt: skip
    """Encode IMAGES into one feature file.

    \b
    qwen-vit encode photos/*.jpg --model tiny --out features.safetensors
    qwen-vit encode a.png --model Qwen/Qwen2.5-VL-7B-Instruct --out a.safetensors

    The file holds image_embeds, image_grid_thw and image_token_offsets; read it with
    qwen_vit.load_features. An image that cannot be encoded is reported and skipped (exit code 1).
    It is written at the end, whole: for many images, `qwen-vit export` keeps what is done.
    """
    _check_output(out, overwrite, images)
    encoder = VisionEncoder.from_pretrained(model, **loading)
    features, milliseconds = _encode_one_by_one(encoder, images, on_error)
    write_features(out, features, encoder.metadata(), overwrite=overwrite)
    if as_json:
        _print(json.dumps(encoded_json(features, milliseconds, out, encoder), indent=2))
    else:
        _print(encoded_table(features, milliseconds))
        _print(f"wrote {display_name(str(out))} ({out.stat().st_size:,} bytes)")
    if any(isinstance(each, FailedImage) for each in features):
        sys.exit(EXIT_SKIPPED)


@cli.command()
@click.argument("inputs", nargs=-1, required=True, type=NAME)
@click.option("--model", required=True, help="Hub repository, local folder, or 'tiny'.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write, or resume."
)
@click.option(
    "--output", type=click.Choice(["merged", "patch", "mean"]), default="merged",
    show_default=True, help="What a language model takes; un-merged; one row per image.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]),
    help="How features are stored; a GPU computes in it, too.  [default: as computed]",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1 or cpu.")
@click.option("--min-pixels", type=int, help="Smallest height x width after resizing.")
@click.option("--max-pixels", type=int, help="Largest height x width after resizing.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
    help="Images in a file.",
)  # fmt: skip
@click.option(
    "--part", default="1/1", metavar="I/N", callback=lambda _, __, text: _part(text),
    help="Only every N-th shard, from the I-th on: N processes share one folder.",
)  # fmt: skip
@click.option("--on-error", type=click.Choice(["skip", "raise"]), default="skip", show_default=True)
@click.option(
    "--max-failures", type=click.IntRange(min=0), default=200, show_default=True,
    help="Stop after so many failures in a row; 0: never.",
)  # fmt: skip
@click.option(
    "--decode-threads", type=click.IntRange(min=1),
    help="Read, decode and resize.  [default: half the cores, 2 to 16]",
)  # fmt: skip
@click.option(
    "--ray", "address", is_flag=False, flag_value="", metavar="[ADDRESS]",
    help="On every GPU, or CPU, of a Ray cluster; this machine's without an address.",
)  # fmt: skip
@click.option("--profile", is_flag=True, help="Say what the export waited for.")
@click.option("--dry-run", is_flag=True, help="Count images, rows, bytes and hours; write none.")
@click.option("--yes", is_flag=True, help="Do not ask before writing more than 100 GB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def export(
    inputs: tuple[str, ...], model: str, out: Path, device: str, dry_run: bool, yes: bool,
    as_json: bool, output: Any, dtype: Any, shard_size: int, part: tuple[int, int], on_error: Any,
    max_failures: int, decode_threads: int | None, address: str | None, profile: bool,
    **loading: Any,
) -> None:  # fmt: skip
    """Export the images of INPUTS into a folder of shards; run again, it goes on where it stopped.

    \b
    qwen-vit export photos/ --model tiny --out features --dry-run
    qwen-vit export tars/ --model Qwen/Qwen2.5-VL-7B-Instruct --out features --part 2/8
    qwen-vit export tars/ --model Qwen/Qwen2.5-VL-7B-Instruct --out features --ray

    INPUTS are images, folders (searched to every depth), quoted patterns, tars, and lists: .txt
    with a path a line, .jsonl with an "id" and a "path" each; relative paths count from the list's
    folder. Read the folder with qwen_vit.load_features; its manifest says what became of each
    image. Images that cannot be encoded are reported and skipped (exit code 1).
    """
    options = ExportOptions(output, dtype, shard_size, on_error, part, max_failures)
    check_inputs(inputs)
    check_folder(out, make=False)
    is_terminal = sys.stderr.isatty()
    if dry_run:
        encoder = load_encoder(model, options, device=device, **loading)
        estimate = estimate_export(encoder, inputs, options, folder=out, show_progress=is_terminal)
        _print(json.dumps(asdict(estimate), indent=2) if as_json else estimate_text(estimate, out))
        return
    running: dict[str, Any] = {
        "confirm": None if yes else partial(_ask_if_large, folder=out),
        "show_progress": True,
        "decode_threads": decode_threads,
    }
    with _sigterm_interrupts(), hint_resume(out):
        if address is None:
            encoder = load_encoder(model, options, device=device, **loading)
            done = export_features(encoder, inputs, out, options, **running)
        else:
            done = export_on_ray(
                model, inputs, out, options, address=address or None, device=device, **running,
                **loading,
            )  # fmt: skip
    shown = export_text(done) + (f"\n{waits_text(done)}" if profile else "")
    _print(json.dumps(done.to_json(), indent=2) if as_json else shown)
    if done.failed:
        sys.exit(EXIT_SKIPPED)


@cli.command()
@click.argument("images", nargs=-1, type=NAME)
@click.option("--model", required=True, help="Hub repository, local folder, or 'tiny'.")
@click.option(
    "--golden", type=click.Path(path_type=Path), help="Compare with this file, not transformers."
)
@click.option(
    "--save-golden", type=click.Path(path_type=Path), help="Also write what Hugging Face computed."
)
@click.option("--report", type=click.Path(path_type=Path), help="Folder for a page with pictures.")
@click.option("--overwrite", is_flag=True, help="Replace an existing golden file or report.")
@click.option("--attention", type=click.Choice(ATTENTIONS), help="Hugging Face's; default: sdpa.")
@click.option(
    "--processor", type=click.Choice(PROCESSORS), default="pillow", show_default=True,
    help="Whose pixels both towers get.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1 or cpu.")
@click.option("--dtype", default="auto", show_default=True, help="bfloat16 or float32.")
@click.option("--min-pixels", type=int, help="Smallest height x width after resizing.")
@click.option("--max-pixels", type=int, help="Largest height x width after resizing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def compare(
    images: tuple[str, ...], save_golden: Path | None, report: Path | None, overwrite: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Compare with Hugging Face's encoder on IMAGES, stage by stage, and both with float64.

    \b
    qwen-vit compare photo.jpg --model tiny --report page
    qwen-vit compare --model Qwen/Qwen2.5-VL-7B-Instruct --golden 7b.safetensors

    Exit code 0 if every stage keeps the numbers policy, 1 if one does not or an image was skipped.
    transformers computes the reference; a golden file, which --save-golden writes, stands in for it
    (then IMAGES may be left out). --report needs the extra: pip install 'qwen-vit[report]'.
    """
    if save_golden is not None:
        _check_output(save_golden, overwrite, images, "--save-golden")
    if report is not None:
        check_report(report, overwrite=overwrite)
    comparison = compare_checkpoint(
        images, save_golden=save_golden, keep_maps=report is not None,
        show_progress=sys.stderr.isatty(), **options,
    )  # fmt: skip
    _print(json.dumps(comparison.to_json(), indent=2) if as_json else as_text(comparison))
    if report is not None and comparison.images:
        _tell(f"wrote {display_name(str(write_report(report, comparison)))}")
    elif report is not None:
        _tell(f"wrote nothing to {display_name(str(report))}: no image was compared")
    if not comparison.passed:
        sys.exit(EXIT_SKIPPED)


@cli.command()
@click.argument("model")
@click.option("--full", is_flag=True, help="Take whole shards, checked against the Hub's sha256.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def download(model: str, full: bool, as_json: bool, **finding: Any) -> None:
    """Fetch the vision tower of MODEL and its configs, once: afterwards it works offline.

    \b
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit download Qwen/Qwen2.5-VL-7B-Instruct --revision main --json

    Only the bytes of the vision tensors are fetched, into the Hub's cache; saved_bytes are those of
    the checkpoint's weights that stay where they are.
    """
    fetched = fetch(model, full=full, **finding)
    find_tower(fetched.source.folder)  # a local folder may hold none
    facts = report(fetched)
    _print(json.dumps(facts, indent=2) if as_json else facts_text(facts))


@cli.command()
@click.argument("model")
@click.option("--image", type=NAME, help="Also count this image's tokens.")
@click.option("--verify", is_flag=True, help="Hash every file again, and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def info(model: str, image: str | None, verify: bool, as_json: bool, **finding: Any) -> None:
    """Describe the checkpoint MODEL: architecture, licence, parameters, hashes, token counts.

    \b
    qwen-vit info tiny
    qwen-vit info Qwen/Qwen2.5-VL-7B-Instruct --image photo.jpg --json
    """
    facts = describe(find_checkpoint(model, **finding), image, verify=verify)
    _print(json.dumps(facts, indent=2) if as_json else facts_text(facts))


@cli.command()
@click.option("--model", required=True, help="Hub repository, local folder, or 'tiny'.")
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    type=click.Choice(tuple(WORKLOADS)),
    help="Instead of all of them.",
)
@click.option("--device", default="auto", show_default=True, help="cuda or cuda:1.")
@click.option("--dtype", default="auto", show_default=True, help="bfloat16 or float32.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@model_options
def bench(model: str, workloads: tuple[str, ...], as_json: bool, **loading: Any) -> None:
    """Time the tower on this GPU: random pixels, GPU time, beside the floor that the chip allows.

    \b
    qwen-vit bench --model Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit bench --model tiny --workload "1 x 448^2" --json

    The floor is all operations at the rate of a large matrix product in turns with it.
    """
    check_device(loading["device"])
    encoder = VisionEncoder.from_pretrained(model, **loading)
    rows = measure_speed(encoder, workloads or tuple(WORKLOADS))
    if as_json:
        _print(json.dumps(speed_report(encoder, rows), indent=2))
    else:
        _print(speed_table(rows))


def _print(text: str) -> None:
    """Data for stdout; a reader that has seen enough of it, such as `head`, changes nothing."""
    try:
        click.echo(text)
    except OSError as error:
        _to_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise ExportError(
                f"standard output could not be written ({error.strerror}); check where it goes"
            ) from None


def _to_nowhere(stream: TextIO) -> None:
    """For what a stream that failed still holds: Python would end in 120 because of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(text: str) -> None:
    """A line for stderr, above a bar; no reason to stop where it cannot be written."""
    with suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
        click.echo(text, err=True)


def _check_output(out: Path, overwrite: bool, images: Sequence[str], option: str = "--out") -> None:
    """Before any work: what would make its result impossible to write, or cost something else."""
    check_utf8(out)
    try:
        there, parent = _status(out), _status(out.absolute().parent)
    except OSError as error:
        raise cannot_write(out, error) from None
    refuse_link(out)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise ExportError(f"{out} is a folder, expected a file to write; pass another {option}")
    if parent is None or not stat.S_ISDIR(parent.st_mode):
        raise ExportError(f"{out.parent} is not a folder, expected one; create it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise ExportError(f"{out.parent} cannot be written to; check its permissions")
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise ExportError(f"{out} is a device or the like, expected a file; pass another {option}")
    if there is not None and not overwrite:
        raise ExportError(f"{out} exists; pass --overwrite to replace it, or another {option}")
    if there is not None and any(_is_same(image, there) for image in images):
        raise ExportError(f"{out} is one of the images; pass another {option}")
    if len(set(images)) < len(images):
        twice = next(image for image in images if images.count(image) > 1)
        raise ExportError(
            f"{display_name(twice)} is given twice, expected each image once; leave one out"
        )


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_same(image: str, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(image), there)
    except OSError:  # which reading it will tell
        return False


def _encode_one_by_one(
    encoder: VisionEncoder, images: Sequence[str], on_error: OnError
) -> tuple[list[ImageFeatures | FailedImage], list[float]]:
    """Every image's features, and the milliseconds from opening the file to its embeddings."""
    results: list[ImageFeatures | FailedImage] = []
    milliseconds = []
    for image in tqdm(images, unit="image", file=sys.stderr, disable=not sys.stderr.isatty()):
        start = time.perf_counter()
        result = encoder.encode(image, on_error=on_error)
        if isinstance(result, ImageFeatures) and not all_finite(result.embeds):
            error = not_finite(image)
            if on_error == "raise":
                raise error
            result = FailedImage(image, error, size_px=result.size_px)
        if isinstance(result, ImageFeatures):
            result = replace(result, embeds=result.embeds.cpu())  # the GPU's memory is for encoding
        else:
            _tell(f"skipped: {result.error}")
        milliseconds.append(1000 * (time.perf_counter() - start))
        results.append(result)
    return results, milliseconds


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"--part is {text!r}, expected I/N such as 2/8, I from 1 to N")
    return int(match[1]), int(match[2])


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """What a scheduler sends ends an export as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def hint_resume(out: Path) -> Iterator[None]:
    """What becomes of an export that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if out.is_dir() and has_shards(out):
            _tell("finished shards are kept; run the same command again to go on")
        else:
            _tell(
                "no shard was finished: the same command begins again, and keeps more of what it "
                "did with a smaller --shard-size"
            )
        raise


def _ask_if_large(estimate: Estimate, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if estimate.bytes <= min(ASK_ABOVE_BYTES, free):
        return
    text = (
        f"{display_name(str(folder))} will take about {estimate.bytes / 1e9:,.3g} GB; its disk has "
        f"{free / 1e9:,.1f} GB free"
    )
    if not sys.stdin.isatty():
        raise ExportError(f"{text}; pass --yes to go on without asking, or give fewer images")
    if not click.confirm(f"{text}. Go on?", err=True):
        raise ExportError(
            "nothing was exported, as you wished; fewer images, --max-pixels, --output mean or "
            "--dtype bfloat16 make it smaller"
        )


def _on_one_line(text: str) -> str:
    """Odd characters escaped: names may hold what moves a terminal's cursor."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def main() -> None:
    """Run the command line; turn this package's errors into one line and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own
    try:
        cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _tell("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_ERROR)
    except QwenVitError as error:
        _tell(f"error: {_on_one_line(str(error))}")
        sys.exit(EXIT_ERROR)
    except OSError as error:  # where it was not foreseen that the system may refuse
        where = f"{error.filename} cannot be used: " if error.filename else ""
        _tell(f"error: {_on_one_line(where + (error.strerror or str(error)))}; check the system")
        sys.exit(EXIT_ERROR)
    except Exception:  # Python's own exit code would be 1: finished, with inputs skipped
        logging.getLogger("qwen_vit").exception("error: this should not happen; please report it")
        sys.exit(EXIT_ERROR)
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _to_nowhere(sys.stderr)
