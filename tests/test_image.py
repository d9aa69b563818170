"""The image policy, the same from every kind of source, and one error for each bad input."""

import ast
import io
import os
import re
import signal
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

import qwen_vit
from qwen_vit.errors import IMAGE_CODES, ArgumentError, ImageError
from qwen_vit.images import decode as image_module
from qwen_vit.images.image import ImageLimits, RgbImage
from qwen_vit.images.load import load_image
from qwen_vit.images.truncation import ends_early, promised_bytes

IMAGES = Path(__file__).parent / "images"
FORMATS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "AVIF": {"quality": 90},
}
TIFF_COMPRESSIONS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def chelsea() -> Image.Image:
    return Image.open(IMAGES / "chelsea.png").convert("RGB")


def refusal(code: str, source: Any, **options: Any) -> str:
    """The message of the ImageError with this code that loading the source must raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError) as caught:
            load_image(source, **options)
    message = str(caught.value)
    assert caught.value.code == code, message
    assert code in IMAGE_CODES
    assert not re.search(r"0x[0-9a-f]{6}", message)
    assert "\n" not in message
    return message


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, scanlines: bytes, *, colour: int = 2, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(scanlines))
        + png_chunk(b"IEND", b"")
    )


def with_png_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header, where tRNS of grey and RGB may stand."""
    return data[:33] + png_chunk(kind, content) + data[33:]


def test_every_code_of_the_table_is_tested() -> None:
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert [code for code in IMAGE_CODES if f'"{code}"' not in tests] == []


def test_every_code_of_the_package_is_in_the_table() -> None:
    for path in Path(qwen_vit.__file__).parent.rglob("*.py"):
        source = path.read_text("utf-8")
        assert set(re.findall(r'code="([^"]+)"', source)) <= set(IMAGE_CODES)
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "ImageError":
                assert "code" in {keyword.arg for keyword in call.keywords}, (path, call.lineno)


# One policy for every source


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


