"""Test that docs, help and messages contain no banned word and no long sentence."""

import re
from functools import cache

import pytest
from click.testing import CliRunner

from tools.draw_sentences import (
    Sentence,
    docstring_sentences,
    help_sentences,
    main,
    message_sentences,
    page_sentences,
    sentences_of,
)

# Words of translated English, which replace the name of an actor or a mechanism.
BANNED = re.compile(
    r"\b(?:told|tells|said|says that it|lies|meanwhile|whoever|nobody|in turns|as it is)\b",
    re.IGNORECASE,
)
MAX_WORDS = 30
SOURCES = {
    "pages": page_sentences, "help": help_sentences, "messages": message_sentences,
    "docstrings": docstring_sentences,
}  # fmt: skip


@cache
def sentences_in(source: str) -> tuple[Sentence, ...]:
    return tuple(SOURCES[source]())


@pytest.mark.parametrize("source", SOURCES)
def test_there_are_sentences(source: str) -> None:
    assert len(sentences_in(source)) > 50


@pytest.mark.parametrize("source", SOURCES)
def test_no_banned_word_is_used(source: str) -> None:
    assert [each for each in sentences_in(source) if BANNED.search(each.text)] == []


@pytest.mark.parametrize("source", SOURCES)
def test_no_sentence_is_long(source: str) -> None:
    assert [each for each in sentences_in(source) if each.words > MAX_WORDS] == []


def test_a_banned_word_and_a_long_sentence_are_detected() -> None:
    assert BANNED.search("Nobody is told where it lies.")
    assert Sentence("a", "word " * 31).words == 31
    assert sentences_of("One. Two `a.b c` three! Four (4). Five") == [
        "One.", "Two `a.b c` three!", "Four (4).", "Five",
    ]  # fmt: skip


def test_the_commit_draws_sentences() -> None:
    draw = ["--count", "20", "--commit"]
    one, again, other = (
        CliRunner().invoke(main, [*draw, commit], catch_exceptions=False).output
        for commit in ("aaaaaaa", "aaaaaaa", "bbbbbbb")
    )
    assert one == again != other
    assert len(one.splitlines()) == 20
