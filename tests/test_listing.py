"""Inputs become one listing: in one order, ids without loss, and everything amiss has a name."""

import errno
import glob
import io
import json
import os
import tarfile
import tracemalloc
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
from qwen_vit.inputs import read as read_module
from qwen_vit.inputs.find import check_inputs, find_items
from qwen_vit.inputs.listing import Item, Listing, read_listing
from qwen_vit.inputs.read import read_item

LIMITS = ImageLimits()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str | bytes) -> None:
    for name in names:
        path = os.fsencode(name)
        os.makedirs(os.path.dirname(path) or b".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"bytes of " + path)


def ids(*inputs: str) -> list[str]:
    return [item.id for item in find_items(inputs)]


def write_tar(path: str, members: dict[str, bytes], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# Files, folders, patterns


def test_a_folder_is_listed_to_every_depth_in_the_order_of_its_names(here: Path) -> None:
    touch("p/b.jpg", "p/a/z.png", "p/a/B.PNG", "p/a/é.webp", "p/a-1.gif", "p/.hidden.jpg")
    expected = [".hidden.jpg", "a/B.PNG", "a/z.png", "a/é.webp", "a-1.gif", "b.jpg"]
    assert ids("p") == expected
    assert ids("p/") == ids(str(here / "p")) == expected
    assert [item.source for item in find_items(["p"])] == [str(here / "p" / n) for n in expected]


def test_what_has_no_images_suffix_is_left_out_and_counted(here: Path) -> None:
    touch("p/a.jpg", "p/a.txt", "p/b.txt", "p/c.json", "p/README")
    left_out: Counter[str] = Counter()
    assert [item.id for item in find_items(["p"], left_out)] == ["a.jpg"]
    assert left_out == {".txt": 2, ".json": 1, "": 1}


def test_images_that_cannot_be_decoded_here_are_listed_to_be_reported(here: Path) -> None:
    touch("p/a.heic", "p/b.svg", "p/c.jxl")
    assert ids("p") == ["a.heic", "b.svg", "c.jxl"]


def test_a_files_id_is_its_path_as_it_was_given(here: Path) -> None:
    touch("p/a.jpg", "no-suffix")
    assert ids("./p//a.jpg", "no-suffix") == ["p/a.jpg", "no-suffix"]
    assert ids(str(here / "p/a.jpg")) == [str(here / "p/a.jpg")]


def test_patterns_match_as_in_a_shell_and_in_order(here: Path) -> None:
    touch("p/b.jpg", "p/a.jpg", "p/q/c.jpg", "p/d.txt", "p/[1].jpg")
    assert ids("p/*.jpg") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg"]
    assert ids("p/**/*.jpg") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg", "p/q/c.jpg"]
    assert ids("p/**") == ["p/[1].jpg", "p/a.jpg", "p/b.jpg", "p/d.txt", "p/q/c.jpg"]
    assert ids("p/[1].jpg") == ["p/[1].jpg"]  # there is a file of that very name


def test_a_name_that_no_file_can_have_fails_by_itself(here: Path) -> None:
    """It ended the whole export with a raw ValueError."""
    with pytest.raises(ExportError, match=r"cannot be exported .embedded null byte.\. Check the"):
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
    """Python's own glob goes round and round: three links took it longer than anyone waits."""
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
    # a folder is a match of the `**` that ends a pattern as well, with a slash behind it
    assert found == {name for name in theirs if not name.endswith("/")}


def test_folders_that_a_pattern_names_are_exported_with_what_is_in_them(here: Path) -> None:
    """They were passed over without a word wherever the pattern had a `**`."""
    touch("p/x/train/1.jpg", "p/x/train/deep/2.jpg", "p/x/test/3.jpg")
    assert ids("p/**/train") == ["1.jpg", "deep/2.jpg"]
    assert ids("p/**/tr*") == ["1.jpg", "deep/2.jpg"]
    assert ids("p/**") == ids("p/**/*") == [f"p/x/{n}" for n in ("test/3.jpg", "train/1.jpg",
                                                                 "train/deep/2.jpg")]  # fmt: skip


def test_what_is_in_a_folder_that_matches_comes_once(here: Path) -> None:
    """It matched by itself as well: each image was exported twice."""
    touch("q/cat/cat0.png", "q/cat.png", "q/dog/cat1.png", "q/cat/deep/cat2.png")
    assert ids("q/**/*cat*") == ["cat0.png", "deep/cat2.png", "q/cat.png", "q/dog/cat1.png"]


def test_what_a_folder_that_matches_would_leave_out_comes_by_its_own_name(here: Path) -> None:
    touch("cats/cat1", "cats/cat2.jpg", "cats/cat3.dat")
    assert ids("**/cat*") == ["cat2.jpg", "cats/cat1", "cats/cat3.dat"]


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders of this name cannot be listed, as those of another user."""
    real = os.scandir

    def scandir(path: str) -> Any:
        if os.path.basename(os.fspath(path).rstrip("/")) == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(find_module.os, "scandir", scandir)


def test_patterns_that_meet_one_unreadable_folder_tell_it_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id came twice, and the whole export was refused."""
    touch("a/1.jpg", "a/2.png", "no/3.jpg")
    refuse_to_list(monkeypatch, "no")
    assert ids("*/*.jpg", "*/*.png") == ["a/1.jpg", "no", "a/2.png"]
    assert ids("**/no", "no*") == ["no"]


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
def test_a_folder_that_a_pattern_cannot_look_into_is_an_item(
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
        ("gone.jpg", "gone.jpg: cannot be exported (No such file"),
        ("", "'': cannot be exported (No such file"),
        ("gone/*.jpg", "no file matches"),
        ("https://example.org/a.jpg", "an address"),
        ("hf://datasets/a.jpg", "is no valid address"),
    ],
)
def test_an_input_that_is_not_there_is_refused(here: Path, given: str, words: str) -> None:
    touch("a.jpg")
    for call in (ids, lambda *inputs: check_inputs(inputs)):
        with pytest.raises(ExportError) as caught:
            call("a.jpg", given)
        assert words in str(caught.value)
        assert given in str(caught.value)


def test_a_folder_that_may_not_be_read_is_an_item_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_odd_names_come_through_the_frozen_listing_without_loss(here: Path) -> None:
    touch(*(b"p/" + name for name in ODD_NAMES))
    listing = Listing.freeze(here / "listing.jsonl", find_items(["p"]), 3)
    items = list(read_listing(listing.path))
    assert [os.fsencode(item.id) for item in items] == sorted(ODD_NAMES)
    assert [read_item(item, LIMITS) for item in items] == [
        b"bytes of p/" + name for name in sorted(ODD_NAMES)
    ]
    assert listing.path.read_bytes().isascii()


# Lists


def test_a_text_list_names_paths_beside_it(here: Path) -> None:
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


def test_of_a_lists_image_that_is_missing_the_whole_path_is_told(here: Path) -> None:
    """Paths count from the list's folder: `ls` of what the list says may find it elsewhere."""
    touch("p/a.jpg", "sets/x")
    Path("sets/list.txt").write_text("p/a.jpg\n")
    [item] = find_items(["sets/list.txt"])
    with pytest.raises(ImageError, match=r"^p/a.jpg: .*sets/p/a.jpg does not exist") as caught:
        read_item(item, LIMITS)
    assert caught.value.code == "missing"


@pytest.mark.parametrize("name", ["l.txt", "l.jsonl"])
def test_a_list_may_begin_with_a_byte_order_mark_and_is_utf8(here: Path, name: str) -> None:
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


def test_a_frozen_listing_is_a_list_again(here: Path) -> None:
    touch("p/a.jpg")
    write_tar("p/t.tar", {"x.png": b"pixels"})
    listing = Listing.freeze(here / "l.jsonl", find_items(["p"]), 10)
    assert list(find_items(["l.jsonl"])) == list(read_listing(listing.path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: the JSON is"),
        ("{}", "path None"),
        ('{"id": 7, "path": "a"}', "id is 7"),
        ('{"id": "a"}', "path None"),
        ('{"id": "\\ud800", "path": "a"}', "Expected text"),
        ('{"path": "a", "offset": -1, "size": 2}', "offset is -1"),
        ('{"path": "a", "offset": 1}', "size None"),
        ('{"path": "a", "offset": 9223372036854775807, "size": 1}', "offset is 922337203685477580"),
        ('{"id": "", "path": "a"}', "id is ''"),
        ('{"path": ""}', "path ''"),
    ],
)
def test_a_bad_line_of_a_list_is_named(here: Path, line: str, words: str) -> None:
    Path("l.jsonl").write_text('{"path": "a.jpg"}\n' + line)
    with pytest.raises(ExportError) as caught:
        ids("l.jsonl")
    assert words in str(caught.value)
    assert "l.jsonl, line 2" in str(caught.value)
    assert "Correct that line" in str(caught.value)
    assert caught.value.remedy == "correct that line"


# Tars


def test_the_images_of_a_tar_are_found_and_read_again(here: Path) -> None:
    members = {"x/1.jpg": b"one", "x/1.json": b"{}", "two.PNG": b"second", "caf\udcff.jpg": b"3"}
    write_tar("t.tar", members, format=tarfile.PAX_FORMAT)
    left_out: Counter[str] = Counter()
    items = list(find_items(["t.tar"], left_out))
    assert [item.id for item in items] == ["t.tar/x/1.jpg", "t.tar/two.PNG", "t.tar/caf\udcff.jpg"]
    assert [read_item(item, LIMITS) for item in items] == [b"one", b"second", b"3"]
    assert {item.source for item in items} == {str(here / "t.tar")}
    assert left_out == {".json": 1}


def test_listing_a_large_tar_takes_no_memory(here: Path) -> None:
    """tarfile keeps every member that it passes, 1 kB each."""
    write_tar("t.tar", {f"{number}.jpg": b"" for number in range(600)})
    tracemalloc.start()
    try:
        assert sum(1 for _ in find_items(["t.tar"])) == 600
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 150_000


def test_the_tars_of_a_folder_are_named_by_their_path_in_it(here: Path) -> None:
    Path("p/q").mkdir(parents=True)
    write_tar("p/q/t.tar", {"1.jpg": b"one"})
    touch("p/z.jpg")
    assert ids("p") == ["q/t.tar/1.jpg", "z.jpg"]
    assert ids("p/q/t.tar") == ["t.tar/1.jpg"]


def test_what_is_wrong_with_a_tar_is_an_item_and_the_images_before_it_count(here: Path) -> None:
    write_tar("t.tar", {"1.jpg": b"one", "2.jpg": b"t" * 2000})
    whole = Path("t.tar").read_bytes()
    for length in (1600, 2048, 3000):
        Path("t.tar").write_bytes(whole[:length])
        *images, last = find_items(["t.tar"])
        assert (last.id, last.error is not None and last.error[0]) == ("t.tar", "truncated")
        assert [item.id for item in images][:1] == ["t.tar/1.jpg"]
        assert read_item(images[0], LIMITS) == b"one"
        for item in images[1:]:
            with pytest.raises(
                ImageError, match=r"t.tar/2.jpg: its tar .*t.tar ends after"
            ) as caught:
                read_item(item, LIMITS)
            assert caught.value.code == "truncated"
    Path("t.tar").write_bytes(whole[:1024] + b"rubbish" * 200)
    assert [item.error is None for item in find_items(["t.tar"])] == [True, False]


def test_a_tar_that_goes_on_after_its_end_is_reported(here: Path) -> None:
    """Two tars joined by `cat`: the images of the second were passed over in silence."""
    write_tar("t.tar", {"1.jpg": b"one"})
    write_tar("u.tar", {"2.jpg": b"two"})
    Path("t.tar").write_bytes(Path("t.tar").read_bytes() + Path("u.tar").read_bytes())
    image, rest = find_items(["t.tar"])
    assert (image.id, read_item(image, LIMITS)) == ("t.tar/1.jpg", b"one")
    assert rest.error == (
        "damaged",
        "t.tar: has data after its end marker; those members were not exported. Unpack it.",
    )


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.tar", b"", "truncated"),
        ("a.tar", b"<html>" * 200, "truncated"),
        ("a.tar.gz", b"\x1f\x8b", "format"),
        ("a.tgz", b"\x1f\x8b", "format"),
        ("a.tar", b"\x1f\x8b\x08" + bytes(600), "format"),  # compressed all the same
        ("a.tar", b"BZh9" + bytes(600), "format"),
    ],
)
def test_what_is_no_plain_tar_is_an_item(here: Path, name: str, content: bytes, code: str) -> None:
    Path("p").mkdir()
    Path("p", name).write_bytes(content)
    [item] = find_items(["p"])
    assert item.error is not None
    assert (item.id, item.error[0]) == (name, code)
    assert name in item.error[1]


