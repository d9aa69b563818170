"""Test images in tars: listing, repeated reading, and damage as failed items."""

import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vit.errors import ImageError
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.read import read_item
from tests.support.inputs import LIMITS, ids, touch, write_tar


def test_images_of_a_tar_are_listed_and_read(here: Path) -> None:
    members = {"x/1.jpg": b"one", "x/1.json": b"{}", "two.PNG": b"second", "caf\udcff.jpg": b"3"}
    write_tar("t.tar", members, format=tarfile.PAX_FORMAT)
    left_out: Counter[str] = Counter()
    items = list(find_items(["t.tar"], left_out))
    assert [item.id for item in items] == ["t.tar/x/1.jpg", "t.tar/two.PNG", "t.tar/caf\udcff.jpg"]
    assert [read_item(item, LIMITS) for item in items] == [b"one", b"second", b"3"]
    assert {item.source for item in items} == {str(here / "t.tar")}
    assert left_out == {".json": 1}


def test_listing_a_large_tar_takes_little_memory(here: Path) -> None:
    """tarfile keeps every member that it reads, with 1 kB for each member."""
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


def test_a_damaged_tar_is_a_failed_item_after_its_earlier_images(here: Path) -> None:
    write_tar("t.tar", {"1.jpg": b"one", "2.jpg": b"t" * 2000})
    content = Path("t.tar").read_bytes()
    for length in (1600, 2048, 3000):
        Path("t.tar").write_bytes(content[:length])
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
    Path("t.tar").write_bytes(content[:1024] + b"rubbish" * 200)
    assert [item.error is None for item in find_items(["t.tar"])] == [True, False]


def test_data_after_the_end_of_a_tar_is_reported(here: Path) -> None:
    """After `cat` of two tars, the export once skipped the images of the second tar silently."""
    write_tar("t.tar", {"1.jpg": b"one"})
    write_tar("u.tar", {"2.jpg": b"two"})
    Path("t.tar").write_bytes(Path("t.tar").read_bytes() + Path("u.tar").read_bytes())
    image, rest = find_items(["t.tar"])
    assert (image.id, read_item(image, LIMITS)) == ("t.tar/1.jpg", b"one")
    assert rest.error == (
        "damaged",
        "t.tar: has data after its end marker, which qwen_vit does not read. Unpack the tar.",
    )


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.tar", b"", "truncated"),
        ("a.tar", b"<html>" * 200, "truncated"),
        ("a.tar.gz", b"\x1f\x8b", "format"),
        ("a.tgz", b"\x1f\x8b", "format"),
        ("a.tar", b"\x1f\x8b\x08" + bytes(600), "format"),  # a compressed tar with another suffix
        ("a.tar", b"BZh9" + bytes(600), "format"),
    ],
)
def test_a_file_that_is_not_a_plain_tar_is_a_failed_item(
    here: Path, name: str, content: bytes, code: str
) -> None:
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


def test_the_error_of_a_changed_tar_names_the_tar_and_the_member(here: Path) -> None:
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
    with pytest.raises(ImageError, match="is no longer a regular file") as caught:
        read_item(item, LIMITS)
    assert caught.value.code == "not-a-file"


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_tar_raises_only_image_errors(
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
