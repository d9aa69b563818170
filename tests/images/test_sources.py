"""Test size limits, paths and other sources, with the remedies of their errors."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.errors import ArgumentError
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.load import load_image
from tests.support import IMAGES
from tests.support.images import FORMATS, chelsea, encode, noise, png, refusal

# Size limits


def test_a_decompression_bomb_is_refused_by_its_header_without_a_warning() -> None:
    message = refusal("too-many-pixels", png(60_000, 60_000, b""), name="bomb.png")
    assert message.startswith(
        "bomb.png: 60000x60000 = 3600000000 pixels. Expected at most 178956970"
    )
    assert "ImageLimits.max_pixels" in message
    picture = Image.new("1", (1, 1))
    picture._size = (60_000, 60_000)
    refusal("too-many-pixels", picture)
    refusal("too-many-pixels", np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_pixel_limit_of_a_call_replaces_pillows_limit(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would warn, because its limit is below the size. Only our limit decides, to the
    pixel."""
    data = encode(chelsea().resize((40, 50)), file_format, **FORMATS[file_format])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    assert "40x50 = 2000 pixels" in refusal(
        "too-many-pixels", data, limits=ImageLimits(max_pixels=1_999)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, limits=ImageLimits(max_pixels=2_000)).height == 50
    assert Image.MAX_IMAGE_PIXELS == 1_500


def test_an_image_above_pillows_own_limit_raises_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(chelsea(), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "MAX_IMAGE_PIXELS" in refusal("too-many-pixels", data)


def test_the_byte_limit_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**33)  # a sparse file: reading 8 GiB would take minutes
    message = refusal("file-too-large", path)
    assert f"{path}: {2**33} bytes. Expected at most {512 * 2**20}." in message
    assert "max_file_bytes" in message
    refusal("file-too-large", b"12345", limits=ImageLimits(max_file_bytes=4))
    refusal("not-an-image", b"12345", limits=ImageLimits(max_file_bytes=5))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("field", ["max_pixels", "max_file_bytes"])
def test_impossible_limits_are_an_argument_error(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{field} is .*above 0"):
        ImageLimits(**{field: value})


# Paths and other sources


def test_paths_that_lead_to_no_file_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.jpg"
    assert f"{missing}: does not exist" in refusal("missing", missing)
    assert f"{tmp_path}: a directory" in refusal("directory", tmp_path)
    dangling = tmp_path / "link.jpg"
    dangling.symlink_to(missing)
    refusal("missing", dangling)
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    assert "cannot be read (" in refusal("unreadable", loop)
    refusal("unreadable", "a\0b.jpg")
    refusal("unreadable", "x" * 5000)
    assert refusal("missing", "") == "'': does not exist. Check the path."


def test_fifos_and_devices_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a FIFO without a writer would hang forever."""
    fifo = tmp_path / "pipe.jpg"
    os.mkfifo(fifo)

    def fail(*args: object, **options: object) -> None:
        pytest.fail("opened")

    monkeypatch.setattr("builtins.open", fail)
    for path in (fifo, "/dev/zero"):
        assert f"{path}: a FIFO, socket or device" in refusal("not-a-file", path)


def test_a_missing_permission_and_a_missing_file_have_different_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test simulates the system's answers, because a superuser has all permissions."""
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"x")
    for error, code in ((PermissionError, "unreadable"), (FileNotFoundError, "missing")):

        def fail(*args: object, error: type[OSError] = error, **options: object) -> None:
            raise error(13, "Permission denied", str(path))

        monkeypatch.setattr("builtins.open", fail)
        message = refusal(code, path)
        assert message.startswith(str(path))
        if code == "unreadable":
            assert "(Permission denied). Check its path and permissions." in message


@pytest.mark.parametrize("name", ["line\nbreak.png", "ünï 猫.png", "-rf.png", b"\xff\xfe.png"])
def test_odd_file_names_work_and_are_kept(tmp_path: Path, name: str | bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    with open(path, "wb") as file:
        file.write(encode(Image.new("RGB", (3, 2))))
    assert os.fsencode(load_image(Path(os.fsdecode(path))).name) == path
    with open(path, "wb") as file:
        file.write(b"<html>")
    refusal("not-an-image", Path(os.fsdecode(path))).encode()


@pytest.mark.parametrize(
    "address",
    ["http://a.b/c.jpg", "HTTPS://a.b/c.jpg", "s3://b/c.png"],
)
def test_addresses_are_refused_with_the_remedy(address: str) -> None:
    message = refusal("url", address)
    assert message.startswith(address)
    assert "Download it first" in message


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("file:///data/a.png", "Pass the path that follows file://"),
        ("data:image/png;base64,iVBORw0KGgo", "base64.b64decode"),
    ],
)
def test_addresses_of_other_schemes_have_a_separate_remedy(address: str, remedy: str) -> None:
    assert remedy in refusal("url", address)


@pytest.mark.parametrize(
    ("source", "kind", "remedy"),
    [
        (None, "NoneType", "Expected a path"),
        (3, "int", "Expected a path"),
        (["a.jpg"], "list", "Give its items one by one"),
        (io.BytesIO(b"..."), "BytesIO", "Give its path, or the bytes that its read() returns"),
        (np.ma.masked_equal(noise(4, 5), 3), "MaskedArray", "values with filled()"),
    ],
)
def test_other_types_are_refused_by_name(source: Any, kind: str, remedy: str) -> None:
    message = refusal("source-type", source)
    assert f"of type {kind}" in message
    assert remedy in message


def test_a_closed_or_empty_pil_image_is_refused() -> None:
    for name in ("rocket.jpg", "chelsea.png"):
        with Image.open(IMAGES / name) as picture:
            pass
        message = refusal("unreadable", picture)
        assert name in message
        assert "Call the image's load() first, or pass the path" in message
    with Image.open(IMAGES / "rocket.jpg") as loaded:
        loaded.load()
    assert load_image(loaded).pixels.shape == (427, 640, 3)
    refusal("zero-side", Image.new("RGB", (0, 5)))


def test_a_long_name_is_shortened_in_messages() -> None:
    message = refusal("not-an-image", b"text", name="n" * 900 + ".png")
    assert message.startswith("n" * 200 + "..." + "n" * 96 + ".png: a text file, not an image")
