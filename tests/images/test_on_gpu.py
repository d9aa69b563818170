"""Test that the kernels, in Triton's interpreter, give resizes and patches Pillow's bits."""

import logging
from collections.abc import Sequence

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.images import on_gpu, pillow_order
from qwen_vit.images import picture as picture_module
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.images.picture import Picture, resizes_on
from qwen_vit.kernels import resize
from tests.support.images import noise
from tests.support.towers import CPU, gpu
from tests.support.triton_interpreter import RUNS_HERE
from tools.checks.resize import wrong_cases, wrong_embeddings, wrong_wholes
from tools.checks.resize_cases import KINDS, ResizeCase, make_cases

SMALL_AREA, MAX_TAPS = 3_000, 25  # the interpreter takes 0.3 ms for each operation of a tap
CONFIG = ImageConfig.from_json({"min_pixels": 784, "max_pixels": 2_500})
needs_interpreter = pytest.mark.skipif(not RUNS_HERE, reason="Triton 3.6 with NumPy 2.4")


def small_cases(count: int) -> list[ResizeCase]:
    """Return up to `count` small cases of each kind."""
    found: dict[str, list[ResizeCase]] = {kind: [] for kind in KINDS}
    for case in make_cases(3, 200):
        area = max(case.old[0] * case.old[1], case.new[0] * case.new[1])
        taps = max(map(resize.n_taps, case.old, case.new))
        if area <= SMALL_AREA and taps <= MAX_TAPS and len(found[case.kind]) < count:
            found[case.kind].append(case)
    return [case for each in found.values() for case in each]


@needs_interpreter
def test_every_kind_of_resize_has_the_bits_of_pillow(interpreted: None) -> None:
    cases = small_cases(2)
    assert {case.kind for case in cases} == {"any", "grow", "one pixel", "one pass"}
    assert wrong_cases(cases, CPU) == []


@needs_interpreter
def test_a_wrong_weight_is_found(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "n_taps", lambda n_in, n_out: resize.n_taps(n_in, n_out) - 2)
    assert wrong_cases([case for case in small_cases(1) if case.content != "flat"], CPU)


@needs_interpreter
def test_a_batch_of_pictures_and_patches_is_in_order(interpreted: None) -> None:
    images = [Image.fromarray(noise(h, w, seed=h)) for h, w in [(30, 50), (28, 56), (65, 40)]]
    right = [patchify(image, CONFIG) for image in images]
    parts: list[Patches | Picture] = [Picture.of(image, CONFIG) for image in images]
    for index in range(3):
        mixed = [*parts[:index], right[index], *parts[index + 1 :]]
        joined = on_gpu.patches_on_gpu(mixed, CPU, pinned_rows=0)
        assert torch.equal(joined.pixels, torch.cat([each.pixels for each in right]))
        assert joined.grids == tuple(grid for each in right for grid in each.grids)
    joined = on_gpu.patches_on_gpu(parts, CPU, pinned_rows=0)
    assert torch.equal(joined.pixels, torch.cat([each.pixels for each in right]))


def pixels_of(picture: Picture) -> np.ndarray:
    width, height = picture.size
    return np.frombuffer(b"".join(picture.blocks), np.uint8).reshape(height, width, 4)[..., :3]


@pytest.mark.parametrize("size", [(1, 1), (56, 84), (2100, 2001), (3000, 4100)])
def test_a_picture_gives_the_bytes_of_its_pixels(size: tuple[int, int]) -> None:
    """Pillow splits pictures of over 16 MB into several blocks of memory."""
    rgb = np.resize(np.arange(251, dtype=np.uint8), (*size, 3))
    picture = Picture.of(Image.fromarray(rgb), ImageConfig.from_json({}))
    assert np.array_equal(pixels_of(picture), rgb)
    assert sum(map(len, picture.blocks)) == picture.n_bytes


def test_a_picture_in_foreign_memory_gives_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("Image rows are not contiguous in memory.")

    rgb = noise(20, 30)
    monkeypatch.setattr(Image.Image, "__arrow_c_array__", refuse)
    assert np.array_equal(pixels_of(Picture.of(Image.fromarray(rgb), CONFIG)), rgb)


def test_the_cpu_path_joins_the_bands_of_a_large_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture_module, "BLOCK_BYTES", 2_000)
    image = Image.fromarray(noise(70, 50))
    picture = Picture.of(image, CONFIG)
    assert len(picture.parts) == len(picture.blocks) > 2
    assert np.array_equal(pixels_of(picture), np.asarray(image))
    assert torch.equal(picture.patchify().pixels, patchify(image, CONFIG).pixels)


