"""Test lists of images as text and as JSON lines."""

import json
import os
from pathlib import Path

import pytest

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item, Listing, read_listing
from qwen_vit.inputs.read import read_item
from tests.support.inputs import LIMITS, ids, touch, write_tar


def test_paths_of_a_text_list_start_at_its_folder(here: Path) -> None:
    touch("sets/p/a.jpg", b"sets/caf\xe9.jpg")
    Path("sets/list.txt").write_bytes(b"p/a.jpg\r\n\n  \ncaf\xe9.jpg\nhttp://x/y.jpg\n/abs.jpg")
    items = list(find_items(["sets/list.txt"]))
    assert [os.fsencode(item.id) for item in items] == [
        b"p/a.jpg", b"caf\xe9.jpg", b"http://x/y.jpg", b"/abs.jpg",
    ]  # fmt: skip
    assert read_item(items[1], LIMITS) == b"bytes of sets/caf\xe9.jpg"
    for item, code in ((items[2], "url"), (items[3], "missing")):
        with pytest.raises(ImageError) as caught:
            read_item(item, LIMITS)
        assert caught.value.code == code


def test_the_error_of_a_missing_image_of_a_list_has_the_complete_path(here: Path) -> None:
    """Paths start at the list's folder, so the same path in a shell may name another file."""
    touch("p/a.jpg", "sets/x")
    Path("sets/list.txt").write_text("p/a.jpg\n")
    [item] = find_items(["sets/list.txt"])
    with pytest.raises(ImageError, match=r"^p/a.jpg: .*sets/p/a.jpg does not exist") as caught:
        read_item(item, LIMITS)
    assert caught.value.code == "missing"


def test_a_text_whose_lines_are_no_paths_is_named(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch("sets/a.jpg")
    prose = ("my notes\nof today\n", f"{'x' * 300}\n", "a.jpg/b\n")
    lists = ("gone.jpg\na.jpg\n", "gone.jpg\nhttps://x/a.jpg\n", "")
    for text, n_warnings in (*((text, 1) for text in prose), *((text, 0) for text in lists)):
        Path("sets/notes.txt").write_text(text)
        caplog.clear()
        assert len(list(find_items(["sets/notes.txt"]))) == len(text.splitlines())
        named = "sets/notes.txt: read as a list of paths, but no line names an existing file"
        assert [named in each for each in caplog.messages] == [True] * n_warnings


@pytest.mark.parametrize("name", ["l.txt", "l.jsonl"])
def test_a_list_is_utf8_and_may_have_a_byte_order_mark(here: Path, name: str) -> None:
    text = "a.jpg\r\nb.jpg\r\n" if name == "l.txt" else '{"path": "a.jpg"}\r\n{"path": "b.jpg"}'
    Path(name).write_bytes(text.encode("utf-8-sig"))
    assert ids(name) == ["a.jpg", "b.jpg"]
    Path(name).write_bytes(text.encode("utf-16"))
    with pytest.raises(ExportError, match=f"{name}: is UTF-16. Expected UTF-8"):
        ids(name)


def test_a_json_list_has_ids_and_paths(here: Path) -> None:
    lines = [{"id": "cat", "path": "a.jpg", "caption": "x"}, {"source": "/b.jpg"}]
    Path("l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(find_items(["l.jsonl"])) == [
        Item("cat", str(here / "a.jpg")),
        Item("/b.jpg", "/b.jpg"),
    ]


def test_a_frozen_listing_is_an_input(here: Path) -> None:
    touch("p/a.jpg")
    write_tar("p/t.tar", {"x.png": b"pixels"})
    listing = Listing.save(here / "l.jsonl", find_items(["p"]), 10)
    assert list(find_items(["l.jsonl"])) == list(read_listing(listing.path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: the JSON is"),
        ("{}", '"path" is missing'),
        ('{"id": 7, "path": "a"}', "id is 7"),
        ('{"id": "a"}', '"path" is missing'),
        ('{"id": "\\ud800", "path": "a"}', "Expected text"),
        ('{"path": "a", "offset": -1, "size": 2}', "offset is -1"),
        ('{"path": "a", "offset": 1}', "size None"),
        ('{"path": "a", "offset": 9223372036854775807, "size": 1}', "offset is 922337203685477580"),
        ('{"id": "", "path": "a"}', "id is ''"),
        ('{"path": ""}', "path is ''"),
    ],
)
def test_a_bad_line_of_a_list_is_named(here: Path, line: str, words: str) -> None:
    Path("l.jsonl").write_text('{"path": "a.jpg"}\n' + line)
    with pytest.raises(ExportError) as caught:
        ids("l.jsonl")
    assert words in str(caught.value)
    assert "l.jsonl, line 2" in str(caught.value)
    assert "Correct that line" in str(caught.value)
    assert caught.value.remedy == "Correct that line."