def test_links_in_a_tar_are_reported(here: Path) -> None:
    with tarfile.open("t.tar", "w") as tar:
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
    assert [item.error and item.error[0] for item in find_items(["t.tar"])] == ["not-a-file"] * 2


def test_a_tar_that_changed_since_it_was_listed_is_an_error_that_names_both(here: Path) -> None:
    write_tar("t.tar", {"1.jpg": b"one"})
    [item] = find_items(["t.tar"])
    os.truncate("t.tar", 513)
    with pytest.raises(
        ImageError, match=r"t.tar/1.jpg: its tar .*/t.tar ends after 1 of the image's 3"
    ):
        read_item(item, LIMITS)
    with pytest.raises(ImageError, match=r"t.tar/1.jpg: 3 bytes. Expected at most 2"):
        read_item(item, ImageLimits(max_file_bytes=2))
    os.remove("t.tar")
    with pytest.raises(ImageError, match=r"t.tar/1.jpg: its tar .*/t.tar does not exist"):
        read_item(item, LIMITS)
    os.mkfifo("t.tar")
    with pytest.raises(ImageError, match="is not a regular file") as caught:
        read_item(item, LIMITS)
    assert caught.value.code == "not-a-file"


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_to_a_tar_ends_in_anything_but_items(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    write_tar(
        str(path), {"1.jpg": b"one", "é" * 120 + ".jpg": b"x" * 600}, format=tarfile.PAX_FORMAT
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for item in find_items([str(path)]):
        try:
            read_item(item, LIMITS)
        except ImageError:
            continue


def test_fifos_are_listed_and_never_opened(here: Path) -> None:
    """Opening one would wait for a writer for ever."""
    Path("p").mkdir()
    for name in ("a.jpg", "b.tar", "c.jsonl", "d.txt"):
        os.mkfifo(f"p/{name}")
    items = list(find_items(["p", "p/b.tar", "p/c.jsonl", "p/d.txt"]))
    assert [item.id for item in items] == ["a.jpg", "b.tar", "p/b.tar", "p/c.jsonl", "p/d.txt"]
    for item in items:
        with pytest.raises(ImageError) as caught:
            read_item(item, LIMITS)
        assert caught.value.code == "not-a-file"


# Freezing and reading


def test_two_images_of_one_id_are_refused_by_name(here: Path) -> None:
    touch("p/1.jpg", "q/1.jpg")
    with pytest.raises(
        ExportError, match=r"1.jpg: two images have this id, the second is .*q/1.jpg\. Pass each"
    ):
        Listing.freeze(here / "l", find_items(["p", "q"]), 5)
    assert not Path("l").exists()


def test_a_name_that_a_tar_holds_twice_has_a_remedy_that_can_be_followed(here: Path) -> None:
    """As after `tar --append`. Exporting the folder that holds both is no remedy for members."""
    write_tar("a.tar", {"1.jpg": b"one"})
    with tarfile.open("a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(ExportError, match=r"the second is in .*a\.tar\. Rename one in its tar"):
        Listing.freeze(here / "l", find_items(["a.tar"]), 5)


def test_a_shards_images_are_found_by_its_number(here: Path) -> None:
    items = [Item(f"{i}é", f"/{i}") for i in range(10)]
    listing = Listing.freeze(here / "l", items, 4)
    assert [listing.shard(i) for i in range(3)] == [items[:4], items[4:8], items[8:]]
    assert [listing.shard_length(i) for i in range(3)] == [4, 4, 2]
    assert (listing.n_images, len(listing.starts)) == (10, 3)
    assert listing.spread(100) == items
    assert listing.spread(3) == [items[0], items[4], items[8]]
    assert Listing.freeze(here / "l", items, 10**20).shard(0) == items


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[str]:
    calls: list[str] = []
    real = read_module.read_image_file

    def read(path: str, *rest: Any) -> bytes:
        calls.append(path)
        if len(calls) <= times:
            try:
                raise OSError(number, os.strerror(number))
            except OSError:
                raise ImageError("cannot be read", code="unreadable") from None
        return real(path, *rest)

    monkeypatch.setattr(read_module, "read_image_file", read)
    monkeypatch.setattr(read_module, "PAUSES_S", (0, 0))
    return calls


def test_transient_io_errors_are_retried(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a.jpg")
    calls = failing(monkeypatch, errno.ESTALE, 2)
    assert read_item(Item("a", "a.jpg"), LIMITS) == b"bytes of a.jpg"
    assert len(calls) == 3


@pytest.mark.parametrize(("number", "attempts"), [(errno.EIO, 3), (errno.EACCES, 1)])
def test_what_stays_unreadable_is_given_up(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: int, attempts: int
) -> None:
    touch("a.jpg")
    calls = failing(monkeypatch, number, 99)
    with pytest.raises(ImageError):
        read_item(Item("a", "a.jpg"), LIMITS)
    assert len(calls) == attempts
