"""Time the tower on this GPU: `qwen-vit bench`."""

import json
from typing import Any

import click

from qwen_vit.cli.console import print_data
from qwen_vit.cli.imports import slow_imports
from qwen_vit.cli.options import (
    MODEL_HELP,
    complete_model,
    device_option,
    dtype_option,
    json_option,
    quantization_option,
    source_options,
    verbosity_options,
)
from qwen_vit.cli.sections import SectionedCommand
from qwen_vit.workloads import WORKLOADS

__all__ = ["bench"]


@click.command(cls=SectionedCommand, short_help="Time the tower on this GPU against its roofline.")
@click.option("--model", shell_complete=complete_model, help=f"{MODEL_HELP}  [required]")
@click.option(
    "--workload", "workloads", multiple=True, type=click.Choice(tuple(WORKLOADS)),
    help="Time only this workload. Repeat the option for several workloads.  [default: all]",
)  # fmt: skip
@click.option("--plain", is_flag=True, help="Run the plain Triton kernels, even on a Hopper GPU.")
@device_option("Compute on cuda or cuda:1.")
@dtype_option
@quantization_option
@json_option
@source_options
@verbosity_options
def bench(
    model: str | None, workloads: tuple[str, ...], plain: bool, as_json: bool, **loading: Any
) -> None:
    """Time the tower on this GPU with random pixels, and compare the time with the GPU's roofline.

    \b
    qwen-vit bench --model Qwen/Qwen2.5-VL-7B-Instruct
    qwen-vit bench --model tiny --workload "1 x 448^2" --json

    The roofline is the time of the tower's GEMMs and attention at the rate of a large GEMM, which
    the benchmark interleaves with the workload. On Hopper GPUs, qwen_vit uses special kernels. With
    --plain, it uses the plain Triton kernels, as on other GPUs.
    """
    with slow_imports():
        from qwen_vit import benchmark
        from qwen_vit.encoder import VisionEncoder
    benchmark.check_device(loading["device"])
    if model is None:  # with `required`, click would ask for a model before the GPU is checked
        raise click.MissingParameter(param_hint="'--model'", param_type="option")
    encoder = VisionEncoder.from_pretrained(model, **loading)
    rows = benchmark.bench(encoder, workloads or tuple(WORKLOADS), plain=plain)
    if as_json:
        print_data(json.dumps(benchmark.speed_report(encoder, rows), indent=2))
    else:
        print_data(benchmark.speed_table(rows))