def test_the_result_is_rgb_uint8_contiguous_and_its_own() -> None:
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
    sources = [
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
    """The picture as stored is the upright one under the inverse of what the tag asks for."""
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


def half_transparent() -> np.ndarray:
    rgba = noise(8, 10, 4)
    rgba[:, :3, 3], rgba[:, 3:6, 3] = 0, 255
    return rgba


def on_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return colour * alpha + 255 * (1 - alpha)


def test_alpha_is_composited_on_white_from_every_source() -> None:
    rgba = half_transparent()
    picture = Image.fromarray(rgba)
    sources = [rgba, rgba.transpose(2, 0, 1), rgba / 255, torch.from_numpy(rgba), picture]
    sources += [encode(picture, f, lossless=True) for f in ("PNG", "WEBP", "TIFF")]
    first = load_image(rgba).pixels
    assert np.abs(first - on_white(rgba)).max() <= 1  # integer compositing rounds once
    assert (first[:, :3] == 255).all()
    assert np.array_equal(first[:, 3:6], rgba[:, 3:6, :3])
    for source in sources:
        image = load_image(source)
        # WebP may change the colour of what cannot be seen, nothing else
        assert np.array_equal(image.pixels, first)
        assert "alpha composited on white" in image.notes


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA", "P"])
def test_every_alpha_mode_is_composited_on_white(mode: str) -> None:
    grey = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
    alpha = np.full((3, 4), 255, np.uint8)
    alpha[0] = 0
    picture = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if mode == "PA":
        picture = picture.convert("RGBA").convert("PA")
    elif mode == "P":
        picture = Image.fromarray(grey).convert("P")
        picture.info["transparency"] = bytes(0 if i in grey[0] else 255 for i in range(256))
    elif mode == "RGBa":
        picture = picture.convert("RGBA").convert("RGBa")
    elif mode == "La":
        picture = picture.convert("La")
    assert picture.mode == mode
    expected = grey.copy()
    expected[0] = 255
    pixels = load_image(picture).pixels
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= (8 if mode == "PA" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16", "RGB 16-bit"])
def test_a_transparent_colour_of_a_png_becomes_white(mode: str) -> None:
    """The transparent colour is the darkest, so a loader that ignores it leaves it black."""
    if mode == "RGB 16-bit":
        scanlines = b"\0" + struct.pack(">6H", 0x0102, 3, 4, 0x4002, 0x5003, 0x6004)
        data = png(1, 2, scanlines, depth=16)
        data = with_png_chunk(data, b"tRNS", struct.pack(">3H", 0x0102, 3, 4))
        expected = [[[255, 255, 255], [0x40, 0x50, 0x60]]]
    elif mode == "I;16":
        data = png(1, 2, b"\0" + struct.pack(">2H", 0x0102, 0x4002), colour=0, depth=16)
        data = with_png_chunk(data, b"tRNS", struct.pack(">H", 0x0102))
        expected = [[[255] * 3, [0x40] * 3]]
    else:
        picture = Image.new(mode, (2, 1), 0 if mode != "RGB" else (0, 0, 0))
        if mode == "P":
            picture.putpalette([0, 0, 0, 200, 200, 200])
        white = {"1": 1, "L": 200, "RGB": (200, 200, 200), "P": 1}[mode]
        picture.putpixel((1, 0), white)
        data = encode(picture, transparency=(0, 0, 0) if mode == "RGB" else 0)
        expected = [[[255] * 3, [255 if mode == "1" else 200] * 3]]
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source)
        assert image.pixels.tolist() == expected
        assert "alpha composited on white" in image.notes


@pytest.mark.parametrize("kind", ["grey", "rgb", "rgba", "pil-big-endian", "tiff"])
def test_sixteen_bit_samples_keep_their_high_byte(kind: str) -> None:
    values = (np.arange(0, 65536, 4096) + 300).astype(np.uint16).reshape(4, 4)
    grey = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
    source: Any
    if kind == "grey":
        source = encode(Image.fromarray(values))
    elif kind == "tiff":
        source = encode(Image.fromarray(values), "TIFF")
    elif kind == "pil-big-endian":
        source = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    else:
        count = {"rgb": 3, "rgba": 4}[kind]
        wide = np.repeat(values[..., None], count, 2).astype(">u2")
        if kind == "rgba":
            wide[..., 3] = 65535
        scanlines = b"".join(b"\0" + row.tobytes() for row in wide)
        source = png(4, 4, scanlines, colour={"rgb": 2, "rgba": 6}[kind], depth=16)
    image = load_image(source)
    assert np.array_equal(image.pixels, grey)
    assert "16-bit scaled to 8" in image.notes


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LAB"])
def test_colour_modes_become_rgb(mode: str) -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:8] = 255
    colour[8:, 8:] = (200, 30, 60) if mode not in ("1", "L") else 255
    picture = Image.fromarray(colour)
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
        source = ImageCms.applyTransform(picture, transform)
    else:
        source = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
    assert source is not None
    assert source.mode == mode
    image = load_image(source)
    assert np.abs(image.pixels.astype(int) - colour).max() <= 4
    assert f"{mode} to RGB" in image.notes


def test_a_cmyk_jpeg_file_is_not_inverted() -> None:
    picture = Image.new("RGB", (32, 32), (250, 20, 30))
    image = load_image(encode(picture.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.pixels.astype(int) - (250, 20, 30)).max() <= 6


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("#f00000", "#00f000", "#0000f0")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    image = load_image(data)
    assert np.abs(image.pixels.astype(int) - (240, 0, 0)).max() <= 4
    counted = "several" if file_format in ("GIF", "TIFF") else "3"  # would need the whole file
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
    """It ends in mid-grey, so it is also checked for missing blocks, at its full size."""
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


# Arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("first", [False, True])
def test_a_channel_axis_is_found_wherever_it_is(
    shape: tuple[int, ...], kind: str, first: bool
) -> None:
    array = noise(5, 7, 4, seed=3)
    array = array[..., 0] if len(shape) == 2 else array[..., : shape[2]]
    given_array = np.moveaxis(array, 2, 0) if first and array.ndim == 3 else array
    source: Any = torch.from_numpy(given_array.copy()) if kind == "torch" else given_array
    image = load_image(source)
    rgb = array[..., None].repeat(3, 2) if array.ndim == 2 else array
    rgb = rgb.repeat(3, 2) if rgb.shape[2] == 1 else rgb
    expected = on_white(rgb) if rgb.shape[2] == 4 else rgb
    assert np.abs(image.pixels - expected).max() <= (1 if rgb.shape[2] == 4 else 0)
    assert image.format == ("tensor" if kind == "torch" else "array")


@pytest.mark.parametrize("shape", [(3, 5, 3), (1, 5, 3), (4, 5, 1), (3, 3, 3)])
def test_an_ambiguous_channel_order_asks_for_layout(shape: tuple[int, ...]) -> None:
    array = noise(*shape)
    message = refusal("array-layout", array, name="frame 7")
    assert message.startswith(f"frame 7: its shape {shape} has an ambiguous channel axis")
    assert 'layout="HWC"' in message
    hwc, chw = load_image(array, layout="HWC").pixels, load_image(array, layout="CHW").pixels
    assert hwc.shape[:2] == shape[:2]
    assert chw.shape[:2] == shape[1:]
    if shape == (3, 3, 3):
        assert np.array_equal(hwc, array)
        assert np.array_equal(chw, array.transpose(1, 2, 0))


def test_layout_is_believed_and_checked() -> None:
    assert "last axis" in refusal("array-channels", noise(3, 20, 30), layout="HWC")
    assert "first axis" in refusal("array-channels", noise(20, 30, 3), layout="CHW")
    with pytest.raises(ArgumentError, match=r'layout is \'BGR\'\. Expected "auto", "HWC" or "CHW"'):
        load_image(noise(4, 5), layout="BGR")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(20, 30, 2), (2, 20, 30), (20, 30, 5)])
