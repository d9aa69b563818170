"""Test the image policy for every source: format by content, EXIF orientation, first frame."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.images.load import load_image
from tests.support import IMAGES
from tests.support.images import FORMATS, chelsea, encode, noise

# The policy for every source


@pytest.mark.parametrize("file_format", FORMATS)
def test_content_decides_the_format_and_the_extension_nothing(
    tmp_path: Path, file_format: str
) -> None:
    data = encode(chelsea(), file_format, **FORMATS[file_format])
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (path, str(path), data, bytearray(data), memoryview(data)):
        image = load_image(source)
        assert image.format == file_format
        assert np.array_equal(image.pixels, expected)
    assert load_image(path).name == str(path)
    assert load_image(data).name == "image bytes"
    assert load_image(data, name="cat").name == "cat"


def test_the_result_is_contiguous_rgb_uint8_in_its_own_memory() -> None:
    array = noise(6, 9)
    image = load_image(array)
    assert (image.height, image.width) == (6, 9)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous
    assert image.pixels.flags.writeable
    assert not np.shares_memory(image.pixels, array)


def test_path_bytes_pil_array_and_tensor_give_the_same_pixels() -> None:
    path = IMAGES / "astronaut.png"
    array = np.asarray(Image.open(path))
    sources: list[Any] = [
        path,
        path.read_bytes(),
        Image.open(path),
        array,
        torch.from_numpy(array.copy()),
        array.transpose(2, 0, 1),
        array / 255,
        torch.from_numpy(array / np.float32(255)).permute(2, 0, 1),
        array[::-1][::-1],
    ]
    for source in sources:
        assert np.array_equal(load_image(source).pixels, array)


def upright_cases() -> list[tuple[int, str]]:
    return [(o, f) for o in range(1, 9) for f in ("JPEG", "PNG", "TIFF", "WEBP")]


@pytest.mark.parametrize(("orientation", "file_format"), upright_cases())
def test_exif_orientation_is_applied_to_files_and_pil_images(
    orientation: int, file_format: str
) -> None:
    """The stored image is the upright image under the inverse of the tag's operation."""
    upright = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).convert("RGB")
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(stored, file_format, exif=exif, **FORMATS[file_format])
    note = f"EXIF orientation {orientation} applied"
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.pixels.shape == (32, 48, 3)
        assert np.abs(image.pixels[..., 0].astype(int) - upright).max() <= 2
        assert image.notes.count(note) == (orientation > 1)


def test_damaged_exif_is_noted_and_the_picture_kept() -> None:
    image = chelsea()
    image.info["exif"] = b"Exif\0\0no TIFF header"
    assert "unreadable EXIF ignored" in load_image(image).notes
    assert np.array_equal(load_image(image).pixels, np.asarray(image))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("#f00000", "#00f000", "#0000f0")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    image = load_image(data)
    assert np.abs(image.pixels.astype(int) - (240, 0, 0)).max() <= 4
    counted = "several" if file_format in ("GIF", "TIFF") else "3"  # the loader does not count
    assert f"first of {counted} frames" in image.notes


@pytest.mark.parametrize("file_format", ["GIF", "PNG"])
def test_a_pil_animation_counts_with_the_frame_it_stands_on(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("#f00000", "#00f000")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    picture = Image.open(io.BytesIO(data))
    picture.seek(1)
    assert load_image(picture).pixels[0, 0].tolist() == [0, 240, 0]
    assert picture.tell() == 1


def test_a_lazy_jpeg_in_draft_mode_keeps_its_reduced_size() -> None:
    """The image ends in mid-grey, so the loader also checks the image for missing blocks at full
    size."""
    picture = Image.new("RGB", (320, 320), (128, 128, 128))
    picture.paste((200, 40, 40), (0, 0, 320, 100))
    lazy = Image.open(io.BytesIO(encode(picture, "JPEG")))
    lazy.draft("RGB", (80, 80))
    assert load_image(lazy).pixels.shape == (80, 80, 3)


def test_icc_profiles_are_ignored() -> None:
    data = (IMAGES / "rocket.jpg").read_bytes()
    picture = Image.open(io.BytesIO(data))
    assert picture.info["icc_profile"]
    assert np.array_equal(load_image(data).pixels, np.asarray(picture))


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "RGB", "P"])
def test_the_callers_pil_image_is_unchanged(mode: str) -> None:
    picture = Image.fromarray(noise(9, 7, 4)).convert("RGB" if mode == "P" else "RGBA")
    if mode == "I;16":
        picture = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7))
    picture = picture.convert(mode)
    exif = Image.Exif()
    exif[274] = 6
    picture.info["exif"] = exif.tobytes()
    before = (picture.tobytes(), picture.mode, picture.size, dict(picture.info))
    load_image(picture)
    assert (picture.tobytes(), picture.mode, picture.size, dict(picture.info)) == before


# Files and decoders


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow warns about the later page
def test_a_tiff_is_its_first_page_though_a_later_one_is_damaged() -> None:
    """Counting the pages seeks through the file, and stops at the page before the damage."""
    pages = [Image.new("RGB", size, colour) for size, colour in (((28, 84), "red"), ((56, 56), 0))]
    data = bytearray(encode(pages[0], "TIFF", save_all=True, append_images=[pages[1], pages[1]]))
    start = 4
    for _ in range(2):  # find the second directory's offset of the third directory
        (directory,) = struct.unpack_from("<I", data, start)
        (entries,) = struct.unpack_from("<H", data, directory)
        start = directory + 2 + 12 * entries
    struct.pack_into("<I", data, start, len(data) + 100)
    for source in (bytes(data), Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.picture.mode == "RGB"
        assert image.pixels.shape == (84, 28, 3)
        assert (image.pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_loaded_image_keeps_neither_its_file_nor_its_decoder(file_format: str) -> None:
    image = load_image(encode(chelsea(), file_format, **FORMATS[file_format]))
    assert type(image.picture) is Image.Image
