"""Test that the error for an input of another kind names this kind."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.inputs import write_tar

ENCODE = ("encode", "--model", "tiny", "--out", "f.safetensors")


@pytest.mark.parametrize("command", [("info",), ("verify",), ("show",), (*ENCODE,)])
def test_an_encoder_cache_is_named(folder: Path, run: Any, command: tuple[str, ...]) -> None:
    Path("cache/index").mkdir(parents=True)
    Path("cache/qwen_vit.json").write_text("{}")
    done = run(*command, "cache")
    assert done.code == 2
    assert "cache: an encoder cache of vLLM." in done.err
    assert "Open it in Python with read_ec_cache." in done.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "a ZIP archive, not an image."),
        ("a.csv", "a CSV table, not an image."),
        ("t.tar", "Unpack the tars that are inside a tar."),
    ],
)
def test_other_files_are_named(folder: Path, run: Any, name: str, words: str) -> None:
    write_tar(name, {"inner.tar": b"no image"})
    assert words in run(*ENCODE, name).err


def test_an_empty_value_of_layers_is_an_error(folder: Path, run: Any) -> None:
    assert "--layers is ''" in run(*ENCODE, "a.png", "--layers", "").err