def test_other_channel_counts_are_refused(shape: tuple[int, ...]) -> None:
    message = refusal("array-channels", np.zeros(shape, np.uint8))
    assert f"{shape}. Expected 1, 3 or 4 channels on the last or first axis." in message
    assert "Select or convert" in message


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((2, 8, 8, 3), "one by one, as a list"), ((8,), "(H, W, 3)"), ((), "(H, W, 3)")],
)
def test_a_batch_or_a_vector_is_refused(shape: tuple[int, ...], remedy: str) -> None:
    message = refusal("array-shape", np.zeros(shape, np.uint8))
    assert f"shape is {shape}. Expected 2 or 3 axes" in message
    assert remedy in message


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 0, 3), (3, 0, 8), (0, 0), (0, 5)])
def test_an_array_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    assert "Expected sides above 0" in refusal("zero-side", np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (np.uint16, "Scale to 0..255"),
        (bool, "Multiply by 255"),
        (np.int64, "Cast to uint8"),
        (np.int8, "Cast to uint8"),
        (np.complex64, "Cast to uint8"),
        (object, "Cast to uint8"),
    ],
)
def test_other_dtypes_are_refused_by_name(dtype: Any, remedy: str) -> None:
    message = refusal("array-dtype", np.zeros((8, 8, 3), dtype), name="frame 7")
    assert message.startswith("frame 7: ")
    assert f"dtype is {np.dtype(dtype)}" in message
    assert remedy in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint16, torch.complex64])
def test_other_tensor_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    message = refusal("array-dtype", torch.zeros(8, 8, 3, dtype=dtype))
    assert str(dtype).removeprefix("torch.") in message


def test_a_tensor_without_plain_values_is_refused() -> None:
    assert "device meta" in refusal("array-dtype", torch.zeros(8, 8, 3, device="meta"))
    assert "sparse" in refusal("array-dtype", torch.zeros(8, 8).to_sparse())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_tensors_with_gradients_are_scaled(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 0.5], [0.25, 1.0]], dtype=dtype, requires_grad=True)
    assert load_image(tensor).pixels[..., 0].tolist() == [[0, 128], [64, 255]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_level_survives_division_by_255(dtype: Any) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = load_image((levels / 255).astype(dtype)).pixels
    assert np.array_equal(pixels[..., 0], levels)


def test_halves_round_to_even() -> None:
    values = np.array([[0.5, 1.5, 2.5]]) / 255
    assert load_image(values).pixels[0, :, 0].tolist() == [0, 2, 2]


def test_nan_and_infinity_are_counted() -> None:
    array = np.zeros((8, 8, 3), np.float32)
    array[0, 0], array[1, 0, 0] = np.nan, np.inf
    message = refusal("array-not-finite", array)
    assert "3 NaN and 1 infinite of 192 values" in message
    assert "nan_to_num" in message


def test_values_out_of_range_are_counted_with_their_extremes() -> None:
    array = np.full((8, 8, 3), 0.5)
    array[0, 0], array[1, 0, 0] = 1.25, -2
    message = refusal("array-range", array)
    assert "4 of 192 values outside [0, 1] (smallest -2, largest 1.25)" in message
    assert "uint8" in message


@pytest.mark.parametrize("view", ["negative", "step", "transposed", "read-only", "fortran"])
def test_any_memory_order_works(view: str) -> None:
    array = noise(12, 10)
    views = {
        "negative": lambda a: a[::-1, ::-1],
        "step": lambda a: a[::2, ::3],
        "transposed": lambda a: a.transpose(1, 0, 2),
        "read-only": lambda a: a,
        "fortran": np.asfortranarray,
    }
    array.flags.writeable = view != "read-only"
    source = views[view](array)
    assert np.array_equal(load_image(source).pixels, source)


WHOLE_FILES = [encode(chelsea().resize((9, 7)), f, **options) for f, options in FORMATS.items()]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *WHOLE_FILES]), st.integers(0, 400))
def test_arbitrary_damage_is_an_image_or_an_image_error(
    damage: bytes, data: bytes, at: int
) -> None:
    """Whatever bytes come, no library's own error, warning about size, or address gets out."""
    outcome: RgbImage | ImageError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            outcome = load_image(data[:at] + damage + data[at + len(damage) :])
    except ImageError as error:
        outcome = error
    if isinstance(outcome, ImageError):
        assert outcome.code in IMAGE_CODES
        assert "object at" not in str(outcome)
    else:
        assert isinstance(outcome, RgbImage)


