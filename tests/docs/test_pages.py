"""Test that the blocks, commands and links of the README and the pages work.

Each Python block runs by itself, in a copy of the checkout's data. Each `qwen-vit` line of a shell
block runs too. For a model of the Hub, or with a trailing comment `# GPU`, the test only parses the
line.
"""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]
from PIL import Image

from qwen_vit.checkpoint.hub import REPOSITORY
from qwen_vit.cli import main as cli_module
from qwen_vit.encoder import VisionEncoder
from tests.support import IMAGES, ROOT
from tests.support.encoders import tiny
from tests.support.fake_engines import install_stand_ins
from tools.write_docs import LEDGER, PARTS, filled, path_to_docs

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAX_LINE = 86  # characters of a code line on the site, at 1280 px
KNOWN = {"cd", "eval", "export", "git", "pip", "python", "python3", "source", "zensical"}
OURS = re.compile(r"(\.venv/bin/)?(qwen-vit|python -m qwen_vit)\b")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the bodies of a page's fenced blocks in these languages."""
    text = page.read_text("utf-8")
    return [body for language, body in FENCE.findall(text) if language in languages]


PYTHON = [
    pytest.param(body, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, body in enumerate(blocks(page, "python", "py"))
]
COMMANDS = [
    (page, line.strip())
    for page in PAGES
    for body in blocks(page, "bash", "sh")
    for line in body.replace("\\\n", " ").splitlines()
    if line.strip() and not line.strip().startswith("#")
]
QWEN_VIT = sorted({OURS.sub("qwen-vit", line, count=1) for _, line in COMMANDS if OURS.match(line)})


# Python


def code_of(block: str) -> str:
    """Return a Python block without prompts."""
    return re.sub(r"^(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE) if ">>>" in block else block


@cache
def smaller(name: str) -> bytes:
    """Write a photograph at three fifths of its size, because the pages name its pixels."""
    with Image.open(IMAGES / name) as image:
        file = io.BytesIO()
        image.resize((image.width * 3 // 5, image.height * 3 // 5)).save(file, image.format)
        return file.getvalue()


def copy_data(folder: Path) -> None:
    """Copy the files that the pages name. Shrink the photographs, to save time."""
    shutil.copytree(ROOT / "tests" / "photographs", folder / "tests" / "photographs")
    for path in (folder / "tests" / "photographs").glob("*.[pj][np]g"):
        path.write_bytes(smaller(path.name))
    shutil.copytree(ROOT / "tests" / "videos", folder / "tests" / "videos")
    shutil.copytree(ROOT / "weights", folder / "weights")


@pytest.fixture
def in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", PYTHON)
def test_a_block_runs_by_itself(
    block: str, monkeypatch: pytest.MonkeyPatch, in_a_copy: Path
) -> None:
    """Fakes of tiny's width replace the published models, so that features and model match. The
    test does not compare printed output, because the comments show published shapes.
    """
    install_stand_ins(monkeypatch)
    real = VisionEncoder.from_pretrained

    def tiny_instead(model: str, **options: Any) -> VisionEncoder:
        return (
            real("tiny" if REPOSITORY.fullmatch(model) else model, **options) if options else tiny()
        )

    monkeypatch.setattr(VisionEncoder, "from_pretrained", tiny_instead)
    exec(compile(code_of(block), "a block", "exec"), {"__name__": "page"})


def test_the_lines_of_a_block_fit_the_site() -> None:
    long = [
        (name_of(page), line)
        for page in PAGES[1:]
        for block in blocks(page, "python", "py")
        for line in block.splitlines()
        if len(line) > MAX_LINE
    ]
    assert long == []


def test_no_block_hands_features_of_tiny_to_a_language_model() -> None:
    for page in PAGES:
        for block in blocks(page, "python", "py"):
            has_language_model = re.search(
                r"AutoTokenizer|ForConditionalGeneration|LLM|Engine", block
            )
            assert not (has_language_model and '"tiny"' in block), name_of(page)


@pytest.mark.slow
def test_the_blocks_pass_mypy_strict(tmp_path: Path) -> None:
    """Check each block as a separate module, as in a reader's typed program."""
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python", "py")):
            name = re.sub(r"\W", "_", f"{name_of(page)}_{number}".lower())
            (tmp_path / f"{name}.py").write_text(code_of(block), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", tmp_path],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# Commands


def only_parsed(line: str) -> bool:
    words = shlex.split(line, comments=True)
    from_hub = any(REPOSITORY.fullmatch(word) and not (ROOT / word).exists() for word in words)
    needs_an_export = "--resume" in words  # tests/export/test_growth.py runs this line
    return from_hub or needs_an_export or bool(re.search(r"#.*\bGPU\b", line))


def words_of(line: str) -> list[str]:
    """Return the arguments, with file patterns expanded like in a shell in the root of the
    checkout."""
    expanded = []
    for word in shlex.split(line, comments=True)[1:]:
        found = (
            sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(word)) if "*" in word else []
        )
        expanded += found or [word]
    return expanded


TINY_OUT = ("--model", "tiny", "--out", "features.safetensors")


def with_marks(line: str) -> Any:
    """Mark slow lines: Ray, and comparisons with a page or a golden file, take seconds."""
    is_slow = "--ray" in line or "--report" in line or "golden" in line
    return pytest.param(line, marks=pytest.mark.slow) if is_slow else line


@pytest.mark.parametrize("line", [*map(with_marks, QWEN_VIT)])
def test_a_command_works(
    line: str, monkeypatch: pytest.MonkeyPatch, in_a_copy: Path, qwen_vit: Any
) -> None:
    arguments = words_of(line)
    if only_parsed(line):
        # click keeps the help option of a command's first context, and only the group defines -h.
        root = click.Context(cli_module.cli, **cli_module.cli.context_settings)
        command = cli_module.cli.get_command(root, arguments[0])
        assert command is not None
        command.make_context(arguments[0], arguments[1:], parent=root)
        return
    name = "features.safetensors"
    if name in arguments and arguments[arguments.index(name) - 1] != "--out":  # an input
        made = qwen_vit("encode", "tests/photographs/rocket.jpg", *TINY_OUT)
        assert made.code == 0, made.err
    if "--golden" in arguments:  # the line above saves the golden file
        golden = arguments[arguments.index("--golden") + 1]
        image = "tests/photographs/chelsea.png"
        made = qwen_vit("compare", image, "--model", "tiny", "--save-golden", golden)
        assert made.code == 0, made.err
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for child processes
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not the cluster of another test
    done = qwen_vit(*arguments)
    assert done.code == 0, done.err


def test_the_readmes_command_line_runs_on_a_laptop() -> None:
    """The block once ended with `bench`, which fails without a GPU."""
    _, section = README.read_text("utf-8").split("\n## Command line\n")
    [lines] = [body for _, body in FENCE.findall(section.split("\n## ")[0])]
    for line in lines.splitlines():
        assert "bench" not in line
        assert not only_parsed(line), line


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS}))
def test_a_program_exists(line: str) -> None:
    program = shlex.split(line, comments=True)[0]
    if program.startswith("./"):
        path = ROOT / program
        assert path.is_file(), f"{program} does not exist"
        assert os.access(path, os.X_OK), f"{program} cannot be run"
    else:
        assert program.removeprefix(".venv/bin/") in {*KNOWN, "qwen-vit"}, f"unknown: {line}"


# The site


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_local_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))

    def pages(entry: Any, title: str = "") -> list[tuple[str, str]]:
        if isinstance(entry, str):
            return [(title, entry)]
        children = [("", each) for each in entry] if isinstance(entry, list) else entry.items()
        return [page for name, child in children for page in pages(child, name)]

    titles, listed = zip(*pages(config["nav"]), strict=True)
    named = [title for title in titles if title]
    assert len({*named}) == len(named), "two pages with one name"
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page != README)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # mkdocs needs a real folder below mkdocs.yml
    for name in ("qwen_vit", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "griffe:" not in output, output
    assert (tmp_path / "site" / "api" / "encoder.html").is_file()
    assert "&gt;&gt;&gt; encoder" not in (tmp_path / "site" / "api" / "encoder.html").read_text()


# Figures


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->")
    assert filled(text, path_to_docs(page)) == text, "stale: run python -m tools.write_docs"


def test_every_generated_part_is_shown() -> None:
    shown = {
        name
        for page in PAGES
        for name in re.findall(r"<!-- generated: ([a-z ]+) -->", page.read_text())
    }
    assert shown == {*PARTS}


@cache
def ledger_names() -> set[str]:
    rows = map(json.loads, LEDGER.read_text("utf-8").splitlines())
    return {f"{row['what']} {row['commit']}" for row in rows}


# `tower 0ce6c52` names a benchmark and a commit.
REFERENCE = re.compile(r"`([a-z][a-z0-9 -]* [0-9a-f]{7})`")
# Measured figures: times, rates, ratios to another program, distances.
MEASURED = re.compile(
    r"\d ?(?:ms|us|s|images/s|TFLOP/s|[GT]B/s|x roofline)\b"
    r"|\d times (?:as|Hugging)|\d\.\d+e-\d|\(\d[\d.]*x\)"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_ledger_row_that_is_named_exists(page: Path) -> None:
    assert {*REFERENCE.findall(page.read_text("utf-8"))} <= ledger_names()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "decisions" not in page.parts], ids=name_of
)
def test_every_measured_figure_names_its_row(page: Path) -> None:
    """A section is the text between two headings. A page of decisions names its setting once."""
    text = FENCE.sub("", page.read_text("utf-8"))
    starts = [0, *(match.start() for match in re.finditer(r"^#+ ", text, re.MULTILINE)), len(text)]
    bare = [
        text[begin : begin + 60]
        for begin, end in pairwise(starts)
        if MEASURED.search(text[begin:end]) and not REFERENCE.search(text[begin:end])
    ]
    assert bare == []


def test_measured_figures_are_found() -> None:
    for text in ("3.19 ms", "93 images/s", "is 8 to 14 times as fast", "1.68e-3", "41 (12.9x)"):
        assert MEASURED.search(text), text
    assert not MEASURED.search("28 x 28 pixels, 512 images, 1.4 GB, 8 seeds")


# Docstrings of public names, which the site shows as pages


def test_a_public_docstring_names_its_arguments_one_by_one() -> None:
    """`Args:` with two names before a colon has no type on the site."""
    grouped = []
    for path in (ROOT / "qwen_vit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node) or ""
                for part in re.findall(r"^(?:Args|Attributes):\n((?: .*\n?)+)", text, re.MULTILINE):
                    grouped += [
                        f"{path.name}: {node.name}: {names}"
                        for names in re.findall(r"^    (\w+(?:, \w+)+):", part, re.MULTILINE)
                    ]
    assert grouped == []
