"""Test that the error for a lazy PIL image with a closed file blames the file, not the content."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.load import load_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path)
    return path


def from_tar(picture: Path) -> Image.Image:
    with tarfile.open(picture.with_suffix(".tar"), "w") as tar:
        tar.add(picture, "a.jpg")
    with tarfile.open(picture.with_suffix(".tar")) as tar:
        return Image.open(tar.extractfile("a.jpg"))  # type: ignore[arg-type]


def from_zip(picture: Path) -> Image.Image:
    with zipfile.ZipFile(picture.with_suffix(".zip"), "w") as zipped:
        zipped.write(picture, "a.jpg")
    with zipfile.ZipFile(picture.with_suffix(".zip")) as zipped, zipped.open("a.jpg") as member:
        return Image.open(member)


def from_file(picture: Path) -> Image.Image:
    with picture.open("rb") as file:
        return Image.open(file)


def from_path(picture: Path) -> Image.Image:
    with Image.open(picture) as image:
        return image


@pytest.mark.parametrize("opened", [from_tar, from_zip, from_file, from_path])
def test_a_closed_file_is_named_and_not_called_damaged(opened: object, picture: Path) -> None:
    with pytest.raises(ImageError, match="closed before Pillow loaded the image") as caught:
        load_image(opened(picture))  # type: ignore[operator]
    assert caught.value.code == "unreadable"
    assert "load() first" in caught.value.remedy


def test_an_image_that_was_loaded_in_time_is_taken(picture: Path) -> None:
    with picture.open("rb") as file:
        image = Image.open(file)
        image.load()
    assert load_image(image).width == 60
