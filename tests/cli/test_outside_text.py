"""Test that text from outside, such as a file name, never moves a terminal's cursor."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vit.cli import console
from qwen_vit.cli.text import facts_text
from qwen_vit.errors import ExportError, ImageError, QwenVitError, one_line

ODD = "a\x1b]0;owned\x07\n\x1b[2Jerror: \u202edisk\r\x9bfull\udcff"


@given(st.text(), st.text(), st.text(), st.text())
def test_every_error_is_one_printable_line(fact: str, name: str, want: str, remedy: str) -> None:
    error = QwenVitError(fact, name=name, expected=want, remedy=remedy)
    assert str(error).isprintable()
    assert repr(error).isprintable()
    assert ImageError.of(error, code="damaged").fact == fact  # only the display is escaped


@given(st.text())
def test_escaping_keeps_printable_text_and_is_idempotent(text: str) -> None:
    assert one_line(text).isprintable()
    assert one_line(one_line(text)) == one_line(text)
    assert not text.isprintable() or one_line(text) == text


def test_every_log_line_is_escaped(caplog: pytest.LogCaptureFixture) -> None:
    """The filter belongs to the logger that all modules share."""
    with caplog.at_level(logging.INFO, "qwen_vit"):
        logging.getLogger("qwen_vit").info("%s fetches 100%% of %r", ODD, 7)
        logging.getLogger("qwen_vit").warning(ODD)
    assert len(caplog.records) == 2
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "100% of 7" in caplog.records[0].getMessage()


def test_lines_of_output_are_escaped_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_data(f"one\n{ODD[:9]}")
    console.print_log(ODD)
    console.print_error(str(ExportError(ODD)))
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "one"
    for line in (captured.out + captured.err).split("\n"):
        assert line.isprintable()
    assert len(captured.err.splitlines()) == 2


def test_facts_of_a_model_card_stay_on_their_line() -> None:
    text = facts_text({"licence": ODD, "model": "tiny"})
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text


@pytest.mark.parametrize("command", ["encode", "export"])
def test_a_file_name_with_escape_codes_is_shown_escaped(
    command: str, tmp_path: Path, qwen_vit: Any
) -> None:
    path = tmp_path / "p" / "a\x1b]0;owned\x07\n\x1b[2Jerror: disk full.png"
    path.parent.mkdir()
    Image.new("RGB", (900, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(path)
    done = qwen_vit(command, path.parent, "--model", "tiny", "--out", tmp_path / "out", "-v")
    assert done.code in (1, 2)
    assert "ratio of 450" in done.out + done.err or command == "export"
    assert "\x1b" not in done.out + done.err
    assert "\x07" not in done.out + done.err
