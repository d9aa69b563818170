"""Test that the error of a list names the fault and its line."""

import tarfile
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Listing
from tests.support.commands import TO_FILE
from tests.support.inputs import write_tar


def test_an_empty_list_has_its_own_remedy(folder: Path, qwen_vit: Any) -> None:
    for name in ("e.jsonl", "e.txt"):
        Path(name).write_text("\n")
        done = qwen_vit("encode", name, *TO_FILE)
        assert done.code == 2
        assert (
            f"no image found in {name}. Expected a path or a JSON object in each line. Check that "
            "the list is not empty."
        ) in done.err


def test_one_id_on_two_lines_is_named_with_its_lines(folder: Path, qwen_vit: Any) -> None:
    Path("d.jsonl").write_text('{"id": "x", "path": "a.png"}\n\n{"id": "x", "path": "b.jpg"}\n')
    done = qwen_vit("encode", "d.jsonl", *TO_FILE)
    assert done.code == 2
    assert "error: x: two images have this id: " in done.err
    assert 'd.jsonl, line 3. Give each line its own "id".' in done.err
    write_tar("d.tar", {"1.jpg": b"one"})
    with tarfile.open("d.tar", "a") as tar:
        tar.add("a.png", "1.jpg")
    done = qwen_vit("encode", "d.tar", *TO_FILE)
    assert "d.tar/1.jpg: two images have this id: " in done.err
    assert "d.tar, byte 512 and" in done.err
    assert "Rename one in its tar" in done.err
    items = find_items(["d.jsonl"])
    with pytest.raises(ExportError, match=r"x: two images .*d\.jsonl, line 3\. Give each line"):
        Listing.save(Path("frozen"), items, 10)


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('{"path": 3}', "path is 3"),
        ('{"path": "a.png", "id": 3}', "id is 3"),
        ('{"source": 4, "id": 3}', "source is 4"),
    ],
)
def test_only_the_wrong_value_of_a_line_is_named(folder: Path, line: str, fact: str) -> None:
    """The error for {"path": 3} once also blamed the id, which is optional."""
    Path("w.jsonl").write_text(line)
    with pytest.raises(ExportError, match=rf"line 1: {fact}\. Expected text in quotes"):
        list(find_items(["w.jsonl"]))


def test_a_line_without_a_path_is_named_with_its_keys(folder: Path) -> None:
    Path("w.jsonl").write_text('{"id": "a", "file": "a.png"}\n')
    with pytest.raises(ExportError, match=r'line 1: "path" is missing, .* has .id., .file'):
        list(find_items(["w.jsonl"]))


def test_one_name_in_two_folders_is_named_with_both_files(folder: Path, qwen_vit: Any) -> None:
    """The error once was that the image is given twice."""
    for name in ("d1", "d2"):
        Path(name).mkdir()
        Path(name, "1.png").write_bytes(Path("a.png").read_bytes())
    done = qwen_vit("encode", "d1", "d2", *TO_FILE)
    assert (done.code, done.out) == (2, "")
    assert "error: 1.png: two images have this id: " in done.err
    assert "d1/1.png and " in done.err
    assert "d2/1.png. Pass each image once, pass the folder that contains both" in done.err
