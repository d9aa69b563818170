"""Test the start of the command: fast help and usage errors, imports, interrupts."""

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from qwen_vit import __version__
from qwen_vit.cli import main as cli_module
from qwen_vit.cli.main import cli
from qwen_vit.cli.sections import SECTION_OF, SECTIONS
from tests.support import ROOT

# Starting


def test_no_argument_at_all_is_a_request_for_help(run: Any) -> None:
    """Newer versions of click raise the help as an error, which the command printed on one line."""
    bare, explicit = run(), run("--help")
    assert bare == explicit
    assert bare.code == 0
    assert "\nCommands:\n" in bare.out


@pytest.mark.parametrize("command", ["encode", "info", "export", "verify"])
def test_a_deleted_folder_is_an_error_and_help_works(command: str, tmp_path: Path) -> None:
    arguments = {
        "encode": "/a.png --model tiny --out /b.safetensors", "info": "tiny",
        "export": "/a --model tiny --out /b", "verify": "tiny",
    }  # fmt: skip
    (tmp_path / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd()); from qwen_vit.__main__ import main; main()"
    for options, expected in (
        (
            arguments[command],
            (2, "error: the current folder was deleted. Change to another folder.\n"),
        ),
        ("--help", (0, "")),
    ):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code, command, *options.split()], capture_output=True, text=True,
            cwd=tmp_path / "gone", env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == expected


STARTED = """
import sys
from qwen_vit.__main__ import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
slow = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "transformers", "triton"}
sys.stderr.write(f"\\n{code or 0} {sorted(slow & set(sys.modules))}")
"""


def cpu_seconds(*arguments: str) -> tuple[float, str]:
    """Return the user and system time of a Python process, as the minimum of three runs, and its
    stderr."""
    least, stderr = float("inf"), ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least, stderr = min(least, spent), done.stderr
    return least, stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *((([name, "--help"], 0)) for name in cli_module.COMMANDS),
        (["encod"], 2),
        (["--hepl"], 2),
        (["encode", "a.png", "--modle", "tiny"], 2),
        (["compare", "a.png", "--model", "tiny", "--attention", "fast"], 2),
        (["bench", "--model", "tiny", "--workload", "2 x 448^2"], 2),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_help_and_typos_are_fast(arguments: list[str], code: int) -> None:
    """Usage errors once took 1.8 s, almost all of it for the import of torch."""
    seconds, stderr = cpu_seconds("-c", STARTED, *arguments)
    print(f"{seconds:.3f} s")
    assert stderr.splitlines()[-1] == f"{code} []"
    assert seconds < 0.4


def test_importing_the_package_takes_no_time() -> None:
    seconds, _ = cpu_seconds("-c", "import qwen_vit")
    print(f"{seconds:.3f} s")
    assert seconds < 0.1


def test_the_error_for_a_typo_suggests_similar_commands(run: Any) -> None:
    """The suggestions include commands that are not imported yet."""
    done = run("encod")
    assert (done.code, done.out) == (2, "")
    assert "No such command 'encod'" in done.err
    assert "Did you mean encode?" in done.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import no_such_package",
            "No module named 'no_such_package'. Install the package into this Python: ",
        ),
        ("raise ImportError('torch is half there; install it again')", "torch is half there; "),
    ],
)
def test_a_package_that_does_not_import_is_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "torch.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "qwen_vit", "info", "tiny"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


# encode

WARNED = """
import logging, sys
import huggingface_hub.utils.logging
from qwen_vit.cli import main as cli
sys.argv = ["qwen-vit", "--version"]
cli.main()
for name in ("huggingface_hub.utils", "qwen_vit", "another"):
    logging.getLogger(name).warning(name)
"""


def test_every_library_warns_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARNED], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "huggingface_hub.utils\nqwen_vit\nanother\n")


INTERRUPTED_TORCH = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except BaseException:  # as numpy takes it for a part that is missing, and goes on
    pass
"""


@pytest.fixture
def default_interrupts() -> Iterator[None]:
    """Processes that a shell starts with `&` ignore interrupts, and so would their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
def test_an_interrupt_while_torch_is_imported_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)  # as Ctrl-C during the import
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["qwen-vit"].partition(":")
    # the code of the script that pip installs
    installed = f"import sys; from {module} import {function}; sys.exit({function}())"
    for command in (["-m", "qwen_vit", "info", "tiny"], ["-c", installed, "info", "tiny"]):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


INTERRUPTED_IMPORT = """
import os, signal, sys
at = sys.argv.pop(1)

class Interrupter:
    def find_spec(self, name, *_):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
from qwen_vit.__main__ import main
sys.exit(main())
"""


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize(
    "module",
    ["qwen_vit.cli.imports", "qwen_vit.errors", "qwen_vit.cli.main", "click", "qwen_vit.cli.info"],
)
def test_an_interrupt_in_the_first_imports_ends_with_130(module: str) -> None:
    """Ctrl-C in the first 0.15 s once printed a traceback, and the exit code was -2."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, "info", "tiny"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


INTERRUPTED_EXIT = """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from qwen_vit.__main__ import main
main()
"""


@pytest.mark.usefixtures("default_interrupts")
@pytest.mark.parametrize("arguments", [["info", "tiny", "--json"], ["--version"], ["encod"]])
def test_an_interrupt_after_the_result_ends_with_130(arguments: list[str]) -> None:
    """Torch needs 0.1 s or more to exit. Ctrl-C there once printed a traceback, and the exit code
    was 0."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_EXIT, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    complete = subprocess.run(
        [sys.executable, "-m", "qwen_vit", *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (complete.stdout, f"{complete.stderr}interrupted\n")
    assert done.returncode == 130


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], *([name, "--help"] for name in cli_module.COMMANDS)]
)
def test_help_shows_examples_that_parse(run: Any, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.code, done.err) == (0, "")
    lines = [line for line in done.out.splitlines() if line.startswith("  qwen-vit ")]
    assert len(lines) >= 2
    for _, name, *rest in map(shlex.split, lines):
        command = cli_module.cli.get_command(click.Context(cli_module.cli), name)
        assert command is not None
        # An unknown option raises. click keeps the help option that it creates first.
        context = command.make_context(name, rest, help_option_names=["-h", "--help"])
        given = context.params
        assert given["model"] or given["inputs"] or given["resume"]


def test_version_is_the_packages(run: Any) -> None:
    done = run("--version")
    assert (done.code, done.out) == (0, f"qwen-vit, version {__version__}\n")


def test_the_help_divides_the_options_into_sections(run: Any) -> None:
    """`export --help` once listed 52 options in one list."""
    text = run("export", "--help").out
    own, *sections = text.split("\n\nOptions:\n")[1].split("\n\n")
    assert [section.partition(":\n")[0] for section in sections] == list(SECTIONS)
    assert own.count("\n  --") < 20
    printed = re.findall(r"(?m)^  (?:-., )?(--[a-z-]+)", text)
    command = cli.get_command(click.Context(cli), "export")
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert sorted(printed) == sorted([option.opts[-1] for option in options] + ["--help"])


def test_every_option_of_a_section_belongs_to_a_command() -> None:
    options = {
        option.opts[-1]
        for name in cli.commands
        if (command := cli.get_command(click.Context(cli), name)) is not None
        for option in command.params
    }
    assert set(SECTION_OF) - options == {"--help"}
