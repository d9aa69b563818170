"""Test that files, folders and patterns give items in one order, including failed items."""

import errno
import glob
import json
import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs import find as find_module
from qwen_vit.inputs.find import check_inputs, find_items
from qwen_vit.inputs.listing import Listing, read_listing
from qwen_vit.inputs.read import read_item
from tests.support.inputs import LIMITS, ids, touch

# Files, folders, patterns


def test_a_folder_is_listed_to_every_depth_in_the_order_of_its_names(here: Path) -> None:
    touch("p/b.jpg", "p/a/z.png", "p/a/B.PNG", "p/a/é.webp", "p/a-1.gif", "p/.hidden.jpg")
    expected = [".hidden.jpg", "a/B.PNG", "a/z.png", "a/é.webp", "a-1.gif", "b.jpg"]
    assert ids("p") == expected
    assert ids("p/") == ids(str(here / "p")) == expected
    assert [item.source for item in find_items(["p"])] == [str(here / "p" / n) for n in expected]


def test_files_without_an_image_suffix_are_skipped_and_counted(here: Path) -> None:
    touch("p/a.jpg", "p/a.txt", "p/b.txt", "p/c.json", "p/Makefile", "p/README.md")
    left_out: Counter[str] = Counter()
    assert [item.id for item in find_items(["p"], left_out)] == ["a.jpg"]
    assert left_out == {".txt": 2, ".json": 1, "": 1}


def test_images_without_a_decoder_are_listed(here: Path) -> None:
    touch("p/a.heic", "p/b.svg", "p/c.jxl")
    assert ids("p") == ["a.heic", "b.svg", "c.jxl"]


def test_optional_formats_are_found_in_a_folder(here: Path) -> None:
    """`--formats ppm` once skipped every .ppm file of a folder."""
    names = ["a.ico", "b.jp2", "c.pbm", "d.pgm", "e.pnm", "f.ppm", "g.tga"]
    touch(*(f"p/{name}" for name in names))
    assert ids("p") == names


def test_the_id_of_a_file_is_its_given_path(here: Path) -> None:
    touch("p/a.jpg", "no-suffix")
    assert ids("./p//a.jpg", "no-suffix") == ["p/a.jpg", "no-suffix"]
    assert ids(str(here / "p/a.jpg")) == [str(here / "p/a.jpg")]


def test_patterns_match_as_in_a_shell_and_in_order(here: Path) -> None:
    touch("p/b.jpg", "p/a.jpg", "p/q/c.jpg", "p/d.txt", "p/[1].jpg")
    assert ids("p/*.jpg") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg"]
    assert ids("p/**/*.jpg") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg", "p/q/c.jpg"]
    assert ids("p/**") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg", "p/d.txt", "p/q/c.jpg"]
    assert ids("p/[1].jpg") == ["p/[1].jpg"]  # a file with exactly this name exists


def test_an_impossible_file_name_is_one_failure(here: Path) -> None:
    """Such a path once ended the whole export with a raw ValueError."""
    with pytest.raises(ExportError, match=r"cannot be read .embedded null byte.\. Check the"):
        ids("a\0.jpg")
    Path("l.jsonl").write_text(json.dumps({"id": "x", "path": "t\0.tar", "offset": 0, "size": 5}))
    [item] = find_items(["l.jsonl"])
    with pytest.raises(
        ImageError, match=r"^x: its tar .* cannot be read \(embedded null"
    ) as caught:
        read_item(item, ImageLimits())
    assert caught.value.code == "unreadable"


def test_links_are_followed_and_loops_end(here: Path) -> None:
    touch("real/a.jpg", "real/deep/b.jpg")
    (here / "p").mkdir()
    (here / "p/to-real").symlink_to(here / "real")
    (here / "real/deep/up").symlink_to(here / "real")
    (here / "real/self").symlink_to(".")
    (here / "p/loop.jpg").symlink_to("loop.jpg")
    (here / "p/gone.jpg").symlink_to("nothing")
    assert ids("p") == ["gone.jpg", "loop.jpg", "to-real/a.jpg", "to-real/deep/b.jpg"]


