"""Test pages of a TIFF and frames of an animation as separate images with separate ids."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.features import FailedImage
from qwen_vit.images import pages as pages_module
from qwen_vit.images.image import ImageLimits, ImagePage
from qwen_vit.images.load import load_image
from qwen_vit.images.pages import count_pages, split_pages
from tests.support.images import heic

RANDOM = np.random.default_rng(0)
FRAMES = [Image.fromarray(RANDOM.integers(0, 255, (56, 84, 3), np.uint8)) for _ in range(3)]


def several(file_format: str, frames: list[Image.Image] | None = None, **options: Any) -> bytes:
    first, *rest = frames or FRAMES
    file = io.BytesIO()
    first.save(file, file_format, save_all=True, append_images=rest, **options)
    return file.getvalue()


FILES = {
    "TIFF": several("TIFF", compression="tiff_lzw"),
    "GIF": several("GIF"),
    "PNG": several("PNG"),
    "WEBP": several("WEBP", lossless=True),
    "AVIF": several("AVIF"),
    "HEIF": heic(*FRAMES),
}


@pytest.mark.parametrize("file_format", FILES)
def test_each_page_is_the_picture_that_pillow_shows(file_format: str) -> None:
    data = FILES[file_format]
    assert count_pages(data, "a", ImageLimits()) == 3
    found = [load_image(page, name=name) for page, name in split_pages(data, "a", ImageLimits())]
    assert [each.name for each in found] == ["a#page=1", "a#page=2", "a#page=3"]
    assert [each.notes[-1] for each in found] == ["page 1", "page 2", "page 3"]
    assert len({each.notes[:-1] for each in found}) == 1  # such as "P to RGB" in a GIF
    for page, frame in zip(found, FRAMES, strict=True):
        difference = np.abs(page.pixels - np.asarray(frame).astype(int))
        assert difference.max() == 0 or file_format in ("GIF", "AVIF", "HEIF")
        # A page is closest to its own frame.
        others = [np.abs(page.pixels - np.asarray(f).astype(int)).mean() for f in FRAMES]
        assert min(others) == difference.mean()
    if file_format != "HEIF":
        with Image.open(io.BytesIO(data)) as image:
            for number, page in enumerate(found):
                image.seek(number)
                assert np.array_equal(page.pixels, np.asarray(image.convert("RGB")))


def test_pages_may_differ_in_size_and_mode() -> None:
    frames = [FRAMES[0], Image.new("L", (30, 40), 7), Image.new("RGBA", (20, 30), (0, 0, 0, 0))]
    data = several("TIFF", frames)
    sizes = [load_image(ImagePage(data, page)).picture.size for page in (1, 2, 3)]
    assert sizes == [(84, 56), (30, 40), (20, 30)]
    assert (load_image(ImagePage(data, 3)).pixels == 255).all()


def test_a_damaged_page_costs_no_other() -> None:
    frames = [Image.fromarray(RANDOM.integers(0, 255, (56, 84), np.uint8)) for _ in range(3)]
    data = several("TIFF", frames, compression="tiff_adobe_deflate")
    with Image.open(io.BytesIO(data)) as image:
        image.seek(1)
        [offset] = image.tag_v2[273]  # type: ignore[attr-defined]
    torn = bytearray(data)
    torn[offset : offset + 40] = b"\xff" * 40
    assert np.array_equal(
        load_image(ImagePage(bytes(torn), 3)).pixels[..., 0], np.asarray(frames[2])
    )
    with pytest.raises(ImageError):
        load_image(ImagePage(bytes(torn), 2))


def test_a_missing_page_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        load_image(ImagePage(FILES["TIFF"], 4), name="a")
    assert caught.value.code == "truncated"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_frames_of_a_gif_are_counted_as_pillow_counts_them(count: int) -> None:
    frames = [Image.new("RGB", (8, 8), (50 * number, 0, 0)) for number in range(count)]
    for options in ({}, {"optimize": False, "disposal": 2, "comment": b"x" * 700}):
        data = several("GIF", frames, **options)
        with Image.open(io.BytesIO(data)) as image:
            assert count_pages(data, "a", ImageLimits()) == getattr(image, "n_frames", 1) == count


def test_a_million_frames_are_refused_at_once() -> None:
    head = b"GIF89a" + b"\x08\0\x08\0\x80\0\0" + bytes(6)
    frame = b"," + bytes(4) + b"\x08\0\x08\0\0" + b"\x02\x02\x4c\x01\0"
    data = head + frame * 1_000_000 + b";"
    begin = time.monotonic()
    with pytest.raises(ImageError, match="more than 10,000 pages or frames") as caught:
        list(split_pages(data, "a.gif", ImageLimits()))
    assert caught.value.code == "slow"
    assert time.monotonic() - begin < 1


def test_pages_of_a_tiff_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_PAGES", 2)
    with pytest.raises(ImageError, match="more than 2 pages"):
        count_pages(FILES["TIFF"], "a", ImageLimits())
    with pytest.raises(ImageError, match="more than 2 pages"):
        count_pages(FILES["WEBP"], "a", ImageLimits())


# encode


def test_encode_gives_every_page(encoder: VisionEncoder, tmp_path: Path) -> None:
    path, still = tmp_path / "scan.tif", tmp_path / "still.png"
    path.write_bytes(FILES["TIFF"])
    FRAMES[1].save(still)
    found = encoder.encode([path, FRAMES[2], still], frames="all")
    names = [*(f"{path}#page={page}" for page in (1, 2, 3)), "image 1", str(still)]
    assert [each.id for each in found] == names
    expected = encoder.encode([*FRAMES, FRAMES[2], FRAMES[1]])
    for one, other in zip(found, expected, strict=True):
        assert not isinstance(one, FailedImage)
        assert one.embeds.equal(other.embeds)
    assert encoder.encode(path).id == str(path)  # a path gives its first page
    [single] = encoder.encode(still, frames="all")
    assert single.id == str(still)


def test_frames_of_a_pil_image_leave_it_where_it_was(encoder: VisionEncoder) -> None:
    with Image.open(io.BytesIO(FILES["TIFF"])) as image:
        image.seek(1)
        found = encoder.encode(image, frames="all")
        assert image.tell() == 1
    assert [each.id for each in found] == [f"image 0#page={page}" for page in (1, 2, 3)]
    for one, other in zip(found, encoder.encode(FRAMES), strict=True):
        assert not isinstance(one, FailedImage)
        assert one.embeds.equal(other.embeds)


def test_a_bad_file_is_one_failure(encoder: VisionEncoder) -> None:
    found = encoder.encode([b"text", FILES["GIF"][:60], "no.tif"], frames="all", on_error="skip")
    assert [type(each) for each in found] == [FailedImage] * 3
    with pytest.raises(ArgumentError, match="frames"):
        encoder.encode([], frames="some")  # type: ignore[call-overload]
