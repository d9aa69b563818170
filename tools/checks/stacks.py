"""Run a quick part of the tests with older and newer versions of the dependencies.

\b
    python -m tools.checks.stacks --list
    python -m tools.checks.stacks --run newest --ledger tools/benchmarks/ledger.jsonl

Each stack has its own environment (by default under build/stacks). The environment adds the stack's
packages to the packages of the current environment. It keeps torch, which has 2 GB with CUDA, and
whose CPU builds are not on PyPI. It installs packages without their dependencies, because torch
pins Triton. It prints one JSON line, and exits with 1 if a test fails.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import click
from click import ClickException

from tools.common import ROOT, ledger_options, ledger_row, publish

# The packages of each stack, as arguments of pip. `oldest` has the minimum versions of pyproject
# with the extra `hf`, whose transformers requires safetensors 0.8.
STACKS = {
    "tested": (),
    "oldest": (
        "click==8.2.1", "einops==0.8.0", "huggingface_hub==1.31.0", "numpy==1.26.4",
        "packaging==23.2", "simplejpeg==1.8.2", "tqdm==4.66.6", "transformers==5.18.0",
        "triton==3.6.0", "httpx==0.28.1", "httpcore==1.0.9",  # huggingface_hub needs these two
    ),
    "triton 3.8": ("triton==3.8.0",),
    "newest": ("triton==3.9.0", "transformers==5.24.0"),
}  # fmt: skip
NAMED = ("triton", "transformers", "huggingface_hub", "pillow", "numpy", "safetensors")
ATTENTION = "tests/kernels/test_compile_attention.py::test_"
TESTS = (
    "tests/kernels/test_interpret.py",
    f"{ATTENTION}attention_compiles_to_sound_code[80-16-window]",
    f"{ATTENTION}attention_compiles_to_sound_code[80-16-full]",
    f"{ATTENTION}attention_in_bf16_spends_no_multiplication_on_padding",
    f"{ATTENTION}the_attention_in_windows_on_hopper_compiles_to_sound_code",
    f"{ATTENTION}the_specialised_attention_compiles_to_sound_code",
    "tests/kernels/test_compile_linear.py::test_a_specialised_product_compiles_to_sound_code",
    "tests/kernels/test_compile_gpus.py",
    "tests/kernels/test_launch.py",
    "tests/test_tiny.py",
    "tests/compare/test_huggingface.py",
    "tests/checkpoint/test_ranges.py",
    "tests/encoder/test_rows.py",
)


def make_environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """Install missing packages, and return the environment's Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, symlinks=True)
        below = sysconfig.get_paths()["purelib"]  # provides what the stack lacks
        [own] = folder.glob("lib/python*/site-packages")
        (own / "below.pth").write_text(f"{below}\n")
    if packages:
        install = [str(python), "-m", "pip", "install", "-q", "--no-deps", *packages]
        if subprocess.run(install, check=False).returncode:
            raise ClickException(f"pip could not install {' '.join(packages)}; see above")
    return python


def run_tests(python: Path, tests: tuple[str, ...]) -> tuple[dict[str, int], float, list[str]]:
    """Return counts by outcome, seconds, and the names of failed tests."""
    command = [
        str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow",
        "-rfE", *tests,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    seconds = re.search(r" in ([\d.]+)s", last)
    if not counts or seconds is None:
        raise ClickException("pytest ended without counts; see above")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return counts, float(seconds[1]), failed


def versions(python: Path) -> dict[str, str]:
    code = f"from importlib.metadata import version as v; print(*[v(n) for n in {NAMED}])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(NAMED, done.stdout.split(), strict=True))


@click.command(help=__doc__)
@click.option("--list", "only_list", is_flag=True, help="Print the stacks and end.")
@click.option("--run", "name", type=click.Choice(list(STACKS)), help="Test this stack.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "build" / "stacks")
@click.argument("tests", nargs=-1)
@ledger_options
def main(
    only_list: bool, name: str | None, folder: Path, tests: tuple[str, ...], commit: str,
    ledger: Path | None,
) -> None:  # fmt: skip
    """Make the environment, run the tests, and print the results."""
    if only_list or name is None:
        for stack, packages in STACKS.items():
            click.echo(f"{stack}: {' '.join(packages) or 'this environment'}")
        return
    python = Path(sys.executable)
    if STACKS[name]:
        python = make_environment(folder.resolve() / name.replace(" ", "-"), STACKS[name])
    counts, seconds, failed = run_tests(python, tests or TESTS)
    row = ledger_row(
        "stack", commit, "cpu", (), stack=name, with_packages=versions(python), tests=counts,
        seconds=seconds, failed=failed,
    )  # fmt: skip
    publish(row, ledger)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
