"""Test that qwen_vit rejects incomplete JPEGs, although libjpeg fills missing blocks."""

import io
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images import jpeg as jpeg_module
from qwen_vit.images.load import load_image
from tests.support import IMAGES

PICTURES = IMAGES
END = b"\xff\xd9"
SCAN = b"\xff\xda"
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "subsampling": 0},
    "restarts": {"restart_marker_blocks": 8},
    "restarts of rows": {"restart_marker_rows": 1, "quality": 95},
    "progressive with restarts": {"progressive": True, "restart_marker_blocks": 8},
}


@cache
def photograph(mode: str = "RGB") -> Image.Image:
    return Image.open(PICTURES / "rocket.jpg").convert(mode)


def encode(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    photograph(mode).save(file, "JPEG", **options)
    return file.getvalue()


def scans(data: bytes) -> list[int]:
    """Return the offsets of a file's scans."""
    begins, at = [], -1
    while (at := data.find(SCAN, at + 1)) >= 0:
        begins.append(at)
    return begins


def code(source: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, name="a.jpg")
    assert str(caught.value).isprintable()
    return caught.value.code


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_picture_has_the_bits_of_pillow(kind: str, mode: str) -> None:
    data = encode(mode, **{name: KINDS[kind][name] for name in KINDS[kind] if mode == "RGB"})
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.array_equal(load_image(source).pixels, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.97])
def test_a_picture_without_its_middle_or_its_end_is_refused(kind: str, share: float) -> None:
    data = encode(**KINDS[kind])
    cut = scans(data)[0] + int((len(data) - scans(data)[0]) * share)
    for rest in (b"", END, data[-200:], data[cut + 3_000 :]):
        if len(data) - cut > len(rest) + 100:
            damaged = data[:cut] + rest
            assert code(damaged) in ("truncated", "damaged"), rest[:2]
            assert code(Image.open(io.BytesIO(damaged))) in ("truncated", "damaged")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_cut_picture_of_another_mode_is_refused(mode: str) -> None:
    data = encode(mode)
    assert code(data[: len(data) // 2]) == "truncated"
    assert code(data[: len(data) // 2] + END) == "damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_a_hole_of_zeros_is_refused(kind: str) -> None:
    data = encode(**KINDS[kind])
    half, page = len(data) // 2, 4096
    for damaged in (
        data[:half] + bytes(len(data) - half),
        data[:half] + bytes(len(data) - half - 2) + END,
        data[:half] + bytes(page) + data[half + page :],
    ):
        assert code(damaged) in ("truncated", "damaged")


def test_a_progressive_picture_cut_after_any_scan_is_refused() -> None:
    """libjpeg warns about no such file, because each remaining scan is complete."""
    data = encode(progressive=True)
    assert len(scans(data)) > 5
    for begin in scans(data)[1:]:
        assert code(data[:begin] + END) == "truncated"


def test_a_header_with_a_larger_size_than_its_data_is_refused() -> None:
    data = bytearray(encode(progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = (3000).to_bytes(2, "big") * 2
    assert code(bytes(data)) == "damaged"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("grey", [128, 127])
def test_a_picture_that_really_ends_in_mid_grey_is_accepted(progressive: bool, grey: int) -> None:
    picture = photograph().copy()
    picture.paste((grey,) * 3, (0, 200, 640, 427))
    file = io.BytesIO()
    picture.save(file, "JPEG", progressive=progressive)
    assert np.array_equal(load_image(file.getvalue()).pixels, np.asarray(Image.open(file)))


@pytest.mark.parametrize("value", [0, 0xA5])
def test_padding_after_a_whole_picture_is_noted(value: int) -> None:
    """Some cameras write such padding. A hole of zeros is longer than the trailing bytes
    that libjpeg ignores."""
    data = encode()
    image = load_image(data[:-2] + bytes([value]) * 600 + END)
    assert np.array_equal(image.pixels, load_image(data).pixels)
    assert any("bytes of padding after the picture" in note for note in image.notes)
    noise = np.random.default_rng(0).integers(0, 255, 600, np.uint8).tobytes()
    assert code(data[:-2] + noise + END) == "damaged"


def test_a_picture_without_its_end_marker_is_refused() -> None:
    """Pillow also rejects such a file, because the loss after the marker is unknown."""
    assert code(encode()[:-2]) == "truncated"


def test_metadata_and_bytes_after_the_end_do_not_matter() -> None:
    """A warning about metadata must not hide a warning about the image, because libjpeg reports
    only the first warning."""
    data = encode()
    odd = data[:2] + b"\xff\xe0\0\x10JFIF\0\x09\x09\0\0\1\0\1\0\0" + data[2:] + b"more" * 100
    assert np.array_equal(load_image(odd).pixels, load_image(data).pixels)
    assert code(odd[: len(data) // 2] + END) == "damaged"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_random_bytes_is_not_called_short(kind: str, seed: int) -> None:
    """Random bytes can hide the end marker, and the error once called a complete file short."""
    data, random = bytearray(encode(**KINDS[kind])), np.random.default_rng(seed)
    start = scans(bytes(data))[0]
    for place in random.integers(start + 14, len(data) - 2, (len(data) - start) // 100):
        data[place] = random.integers(256)
    with pytest.raises(ImageError) as caught:
        load_image(bytes(data), name="a.jpg")
    assert "ends early" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_stops_anywhere_is_truncated(kind: str) -> None:
    data = encode(**KINDS[kind])
    for end in np.random.default_rng(0).integers(scans(data)[0], len(data) - 2, 12):
        with pytest.raises(ImageError, match=f"a truncated JPEG: it ends early after {end} bytes"):
            load_image(data[:end], name="a.jpg")


@pytest.mark.parametrize(
    ("what", "count"), [("scans", 2_000), ("exif", 5_000), ("comments", 20_000)]
)
def test_more_parts_than_any_encoder_writes_are_refused_at_once(what: str, count: int) -> None:
    """2,000 additional scans took 6 s for a 2000 x 2000 image, and Exif segments took quadratic
    time."""
    data = encode("L", progressive=True)
    parts = {
        "scans": (len(data) - 2, data[scans(data)[-1] : -2]),
        "exif": (2, b"\xff\xe1\xff\xffExif\0\0" + bytes(0xFFFF - 8)),
        "comments": (2, b"\xff\xfe\0\x03x"),
    }
    at, part = parts[what]
    data = data[:at] + part * count + data[at:]
    begin = time.process_time()
    assert code(data) == ("damaged" if what == "scans" else "slow")
    assert time.process_time() - begin < 1


def test_many_scans_that_each_add_something_are_refused() -> None:
    """A sequential image may give each of 255 components a separate scan."""
    one = b"\xff\xda\0\x08\x01%c\0\0\x3f\0\x55"
    scan_list = b"".join(one.replace(b"%c", bytes([number])) for number in range(255))
    data = encode("L")
    assert code(data[: scans(data)[0]] + scan_list + END) == "slow"


@pytest.mark.parametrize(
    ("marker", "depth", "kind"),
    [
        (b"\xff\xc1", 12, "12 bits per sample"),
        (b"\xff\xc3", 8, "lossless JPEG"),
        (b"\xff\xc5", 8, "hierarchical"),
    ],
)
def test_a_kind_of_jpeg_that_is_not_read_is_named(marker: bytes, depth: int, kind: str) -> None:
    """The error must not be "damaged", because another download would not help."""
    data = encode().replace(b"\xff\xc0\0\x11\x08", marker + b"\0\x11" + bytes([depth]), 1)
    with pytest.raises(ImageError, match=kind) as caught:
        load_image(data)
    assert caught.value.code == "format"
    assert "Convert it" in caught.value.remedy


def test_bytes_between_segments_are_noted() -> None:
    """libjpeg warns about these bytes, but the image is complete."""
    data = encode()
    at = data.index(b"\xff\xdb")
    image = load_image(data[:at] + b"more" * 9 + data[at:])
    assert np.array_equal(image.pixels, load_image(data).pixels)
    assert "bytes between its segments ignored" in image.notes


def test_a_second_frame_header_is_damage() -> None:
    data = encode()
    frame = data[data.index(b"\xff\xc0") :][:19]
    assert code(data[: scans(data)[0]] + frame + data[scans(data)[0] :]) == "damaged"


def test_every_jpeg_is_checked_for_missing_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library checks the file, but Pillow decodes the pixels."""
    calls = []
    real = jpeg_module.check_blocks

    def watched(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr("qwen_vit.images.decode.check_blocks", watched)
    load_image(encode())
    load_image(Image.open(io.BytesIO(encode())))
    assert len(calls) == 2
