"""Test that errors spell options as `max_pixels` in Python and as `--max-pixels` in a shell."""

import ast
import logging
import pickle
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from qwen_vit.cli.main import COMMANDS, cli
from qwen_vit.errors import ExportError, ImageError, Wording, with_options
from tests.support import ROOT

OPTIONS = [
    option
    for name in COMMANDS
    for option in cli.get_command(click.Context(cli), name).params  # type: ignore[union-attr]
    if isinstance(option, click.Option)
]
FLAGS = {flag for option in OPTIONS for flag in option.opts}
NAMES = {flag[2:].replace("-", "_") for flag in FLAGS if flag.startswith("--")}
FLAG = re.compile(r"--[a-z][a-z-]*[a-z]")
# A name with an underscore is an option, and so is `fps=`.
OPTION = re.compile(r"(?<![.\w])(?:[a-z]+_[a-z_]+|[a-z]+(?==))")
SPELLED = ("with_options", "Wording", "_wrong")
# These modules have readers in Python only, or in a shell only.
ONE_READER = ("cli/", "integrations/", "benchmark.py", "encoder.py", "loaded_tower.py")
KEYS = ("config.py", "export/settings.py")  # their errors name keys of JSON files


@cache
def nodes() -> list[tuple[str, ast.Call | ast.Assign]]:
    """Yield every call and assignment of the package, with its place."""
    return [
        (f"{path.relative_to(ROOT / 'qwen_vit')}:{node.lineno}", node)
        for path in sorted((ROOT / "qwen_vit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call | ast.Assign)
    ]


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for where, node in nodes():
        if isinstance(node, ast.Call) and re.fullmatch(
            name, getattr(node.func, "id", getattr(node.func, "attr", ""))
        ):
            yield where, node


def assigned() -> Iterator[tuple[str, ast.Assign]]:
    """Return the texts that errors get by a name, such as `remedy = ...` and `USE_CPU = ...`."""
    for where, node in nodes():
        if isinstance(node, ast.Assign) and any(
            re.fullmatch(r"fact|expected|remed\w+|ways|[A-Z_]+", getattr(name, "id", ""))
            for target in node.targets
            for name in ast.walk(target)
        ):
            yield where, node


def literals(node: ast.AST) -> Iterator[str]:
    """Yield the strings in a node, without calls that spell options for both readers."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SPELLED:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"`[^`]*`|\(qwen-vit [^)]*\)", "", node.value)  # a command is shell text
    for child in ast.iter_child_nodes(node):
        yield from literals(child)


def unspelled(call: ast.Call) -> set[str]:
    """Return the options that an error or a log line spells for only one reader."""
    shown = [*call.args, *(k.value for k in call.keywords if k.arg in ("expected", "remedy"))]
    texts = [text for node in shown for text in literals(node)]
    return {
        found
        for text in texts
        for found in (*FLAG.findall(text), *OPTION.findall(text))
        if found in FLAGS or found in NAMES
    }


def test_every_error_spells_options_for_both_readers() -> None:
    one_sided = {
        where: found
        for where, call in calls(r"\w+Error|of|warning")
        if not where.startswith((*ONE_READER, *KEYS)) and (found := unspelled(call))
    }
    assert one_sided == {}
    for where, node in assigned():
        texts = [text for text in literals(node.value) if " " in text]  # a single word is a key
        found = {each for text in texts for each in (*FLAG.findall(text), *OPTION.findall(text))}
        assert not found & (FLAGS | NAMES) or where.startswith((*ONE_READER, *KEYS)), where


def test_every_flag_that_an_error_names_exists() -> None:
    for where, call in calls("Wording|_wrong"):
        flags = FLAG.findall(ast.unparse(call))
        assert {*flags} <= FLAGS, where
    for where, call in calls("with_options"):
        for node in call.args[1:]:
            first = node.elts[0] if isinstance(node, ast.Tuple) else node
            if isinstance(first, ast.Constant):
                assert first.value in NAMES, where


def test_one_sided_texts_are_found() -> None:
    for text, found in (
        ("E('lower max_pixels')", {"max_pixels"}), ("E(f'pass --out {x}')", {"--out"}),
        ("E('pass fps=', name='--out')", {"fps"}), ("E('run `qwen-vit export --out a`')", set()),
        ("E(with_options('{} is 3', 'max_pixels'), remedy='the output')", set()),
    ):  # fmt: skip
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert unspelled(call) == found, text


def test_words_survive_pickling_copies_and_sums() -> None:
    remedy = "wait, or " + with_options("lower {}", "max_pixels") + ", or stop"
    error = ExportError.of(pickle.loads(pickle.dumps(ImageError("too large", remedy=remedy))))
    assert str(error) == "too large. Wait, or lower max_pixels, or stop."
    assert error.text(in_shell=True) == "too large. Wait, or lower --max-pixels, or stop."
    assert Wording.joined("; ", ["a", remedy]).shell.startswith("a; wait, or lower --max-pixels")
    assert isinstance(error.remedy, Wording)
    assert error.remedy.options == Wording.joined("; ", ["a", remedy]).options == ("max_pixels",)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--device", "cuda"), "or use --device cpu."),
        (("--dtype", "bf16"), "Use --dtype float32, or a GPU."),
        (("--max-pixels", "10"), "Pass other --min-pixels or --max-pixels."),
        (("--layers", "99"), "--layers contains 99."),
        (("--normalize",), "--normalize requires --output mean"),
        (("--fps", "-1"), "--fps is -1.0."),
        (("--n-frames", "1"), "--n-frames is 1."),
        (("--n-frames", "4", "--fps", "2"), "--n-frames works only without --fps. Omit"),
        (("--max-frames", "9", "--n-frames", "4"), "--n-frames works only without --max-frames."),
        (("--allow-failed", "1", "--on-error", "raise"), "--allow-failed works only with --on-err"),
        (("--on-error", "raise", "--allow-failed", "1"), "--allow-failed works only with --on-err"),
        (("--max-frame-pixels", "0"), "--max-frame-pixels is 0."),
        (("--start", "3", "--end", "2"), "--start is 3.0 s and --end 2.0 s."),
        (("--id-column", "id"), "Pass --column as well."),
        (("--revision", "main"), "Omit --revision"),
        (("--formats", "png"), "--formats has PNG."),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_shell_reads_flags(
    words: tuple[str, ...], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    qwen_vit: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save("a.png")
    done = qwen_vit("encode", "a.png", "--model", "tiny", "--out", "a.safetensors", *words)
    assert done.code == 2
    assert error in done.err, done.err


def test_log_lines_name_flags_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen_vit: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save("a.ppm")
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save("b.png")
    Path("a.ppm").rename("a.png")
    done = qwen_vit("export", "a.png", "b.png", "--model", "tiny", "--out", "out")
    assert "skipped: a.png: " in done.err
    assert "or pass --formats ppm" in done.err, done.err
    again = qwen_vit("encode", "a.png", "b.png", "--model", "tiny", "--out", "f.safetensors")
    assert "or pass --formats ppm" in again.err


@pytest.mark.parametrize("command", ["show", "compare"])
def test_an_error_names_the_commands_that_have_its_flag(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen_vit: Any
) -> None:
    """`show` once recommended its own --formats, which does not exist. The remedy for an address
    named `encode` alone, also when `export` printed the remedy."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save("a.ppm")
    Path("a.ppm").rename("a.png")
    Path("list.txt").write_text("https://example.org/a.png\n")
    Path("a.parquet").write_bytes(b"PAR1")
    owners = " to `qwen-vit encode` or `qwen-vit export`."
    inputs = {
        "a.png": "--formats ppm", "https://example.org/a.png": "--allow-urls",
        **({"list.txt": "--allow-urls", "a.parquet": "--column"} if command == "show" else {}),
    }  # fmt: skip
    for given, flag in inputs.items():
        done = qwen_vit(command, given, "--model", "tiny")
        assert done.code == 2
        assert re.search(re.escape(flag) + "( HOST)?" + owners, done.err), done.err


def test_python_reads_its_own_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qwen_vit"):
        logging.getLogger("qwen_vit").warning("lower %s", with_options("{}", "max_pixels"))
    assert str(ImageError("large", remedy=with_options("lower {}", "fps"))) == "large. Lower fps."