def test_a_pattern_of_any_depth_ends_where_links_lead_back(here: Path) -> None:
    """Python's own glob follows such links repeatedly, and three links took too long."""
    touch("p/a/1.jpg", "p/a/b/2.jpg", "other/3.jpg", "p/a/b/[x]/4.jpg")
    for name, target in {"up": "..", "self": ".", "again": "../a", "out": "../../other"}.items():
        (here / "p/a" / name).symlink_to(target)
    real = ["p/a/1.jpg", "p/a/b/2.jpg", "p/a/b/[x]/4.jpg"]
    assert ids("p/**/*.jpg") == sorted([*real, "p/a/out/3.jpg"])
    assert ids("p/**/b/**/*.jpg") == real[1:]
    assert ids("p/**/[[]x]/*") == real[2:]
    assert ids("**/3.jpg") == ["other/3.jpg", "p/a/out/3.jpg"]
    assert ids(str(here / "**" / "2.jpg")) == [str(here / "p/a/b/2.jpg")]


@settings(max_examples=30, deadline=None)
@given(
    names=st.sets(st.lists(st.sampled_from(["a", ".b", "[c]", "d.e"]), min_size=1, max_size=4)
                  .map("/".join), min_size=1, max_size=8),
    pattern=st.lists(st.sampled_from(["**", "*", "a", ".*", "[[]c]", "?.*"]), min_size=1,
                     max_size=4).map("/".join),
)  # fmt: skip
def test_patterns_find_what_pythons_glob_finds(names: set[str], pattern: str) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / "f").touch()
        pattern = f"{folder}/{pattern}"
        found = set(find_module._matches(pattern, {}))
        theirs = glob.glob(pattern, recursive=True, include_hidden=True)
    # a final `**` also matches the folder itself, with a slash at its end
    assert found == {name for name in theirs if not name.endswith("/")}


def test_folders_that_match_a_pattern_are_exported_with_their_files(here: Path) -> None:
    """A pattern with `**` once skipped unreadable folders silently."""
    touch("p/x/train/1.jpg", "p/x/train/deep/2.jpg", "p/x/test/3.jpg")
    assert ids("p/**/train") == ["1.jpg", "deep/2.jpg"]
    assert ids("p/**/tr*") == ["1.jpg", "deep/2.jpg"]
    assert ids("p/**") == ids("p/**/*") == [f"p/x/{n}" for n in ("test/3.jpg", "train/1.jpg",
                                                                 "train/deep/2.jpg")]  # fmt: skip


def test_a_file_in_a_matching_folder_is_listed_once(here: Path) -> None:
    """The folder itself also matched, so the export once had each image twice."""
    touch("q/cat/cat0.png", "q/cat.png", "q/dog/cat1.png", "q/cat/deep/cat2.png")
    assert ids("q/**/*cat*") == ["cat0.png", "deep/cat2.png", "q/cat.png", "q/dog/cat1.png"]


