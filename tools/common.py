"""Provide the tools' shared functions: checkout, machine, and rows of the ledger."""

import datetime as dt
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

ROOT = Path(__file__).resolve().parent.parent  # the checkout
Command = TypeVar("Command", bound=Callable[..., Any])


def head_commit() -> str:
    """Return the checkout's abbreviated commit, or "unknown" outside a checkout."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def ledger_options(command: Command) -> Command:
    """Give a command the options `--ledger FILE` and `--commit HASH`."""
    ledger = click.option(
        "--ledger", type=click.Path(path_type=Path), help="Append the JSON line to this file."
    )
    commit = click.option(
        "--commit", default=head_commit, help="Set the commit of the ledger row.  [default: HEAD]"
    )
    return ledger(commit(command))


def require_gpu(hint: str = "") -> torch.device:
    """Return the first GPU.

    Raises:
        click.ClickException: torch finds no GPU. The message ends with `hint`.
    """
    if not torch.cuda.is_available():
        raise click.ClickException(f"this needs an NVIDIA GPU: torch finds none{hint}")
    return torch.device("cuda", 0)


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is no GPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def ledger_row(
    what: str, commit: str, device: torch.device | str, packages: tuple[str, ...], **figures: Any
) -> dict[str, Any]:
    """Return a row with benchmark, date, commit, machine and versions, then `figures`."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "what": what,
        "date": dt.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # includes the CUDA version
            **{package: version(package) for package in packages},
        },
        **figures,
    }


def append_row(row: dict[str, Any], ledger: Path | None) -> None:
    """Append a row to the ledger, if the caller names one."""
    if ledger is not None:
        with open(ledger, "a") as file:
            file.write(json.dumps(row) + "\n")


def publish(row: dict[str, Any], ledger: Path | None) -> None:
    """Print a row as one JSON line, and append it to the ledger, if the caller names one."""
    print(json.dumps(row), flush=True)
    append_row(row, ledger)


def four_digits(value: float) -> float:
    """Round a number as the ledger's rows do.

    >>> four_digits(3.14159)
    3.142
    """
    return float(f"{value:.4g}")
