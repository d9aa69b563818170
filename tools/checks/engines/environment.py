"""Build an engine's virtual environment from a lock with hashes, and keep it for later runs."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from tools.common import ROOT

PYTHON = "3.11"  # a lock has hashes for one Python on Linux x86-64
STAMP = "complete.sha256"

# torchvision is compiled for a CUDA torch. With a CPU torch its import fails, because two operators
# are missing. This code defines their names, which no model here calls.
SITECUSTOMIZE = '''\
"""Name the two operators without which torchvision cannot be imported beside a CPU torch."""

from importlib.util import find_spec

if find_spec("torch") and find_spec("torchvision"):
    import torch

    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


class NoEnvironmentError(click.ClickException):
    """Report that this machine cannot build an engine's environment."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Recipe:
    """Define the contents of an engine's environment.

    Attributes:
        name: the engine, such as "vllm".
        lock: requirements with hashes, installed with --no-deps.
        torch: torch's version. The tool installs torch first and without a hash, because the build
            (for CUDA or for CPUs) depends on the package index.
        variables: environment variables of the engine's processes.
    """

    name: str
    lock: Path
    torch: str
    variables: dict[str, str]

    @property
    def digest(self) -> str:
        """Return a digest of the environment's whole contents."""
        parts = (PYTHON, self.torch, SITECUSTOMIZE, self.lock.read_text())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Environment:
    """Hold a complete environment: the folder, and the recipe."""

    folder: Path
    recipe: Recipe
    built_in_s: float  # 0 for an existing environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def variables(self, **more: str | None) -> dict[str, str]:
        """Return the variables of a process that imports this checkout; None unsets a variable."""
        own = {"PYTHONPATH": str(ROOT), "PATH": f"{self.python.parent}:{os.environ['PATH']}"}
        chosen = {**os.environ, **own, **self.recipe.variables, **more}
        return {name: value for name, value in chosen.items() if value is not None}


def default_folder(recipe: Recipe) -> Path:
    """Return the folder of an engine's environment, which depends on the lock."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "qwen_vit" / "engines" / f"{recipe.name}-{recipe.digest[:12]}"


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Return whether the environment in `folder` is complete and follows this recipe."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text().strip() == recipe.digest


def prepare(recipe: Recipe, folder: Path | None) -> Environment:
    """Build an engine's environment, or use a complete one.

    Raises:
        NoEnvironmentError: This machine cannot build the environment.
    """
    folder = (default_folder(recipe) if folder is None else folder).absolute()
    if is_complete(folder, recipe):
        click.echo(f"{recipe.name}: environment {folder} is complete", err=True)
        return Environment(folder, recipe, 0.0)
    base = _base_python()
    click.echo(f"{recipe.name}: building the environment {folder}; this takes minutes", err=True)
    started = time.perf_counter()
    python = folder / "bin" / "python"
    if not python.exists():
        _run([base, "-m", "venv", str(folder)], recipe, "a virtual environment")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    _run([*pip, f"torch=={recipe.torch}"], recipe, f"torch {recipe.torch}")
    _run([*pip, "--require-hashes", "-r", str(recipe.lock)], recipe, recipe.lock.name)
    (folder / "lib" / f"python{PYTHON}" / "site-packages" / "sitecustomize.py").write_text(
        SITECUSTOMIZE
    )
    (folder / STAMP).write_text(recipe.digest + "\n")
    took = time.perf_counter() - started
    click.echo(f"{recipe.name}: built in {took:.0f} s", err=True)
    return Environment(folder, recipe, took)


def _base_python() -> str:
    machine = f"{sys.platform} {os.uname().machine}"
    if machine != "linux x86_64":
        raise NoEnvironmentError(
            f"this machine is {machine}. The engines' locks are for linux x86_64 only."
        )
    if sys.version_info[:2] == tuple(map(int, PYTHON.split("."))):
        return sys.executable
    found = shutil.which(f"python{PYTHON}")
    if found is None:
        raise NoEnvironmentError(
            f"there is no python{PYTHON}, for which the engines' locks were made. Install it."
        )
    return found


def _run(command: list[str], recipe: Recipe, what: str) -> None:
    click.echo(f"{recipe.name}: installing {what}", err=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise NoEnvironmentError(
            f"{recipe.name}: {what} could not be installed by `{' '.join(command)}`:\n"
            + "\n".join(errors[-20:])
            + "\nCheck that a package index is reachable and that the disk has 4 GB free, and run "
            "the same command again."
        )