@pytest.mark.parametrize("large_bytes", [1, 50, 10_000])  # NumPy copies these
@pytest.mark.parametrize("staged_bytes", [7, 100, 10_000])
def test_an_upload_has_all_bytes_in_order(
    staged_bytes: int, large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_gpu, "LARGE_BYTES", large_bytes)
    monkeypatch.setattr(on_gpu, "STAGED_BYTES", staged_bytes)
    blocks = [bytes(range(n)) for n in (0, 1, 6, 100, 255)]
    buffer = torch.zeros(400, dtype=torch.uint8)
    on_gpu._copy_staged(map(memoryview, blocks), buffer)
    assert bytes(buffer.tolist()) == b"".join(blocks).ljust(400, b"\0")


def test_the_bytes_of_a_picture_outlive_the_image() -> None:
    image = Image.fromarray(noise(300, 300))
    expected = np.asarray(image).copy()
    picture = Picture.of(image.copy(), CONFIG)
    for _ in range(20):
        Image.new("RGB", (300, 300))  # would reuse freed memory
    assert np.array_equal(pixels_of(picture), expected)


def test_a_picture_is_refused_as_its_patches_are() -> None:
    for image in (Image.new("RGB", (1, 300)), Image.new("L", (30, 30))):
        with pytest.raises(ImageError) as ours:
            Picture.of(image, CONFIG, name="x.png")
        with pytest.raises(ImageError) as theirs:
            patchify(image, CONFIG, name="x.png")
        assert (ours.value.code, str(ours.value)) == (theirs.value.code, str(theirs.value))


ORDERS = [  # (old, new, vertically first in 12.3.0, in 13.0.0)
    ((100, 100), (50, 50), False, False),
    ((100, 101), (100, 99), False, True),
    ((100, 200), (50, 100), False, False),  # the height shrinks by exactly twice the factor
    ((100, 200), (50, 99), False, True),
    ((50, 100), (80, 99), False, True),  # the width grows
    ((50, 100), (20, 200), False, False),
    ((60, 12_000), (60, 11_999), True, True),
    ((60, 6_000), (90, 5_000), False, True),  # the height is exactly 100 times the width
    ((60, 6_001), (2, 6_000), True, False),
]


@pytest.mark.parametrize(("old", "new", "in_12", "in_13"), ORDERS)
def test_the_order_of_the_axes_is_that_of_the_version(
    old: tuple[int, int], new: tuple[int, int], in_12: bool, in_13: bool
) -> None:
    for version, is_vertical_first in (("12.3.0", in_12), ("13.0.0", in_13)):
        found = pillow_order.passes(old, new, version)
        assert len(found) == sum(a != b for a, b in zip(old, new, strict=True))
        if len(found) == 2:
            assert (found[0] == "vertical") == is_vertical_first


@pytest.mark.parametrize(("old", "new"), [each[:2] for each in ORDERS[:6]])
def test_the_installed_pillow_has_that_order(old: tuple[int, int], new: tuple[int, int]) -> None:
    """A resize in two calls, axis by axis, shows the order by its bits."""
    if PIL.__version__ not in pillow_order.KNOWN_PILLOWS:
        pytest.skip(f"Pillow {PIL.__version__}")
    edges = Image.fromarray((noise(*old[::-1], seed=1) > 127).astype(np.uint8) * 255)

    def in_order(axes: Sequence[str]) -> Image.Image:
        image = edges
        for axis in axes:
            size = (new[0], image.height) if axis == "horizontal" else (image.width, new[1])
            image = image.resize(size, Image.Resampling.BICUBIC)
        return image

    axes = pillow_order.passes(old, new)
    resized = edges.resize(new, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(in_order(axes)), np.asarray(resized))
    if len(axes) == 2:
        assert not np.array_equal(np.asarray(in_order(axes[::-1])), np.asarray(resized))


def test_an_unknown_pillow_resizes_on_the_cpu_and_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow_order, "KNOWN_PILLOWS", {})
    pillow_order.knows_pillow.cache_clear()
    with caplog.at_level(logging.WARNING, "qwen_vit"):
        assert not resizes_on(torch.device("cuda"))
        assert not resizes_on(torch.device("cuda"))
    pillow_order.knows_pillow.cache_clear()
    assert len(caplog.messages) == 1
    assert PIL.__version__ in caplog.text
    assert not resizes_on(CPU)


@gpu
def test_the_gpu_has_the_bits_of_pillow() -> None:
    device = torch.device("cuda")
    assert wrong_cases(make_cases(11, 150), device) == []
    for most in (200_000, 12_845_056):
        assert wrong_wholes(ImageConfig.from_json({"max_pixels": most}), device) == 0
    assert wrong_embeddings(device) == 0
