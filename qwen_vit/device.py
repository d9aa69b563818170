"""Choose an encoder's device, dtype and quantization, and check that the device's kernels support
the tower."""

import logging
import os
from functools import lru_cache
from typing import get_args

import torch

from qwen_vit.common.arguments import check_choice, short_repr
from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError, CheckpointError, plural, with_options
from qwen_vit.kernels.attention import HEAD_DIMS
from qwen_vit.weight_format import SCALE_COLUMNS, Quantization, pixel_weight_exponent

__all__ = [
    "check_fits",
    "check_process",
    "choose_device",
    "choose_dtype",
    "choose_quantization",
    "warn_of_error",
    "warn_without_gpu",
]

logger = logging.getLogger("qwen_vit")

MIN_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)  # Ada: the first with matrix instructions for e4m3
WITHOUT_FP8 = with_options("leave {} out", "quantization")
USE_CPU = with_options("use {}", ("device", "cpu"))

_first_process: list[int] = []  # the id of the process that first loaded or used an encoder


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device with this name, with an index for a GPU. "auto" prefers a GPU."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = "cuda"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"device is {short_repr(device)}",
            expected="'auto', 'cpu', 'cuda' or a GPU such as 'cuda:1'",
        ) from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ArgumentError(
            f"device is {short_repr(device)}", expected="an NVIDIA GPU ('cuda') or 'cpu'"
        )
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"device is {device!r}, but torch {torch.__version__} finds no CUDA GPU",
            remedy=with_options(
                "install an NVIDIA driver and a CUDA build of torch, or use {}", ("device", "cpu")
            ),
        )
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(
            f"device is {device!r}, but torch finds {plural(torch.cuda.device_count(), 'GPU')}",
            remedy="count the GPUs from 0",
        )
    capability = torch.cuda.get_device_capability(chosen)
    if capability < MIN_CAPABILITY:
        raise ArgumentError(
            f"{torch.cuda.get_device_name(chosen)} has compute capability "
            f"{capability[0]}.{capability[1]}",
            expected="8.0 (Ampere) or newer",
            remedy=USE_CPU,
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    return torch.device("cuda", index)


def warn_without_gpu(device: str | torch.device) -> None:
    """Log a warning once if "auto" chooses a CPU.

    Call this function after all checks, so that no warning precedes an error.
    """
    if device == "auto" and not torch.cuda.is_available():
        _warn_once(
            "no CUDA GPU: computing on the CPU in float32, with the attention kernel "
            "interpreted (correct, but slow)"
        )


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the computation. "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = "float16" if dtype == "fp16" else dtype  # for the error below
    chosen = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype):
        raise ArgumentError(
            f"dtype is {short_repr(dtype)}", expected="'auto', 'bfloat16' or 'float32'"
        )
    pixel_weight_exponent(chosen)  # rejects float16 and other types with the reason
    if device.type == "cpu" and chosen != torch.float32:
        raise ArgumentError(
            f"dtype is {chosen} on a CPU",
            expected="float32",
            remedy=with_options("use {}, or a GPU", ("dtype", "float32")),
        )
    return chosen


def choose_quantization(
    quantization: str | None, device: torch.device, dtype: torch.dtype
) -> Quantization | None:
    """Check that the kernels support the quantization with this dtype on this device.

    >>> choose_quantization("int4", torch.device("cpu"), torch.float32)
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: quantization is 'int4'. Expected None or 'fp8'.
    """
    check_choice("quantization", quantization, (None, *get_args(Quantization)))
    if quantization is None:
        return None
    if device.type == "cpu":
        raise ArgumentError(
            "quantization is 'fp8' on a CPU, where it is less accurate and not faster",
            expected="an NVIDIA GPU of compute capability 8.9 (Ada) or newer",
            remedy=WITHOUT_FP8,
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ArgumentError(
            f"quantization is 'fp8', and {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}) has no matrix instructions for 8-bit floats",
            expected="compute capability 8.9 (Ada) or newer"
            + f", and bfloat16 instead of {dtype}" * (dtype != torch.bfloat16),
            remedy=WITHOUT_FP8,
        )
    if dtype != torch.bfloat16:
        raise ArgumentError(
            f"quantization is 'fp8' with dtype {dtype}",
            expected="bfloat16",
            remedy=with_options("use {}, or omit {}", ("dtype", "bfloat16"), "quantization"),
        )
    return "fp8"


def warn_of_error(quantization: Quantization | None) -> None:
    """Call this function after all checks, so that no warning precedes an error."""
    if quantization == "fp8":  # ledger row `fp8 error 2ef0047`
        _warn_once(
            "quantization 'fp8' is experimental: its error was 4.1 to 5.3 times Hugging Face's in "
            "bf16 at the worst block of random towers, tolerance 1.5; run qwen-vit compare with "
            "--quantization fp8 on your weights and images first"
        )


def check_fits(
    config: VisionConfig, device: torch.device, quantization: Quantization | None = None
) -> None:
    if quantization == "fp8" and config.hidden_size % SCALE_COLUMNS:
        raise CheckpointError(
            f"hidden_size is {config.hidden_size}",
            expected=f"a multiple of {SCALE_COLUMNS} for quantization 'fp8', whose scales apply "
            f"to {SCALE_COLUMNS} columns",
            remedy=WITHOUT_FP8,
        )
    fits = {kind: low <= config.head_dim <= high for kind, (low, high) in HEAD_DIMS.items()}
    if not fits[device.type]:
        low, high = HEAD_DIMS[device.type]
        raise CheckpointError(
            f"head_dim is {config.head_dim}",
            expected=f"{low} to {high} on {device}, which the attention kernel supports",
            remedy=USE_CPU if fits["cpu"] else "choose another checkpoint",
        )
    if device.type == "cuda" and config.patch_px % 2:
        raise CheckpointError(
            f"patch_size is {config.patch_px}",
            expected="an even number on a GPU, which loads rows of patches in pieces of 16 bytes",
            remedy=USE_CPU,
        )


def check_process(device: torch.device) -> None:
    """Raise ArgumentError in a forked process where torch would wait for threads that do not exist.

    A forked process lacks the OpenMP threads of its parent. With one thread, torch needs none.
    """
    if not _first_process:
        _first_process.append(os.getpid())
    elif _first_process[0] != os.getpid() and device.type == "cpu" and torch.get_num_threads() > 1:
        raise ArgumentError(
            "torch's threads do not work in this process, because it was forked from a process "
            "with an encoder",
            remedy="call torch.set_num_threads(1) in the new process, or start it with spawn",
        )


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)
