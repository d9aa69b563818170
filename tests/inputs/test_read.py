"""Test that qwen_vit reads a frozen listing by position, and retries transient errors."""

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ExportError, ImageError
from qwen_vit.images.load import read_image_file
from qwen_vit.inputs import read as read_module
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item, Listing
from qwen_vit.inputs.read import read_item
from tests.support.inputs import LIMITS, touch, write_tar


def test_two_images_of_one_id_are_refused_by_name(here: Path) -> None:
    touch("p/1.jpg", "q/1.jpg")
    with pytest.raises(
        ExportError, match=r"1.jpg: two images have this id, the second is .*q/1.jpg\. Pass each"
    ):
        Listing.save(here / "l", find_items(["p", "q"]), 5)
    assert not Path("l").exists()


def test_a_repeated_name_in_a_tar_has_a_possible_remedy(here: Path) -> None:
    """`tar --append` makes such a tar. The remedy for files, to export their folder, does not work
    for members of a tar."""
    write_tar("a.tar", {"1.jpg": b"one"})
    with tarfile.open("a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(
        ExportError, match=r"the second is in .*a\.tar, byte 1536\. Rename one in its tar"
    ):
        Listing.save(here / "l", find_items(["a.tar"]), 5)


def test_the_images_of_a_shard_are_read_by_its_number(here: Path) -> None:
    items = [Item(f"{i}é", f"/{i}") for i in range(10)]
    listing = Listing.save(here / "l", items, 4)
    assert [listing.shard(i) for i in range(3)] == [items[:4], items[4:8], items[8:]]
    assert [listing.shard_length(i) for i in range(3)] == [4, 4, 2]
    assert (listing.n_images, len(listing.starts)) == (10, 3)
    assert listing.spread(100) == items
    assert listing.spread(3) == [items[0], items[4], items[8]]
    assert Listing.save(here / "l", items, 10**20).shard(0) == items


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> list[str]:
    calls: list[str] = []
    real = read_image_file

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
def test_a_lasting_io_error_is_a_failure(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: int, attempts: int
) -> None:
    touch("a.jpg")
    calls = failing(monkeypatch, number, 99)
    with pytest.raises(ImageError):
        read_item(Item("a", "a.jpg"), LIMITS)
    assert len(calls) == attempts