# Files that are no whole image


def cut_cases() -> list[Any]:
    cases = [(f, o) for f, o in FORMATS.items() if f != "TIFF"]
    cases += [("JPEG", {"progressive": True}), ("WEBP", {"quality": 80})]
    cases += [("TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS]
    return [pytest.param(f, o, id=f"{f}-{'-'.join(map(str, o.values()))}") for f, o in cases]


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF", "ignore:Tag data")
@pytest.mark.parametrize("someone_set_the_flag", [False, True])
@pytest.mark.parametrize(("file_format", "options"), cut_cases())
def test_a_truncated_file_is_refused_and_never_filled_up(
    file_format: str,
    options: dict[str, Any],
    someone_set_the_flag: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LOAD_TRUNCATED_IMAGES, which other libraries set, must change nothing, and stay set."""
    data = encode(chelsea(), file_format, **options)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", someone_set_the_flag)
    for part in (0.001, 0.01, 0.1, 0.5, 0.9):
        cut = data[: max(16, int(len(data) * part))]
        message = refusal("truncated", cut, name="holiday")
        assert message.startswith(f"holiday: a truncated {file_format}: it ends early")
        assert f" {len(cut)} bytes. Fetch it again." in message
        assert someone_set_the_flag is ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_a_truncated_lazy_pil_image_is_refused(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(chelsea(), file_format)
    picture = Image.open(io.BytesIO(data[: len(data) // 2]))
    assert "Fetch it again" in refusal("truncated", picture)


@pytest.mark.parametrize("rows", [0, 1, 10, 19])
def test_a_png_with_missing_rows_is_refused(rows: int) -> None:
    """Pillow decodes these without an error and leaves the rest black."""
    line = b"\0" + bytes(range(60))
    data = png(20, 20, line * rows)
    refusal("truncated", data)
    refusal("truncated", Image.open(io.BytesIO(data)))
    assert load_image(png(20, 20, line * 20)).pixels.min() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 17)])
def test_a_whole_png_of_any_kind_is_accepted(mode: str, size: tuple[int, int]) -> None:
    assert load_image(encode(Image.new(mode, size))).pixels.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("missing", [0, 1])
def test_an_interlaced_png_is_whole_only_with_all_seven_passes(missing: int) -> None:
    """5 x 3 grey pixels: passes of 1x1, 1x1, -, 1x1, 3x1, 2x2 and 5x1 (width x height)."""
    passes = [(1, 1), (1, 1), (1, 1), (3, 1), (2, 2), (5, 1)]
    lines = b"".join((b"\0" + b"\7" * width) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1)
    data = png(3, 5, lines[: len(lines) - missing], colour=0)
    data = data[:8] + png_chunk(b"IHDR", header) + data[33:]
    if missing:
        refusal("truncated", data)
    else:
        assert (load_image(data).pixels == 7).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_really_ends_in_mid_grey_is_accepted(progressive: bool) -> None:
    picture = chelsea()
    picture.paste((128, 128, 128), (0, 150, 451, 300))
    data = encode(picture, "JPEG", progressive=progressive)
    pixels = load_image(data).pixels
    assert pixels[-1, -1].tolist() == [128, 128, 128]
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


def test_a_tiff_with_unlisted_strips_is_refused() -> None:
    """One strip of 400 rows is listed; the header is made to say that a strip has 100."""
    data = bytearray(encode(Image.fromarray(noise(400, 400)), "TIFF"))
    load_image(bytes(data))
    directory = struct.unpack_from("<I", data, 4)[0]
    rows_per_strip = data.index(struct.pack("<HHI", 278, 4, 1), directory)
    struct.pack_into("<I", data, rows_per_strip + 8, 100)
    refusal("truncated", bytes(data))


@pytest.mark.parametrize(
    ("data", "code", "hint"),
    [
        (b"", "empty-file", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "not-an-image", "a web page"),
        (b"\xef\xbb\xbf \n<HTML>", "not-an-image", "a web page"),
        (b'<?xml version="1.0"?>\n<!-- -->\n<svg/>', "not-an-image", "SVG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not-an-image", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not-an-image", "git lfs pull"),
        (b"just some text", "not-an-image", "Expected JPEG, PNG"),
        (b"\0" * 100, "not-an-image", "Expected JPEG, PNG"),
        (b"\x89PN", "not-an-image", "Expected JPEG, PNG"),
        (b"%PDF-1.7", "format", "Render the page"),
        (b"8BPS\0\1", "format", "Photoshop"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "format", "JPEG XL"),
        (b"\x93NUMPY\1\0", "format", "numpy.load"),
        (b"PK\3\4", "format", "Unpack"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_what_is_not_an_image_says_how_it_starts(
    data: bytes, code: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(data)
    message = refusal(code, path)
    assert message.startswith(str(path))
    assert hint in message
    if data:
        assert f"starts with {data[:16]!r}" in message


@pytest.mark.parametrize("file_format", ["ICO", "PPM", "JPEG2000", "EPS", "TGA", "PCX"])
def test_formats_outside_the_allow_list_are_refused(file_format: str) -> None:
    data = encode(chelsea(), file_format)
    code = "not-an-image" if file_format == "PCX" else "format"  # new TGAs have a signature
    assert "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF" in refusal(code, data)


def test_a_damaged_file_is_told_from_a_truncated_one() -> None:
    data = bytearray(encode(chelsea()))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    message = refusal("damaged", bytes(data), name="x.png")
    assert message.startswith("x.png: a damaged PNG (")


@pytest.mark.parametrize("error", [struct.error, SyntaxError, OverflowError, KeyError, ValueError])
def test_a_plug_in_error_of_any_class_becomes_an_image_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error("<_io.BytesIO object at 0x7f00deadbeef>")

    data = encode(chelsea())
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", fail)
    assert error.__name__ in refusal("damaged", data)


def test_running_out_of_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    clear = encode(Image.new("RGBA", (5, 4)))
    for place, data in (
        ("PIL.PngImagePlugin.PngImageFile.load_prepare", encode(chelsea())),
        ("PIL.Image.alpha_composite", clear),  # after decoding
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            assert "Make it smaller" in refusal("memory", data)


# Size limits


def test_a_bomb_is_refused_from_its_header_and_without_a_warning() -> None:
    message = refusal("too-many-pixels", png(60_000, 60_000, b""), name="bomb.png")
    assert message.startswith(
        "bomb.png: 60000x60000 = 3600000000 pixels. Expected at most 178956970"
    )
    assert "ImageLimits.max_pixels" in message
    picture = Image.new("1", (1, 1))
    picture._size = (60_000, 60_000)  # type: ignore[attr-defined]
    refusal("too-many-pixels", picture)
    refusal("too-many-pixels", np.broadcast_to(np.uint8(0), (60_000, 60_000, 3)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_pixel_limit_holds_per_call_whatever_pillows_is(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Pillow's limit below the size it would warn; ours alone decides, to the pixel."""
    data = encode(chelsea().resize((40, 50)), file_format, **FORMATS[file_format])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    assert "40x50 = 2000 pixels" in refusal(
        "too-many-pixels", data, limits=ImageLimits(max_pixels=1_999)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, limits=ImageLimits(max_pixels=2_000)).height == 50
    assert Image.MAX_IMAGE_PIXELS == 1_500


def test_pillows_own_limit_is_reported_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(chelsea(), "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "MAX_IMAGE_PIXELS" in refusal("too-many-pixels", data)


def test_the_byte_limit_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**33)  # sparse: 8 GiB that would take minutes to read
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
    """Opening a FIFO that nobody writes to would hang for ever."""
    fifo = tmp_path / "pipe.jpg"
    os.mkfifo(fifo)

    def fail(*args: object, **options: object) -> None:
        pytest.fail("opened")

    monkeypatch.setattr("builtins.open", fail)
    for path in (fifo, "/dev/zero"):
        assert f"{path}: a FIFO, socket or device" in refusal("not-a-file", path)


def test_permission_and_vanishing_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answers are simulated: a superuser is never refused."""
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
def test_addresses_that_no_download_helps_have_a_remedy_of_their_own(
    address: str, remedy: str
) -> None:
    assert remedy in refusal("url", address)


@pytest.mark.parametrize(
    ("source", "kind", "remedy"),
    [
        (None, "NoneType", "Expected a path"),
        (3, "int", "Expected a path"),
        (["a.jpg"], "list", "Give its items one by one"),
        (io.BytesIO(b"..."), "BytesIO", "Give its path, or the bytes that its read() returns"),
        (np.ma.masked_equal(noise(4, 5), 3), "MaskedArray", "with its filled()"),
    ],
)
def test_other_types_are_refused_by_name(source: Any, kind: str, remedy: str) -> None:
    message = refusal("source-type", source)
    assert f"of type {kind}" in message
    assert remedy in message


def test_an_array_of_a_subclass_is_an_array() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        grey = np.matrix(noise(4, 5, 1)[:, :, 0])
    assert np.array_equal(load_image(grey).pixels, load_image(np.asarray(grey)).pixels)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixel_types_without_a_white_level_are_refused(mode: str) -> None:
    picture = Image.new(mode, (4, 4))
    for source in (picture, encode(picture, "TIFF")):
        message = refusal("mode", source, name="depth.tif")
        assert message.startswith(
            f"depth.tif: Pillow mode {mode} does not say which value is white"
        )
        assert "Scale it to 0..255" in message


def test_a_closed_or_empty_pil_image_is_refused() -> None:
    for name in ("rocket.jpg", "chelsea.png"):
        with Image.open(IMAGES / name) as picture:
            pass
        message = refusal("unreadable", picture)
        assert name in message
        assert "Call its load() first, or pass the path" in message
    with Image.open(IMAGES / "rocket.jpg") as loaded:
        loaded.load()
    assert load_image(loaded).pixels.shape == (427, 640, 3)
    refusal("zero-side", Image.new("RGB", (0, 5)))


def test_a_deep_pil_image_is_the_same_when_it_is_loaded_already() -> None:
    """Once loaded, Pillow no longer says that the samples had 16 bits: the clear colour does."""
    clear = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    lines = [b"\0" + b"\xff" * 48] * 4 + [b"\0" + clear * 8] * 4
    data = with_png_chunk(png(8, 8, b"".join(lines), depth=16), b"tRNS", clear)
    picture = Image.open(io.BytesIO(data))
    first, again = load_image(picture).pixels, load_image(picture).pixels
    assert np.array_equal(first, load_image(data).pixels)
    assert np.array_equal(again, first)
    assert (first == 255).all()  # white, and what is clear on white


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so of the later page
def test_a_tiff_is_its_first_page_though_a_later_one_is_damaged() -> None:
    """Counting its pages moves through the file, and stops at the page before the damage."""
    pages = [Image.new("RGB", size, colour) for size, colour in (((28, 84), "red"), ((56, 56), 0))]
    data = bytearray(encode(pages[0], "TIFF", save_all=True, append_images=[pages[1], pages[1]]))
    start = 4
    for _ in range(2):  # to where the second page says where the third one is
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
def test_what_was_loaded_holds_neither_its_file_nor_its_decoder(file_format: str) -> None:
    image = load_image(encode(chelsea(), file_format, **FORMATS[file_format]))
    assert type(image.picture) is Image.Image


def test_a_large_flat_png_holds_all_of_its_rows() -> None:
    """One compressed chunk inflates to more than is looked at in one go."""
    picture = Image.new("RGB", (1500, 1000), (9, 8, 7))
    assert (load_image(encode(picture)).pixels == (9, 8, 7)).all()


BIG_TIFF = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1) + bytes(20)
AVIF_BOXES = struct.pack(">I4sI", 12, b"ftyp", 0)
PROMISED = {
    "BigTIFF": ("TIFF", BIG_TIFF, 16 + 20),
    "BigTIFF, large-endian": ("TIFF", b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, 3), 16 + 60),
    "BigTIFF without entries": ("TIFF", b"II+\0\x08\0\0\0" + struct.pack("<Q", 900), 902),
    "AVIF": ("AVIF", AVIF_BOXES + struct.pack(">I4s", 400, b"mdat"), 412),
    "AVIF, 64 bits": ("AVIF", AVIF_BOXES + struct.pack(">I4sQ", 1, b"mdat", 500), 512),
    "AVIF, to the end": ("AVIF", AVIF_BOXES + struct.pack(">I4s", 0, b"mdat"), 0),
    "WEBP": ("WEBP", b"RIFF" + struct.pack("<I", 92) + b"WEBP", 100),
    "GIF": ("GIF", b"GIF89a", 0),
}


@pytest.mark.parametrize("what", PROMISED)
def test_a_container_promises_a_length(what: str) -> None:
    file_format, data, length = PROMISED[what]
    assert promised_bytes(data, file_format) == length
    assert ends_early(data, file_format) == (length > len(data))


def test_a_flag_that_another_thread_needs_is_not_put_back_before_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cut file would be filled up with grey meanwhile."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with image_module._strictly():
        with image_module._strictly():
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_negated_view_of_a_tensor_is_its_values() -> None:
    values = torch.complex(torch.zeros(4, 5), torch.linspace(-1, 0, 20).view(4, 5)).conj().imag
    assert values.is_neg()
    assert np.array_equal(load_image(values).pixels, load_image(values.resolve_neg()).pixels)


def test_a_long_name_is_shortened_in_messages() -> None:
    message = refusal("not-an-image", b"text", name="n" * 900 + ".png")
    assert message.startswith("n" * 200 + "..." + "n" * 96 + ".png: not an image")


# Threads


def test_many_threads_load_the_same_things_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, cut files and one shared lazy PIL image; the process-wide flag comes back."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(chelsea(), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def load(source: Any) -> np.ndarray | str:
        try:
            return load_image(source).pixels
        except ImageError as error:
            return error.code

    for _ in range(5):
        shared = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(load, [data, data[:-3000], shared] * 16))
        for index, result in enumerate(results):
            if index % 3 == 1:
                assert isinstance(result, str)
                assert result == "truncated"
            else:
                assert np.array_equal(result, expected)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_that_share_a_pil_image_all_turn_it_upright(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While one thread parses the EXIF, Pillow tells another that there is none."""
    parse = Image.Exif.load

    def parse_slowly(self: Image.Exif, data: bytes) -> None:
        time.sleep(0.01)
        parse(self, data)

    monkeypatch.setattr(Image.Exif, "load", parse_slowly)
    exif = Image.Exif()
    exif[274] = 6
    # with a resolution of its own, or Pillow asks the EXIF for one when it opens the file
    data = encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif, dpi=(72, 72))
    shared = Image.open(io.BytesIO(data))
    with ThreadPoolExecutor(4) as pool:
        shapes = {image.pixels.shape for image in pool.map(load_image, [shared] * 8)}
    assert shapes == {(40, 20, 3)}


def test_threads_that_share_a_lazy_pil_image_take_turns() -> None:
    """Pillow's own loading, started twice at once, reads one file from two places."""
    expected = np.asarray(Image.open(IMAGES / "astronaut.png"))
    threads = 4
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            shared, barrier = Image.open(IMAGES / "astronaut.png"), Barrier(threads)

            def load(shared: Image.Image = shared, barrier: Barrier = barrier) -> np.ndarray:
                barrier.wait()
                return load_image(shared).pixels

            for future in [pool.submit(load) for _ in range(threads)]:
                assert np.array_equal(future.result(), expected)


def test_a_fork_while_other_threads_decode_leaves_no_lock_and_no_flag_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    data = buffer.getvalue()
    locks = [*image_module.LOAD_LOCKS, image_module._Strictness.lock]
    with image_module._strictly(), ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        child = os.fork()
        if child == 0:
            pixels = load_image(data).pixels
            os._exit(0 if pixels.shape == (4, 4, 3) and ImageFile.LOAD_TRUNCATED_IMAGES else 1)
        for _ in range(600):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
