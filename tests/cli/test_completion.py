"""Test that shell completion finds commands, options and checkpoint names in a short time."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

RUN = "import sys; sys.argv[0] = 'qwen-vit'; from qwen_vit.__main__ import main; main()"


def completed(words: str, **environment: str) -> tuple[list[str], float, str]:
    """Return the completions for a line that ends in the middle of a word, and the CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", RUN],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "_QWEN_VIT_COMPLETE": "bash_complete",
            "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), **environment,
        },
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines(), spent, done.stderr


@pytest.mark.parametrize(
    "words",
    ["qwen-vit encode a.png --model Qwen/Qwen2.5-VL-7", "qwen-vit info Qwen/Qwen2.5-VL-7"],
)
def test_a_checkpoint_is_completed_at_once(words: str) -> None:
    found, seconds, imported = completed(words)
    print(f"{seconds:.2f} s")
    assert "plain,Qwen/Qwen2.5-VL-7B-Instruct" in found
    assert not any("tiny" in line for line in found)
    for name in ("torch", "numpy", "PIL", "huggingface_hub"):
        assert not re.search(rf"\| +{name}$", imported, re.MULTILINE)
    assert seconds < 0.6


def test_cached_checkpoints_are_completed(tmp_path: Path) -> None:
    for name in ("models--me--my-tower", "models--other--x", "datasets--me--d", "models--odd"):
        (tmp_path / name).mkdir()
    found, _, _ = completed("qwen-vit info me/", HF_HUB_CACHE=str(tmp_path))
    assert found == ["file,me/", "plain,me/my-tower"]
    assert not any("other" in line or "odd" in line for line in found)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_shows_the_names_of_models(tmp_path: Path) -> None:
    """bash's function drops the items before an item of the type `dir` or `file`."""
    command = tmp_path / "qwen-vit"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{RUN}" "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(_QWEN_VIT_COMPLETE=bash_source qwen-vit)"
        compopt() { :; }
        for words in "qwen-vit info ti" "qwen-vit encode --model Qwen/Qwen2.5-VL-7" "qwen-vit ver"
        do
            COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            _qwen_vit_completion qwen-vit
            echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    tiny, models, verify = done.stdout.splitlines()
    assert (tiny, verify) == ("tiny", "verify")
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in models.split()


def test_commands_and_options_are_completed() -> None:
    assert completed("qwen-vit ver")[0] == ["plain,verify"]
    assert "plain,--point" in completed("qwen-vit show --po")[0]


def test_help_explains_how_to_enable_completion(run: Any) -> None:
    words, page = run("--help").out, (ROOT / "docs" / "install.md").read_text("utf-8")
    for line in (
        'eval "$(_QWEN_VIT_COMPLETE=bash_source qwen-vit)"',
        "_QWEN_VIT_COMPLETE=fish_source qwen-vit | source",
    ):
        assert line in words
        assert line in page  # a page once had `source <(...)`