def test_a_file_that_matches_by_its_own_name_is_not_skipped(here: Path) -> None:
    touch("cats/cat1", "cats/cat2.jpg", "cats/cat3.dat")
    assert ids("**/cat*") == ["cat2.jpg", "cats/cat1", "cats/cat3.dat"]


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make folders of this name unreadable, like another user's folders."""
    real = os.scandir

    def scandir(path: str) -> Any:
        if os.path.basename(os.fspath(path).rstrip("/")) == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_an_unreadable_folder_in_two_patterns_is_one_failure(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id once occurred twice, so the export rejected all inputs."""
    touch("a/1.jpg", "a/2.png", "no/3.jpg")
    refuse_to_list(monkeypatch, "no")
    assert ids("*/*.jpg", "*/*.png") == ["a/1.jpg", "no", "a/2.png"]
    assert ids("**/no", "no*") == ["no"]


def test_a_named_unreadable_folder_is_an_error_or_a_failed_item(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("a.jpg", "no/b.jpg")
    refuse_to_list(monkeypatch, "no")
    with pytest.raises(ExportError, match="no: cannot be listed"):
        list(find_items(["no", "a.jpg"]))
    bad, good = find_items(["no", "a.jpg"], must_exist=False)
    assert (bad.id, good.id) == ("no", "a.jpg")
    assert bad.error is not None


@pytest.mark.parametrize(
    ("pattern", "good"),
    [
        ("p/**/*.jpg", ["p/a.jpg", "p/yes/c.jpg"]),
        ("p/*/*.jpg", ["p/yes/c.jpg"]),
        ("./p/*/*.jpg", ["p/yes/c.jpg"]),
        ("p/*/**/*.jpg", ["p/yes/c.jpg"]),
        ("p/n*/*.jpg", []),
        ("p/no/*.jpg", []),
        ("p/*o/", []),
        ("p/n*", []),
        ("*/no", []),
    ],
)
def test_an_unreadable_folder_of_a_pattern_is_a_failed_item(
    here: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, good: list[str]
) -> None:
    touch("p/a.jpg", "p/no/b.jpg", "p/yes/c.jpg")
    refuse_to_list(monkeypatch, "no")
    *found, bad = find_items([pattern])
    assert [(item.id, item.error) for item in found] == [(name, None) for name in good]
    assert (bad.id, bad.source) == ("p/no", str(here / "p/no"))
    assert bad.error == (
        "unreadable", "p/no: cannot be listed (Permission denied). Check its permissions."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.jpg", "gone.jpg: does not exist. Check the path."),
        ("", "'': does not exist. Check the path."),
        ("gone/*.jpg", "no file matches"),
        ("https://example.org/a.jpg", "an address"),
        ("hf://datasets/a.jpg", "is not a valid address"),
    ],
)
def test_a_missing_input_is_refused(here: Path, given: str, words: str) -> None:
    touch("a.jpg")
    for call in (ids, lambda *inputs: check_inputs(inputs)):
        with pytest.raises(ExportError) as caught:
            call("a.jpg", given)
        assert words in str(caught.value)
        assert given in str(caught.value)


def test_an_unreadable_folder_is_a_failed_item(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("p/a/1.jpg", "p/b/2.jpg")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    bad, good = find_items(["p"])
    assert (bad.id, good.id) == ("a", "b/2.jpg")
    with pytest.raises(ImageError, match=r"a: cannot be listed \(Permission denied\)") as caught:
        read_item(bad, LIMITS)
    assert caught.value.code == "unreadable"


ODD_NAMES = [
    b"caf\xe9\xff.jpg",
    "猫 🐈.jpg".encode(),
    b"two\nlines\r\t.jpg",
    b"--out.jpg",
    b"n" * 251 + b".jpg",
    b'"quotes" \\ and * [1]?.jpg',
    b" .jpg",
]


def test_a_frozen_listing_keeps_unusual_names(here: Path) -> None:
    touch(*(b"p/" + name for name in ODD_NAMES))
    listing = Listing.save(here / "listing.jsonl", find_items(["p"]), 3)
    items = list(read_listing(listing.path))
    assert [os.fsencode(item.id) for item in items] == sorted(ODD_NAMES)
    assert [read_item(item, LIMITS) for item in items] == [
        b"bytes of p/" + name for name in sorted(ODD_NAMES)
    ]
    assert listing.path.read_bytes().isascii()


# Tars


def test_fifos_are_listed_and_never_opened(here: Path) -> None:
    """Opening a FIFO would wait for a writer forever."""
    Path("p").mkdir()
    for name in ("a.jpg", "b.tar", "c.jsonl", "d.txt"):
        os.mkfifo(f"p/{name}")
    items = [*find_items(["p"]), *find_items(["p/b.tar", "p/c.jsonl", "p/d.txt"])]
    assert [item.id for item in items] == ["a.jpg", "b.tar", "p/b.tar", "p/c.jsonl", "p/d.txt"]
    for item in items:
        with pytest.raises(ImageError) as caught:
            read_item(item, LIMITS)
        assert caught.value.code == "not-a-file"
