"""VisionEncoder as its users meet it: images in, Hugging Face's numbers out, or a plain error."""

import io
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vit import batching
from qwen_vit import device as device_module
from qwen_vit.checkpoint import published_tensors
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.common.prefetch import AHEAD_JOBS
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError, HubError, ImageError, QwenVitError
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images import patches as patches_module
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.model import VisionTower
from tests.support.checkpoints import SMALL, write_checkpoint
from tests.support.goldens import PHOTOGRAPHS, TINY_FOLDER, fp32_budget
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.oracle import read_checkpoint, relative_error, vision_oracle
from tests.support.towers import gpu, random_rows

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "tests" / "images"
SMALL_PIXELS = 28 * 28 * 12  # as many as a fast test wants


@cache
def tiny() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu")


@cache
def small() -> VisionEncoder:
    """The same, with images of at most twelve merged tokens."""
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=SMALL_PIXELS)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def embeds_of(features: Any) -> Tensor:
    assert features.error is None
    assert features.embeds is not None
    return features.embeds


# Hugging Face's numbers


@cache
def theirs() -> torch.nn.Module:
    return hf_tower(TINY_FOLDER)


def processor(max_pixels: int) -> Qwen2VLImageProcessorPil:
    config = load_checkpoint(TINY_FOLDER).image_config
    return Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=max_pixels)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_becomes_what_hugging_faces_processor_and_tower_make_of_it(name: str) -> None:
    limit = 300_000 if name == "astronaut.png" else 120_000  # one large, two that are shrunk
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=limit)
    with Image.open(IMAGES / name) as image:
        inputs = processor(limit)(image.convert("RGB"), return_tensors="pt")
    [grid] = inputs["image_grid_thw"].tolist()
    rows = inputs["pixel_values"].float()
    expected = hf_trace(theirs(), rows, [grid])["merger"]
    tensors, config = read_checkpoint(TINY_FOLDER)
    budget = fp32_budget(expected, vision_oracle(tensors, config, rows, [grid])["merger"])

    [features] = encoder.encode([IMAGES / name])
    by_rows = encoder.encode_patches(inputs["pixel_values"], inputs["image_grid_thw"])
    assert features.grid_thw == tuple(grid)
    for ours in (embeds_of(features), by_rows):
        error = relative_error(ours, expected)
        print(f"{name} {grid}: {error:.2e} of {budget:.1e}")
        assert error <= budget


def test_encode_agrees_with_encode_patches_of_the_same_pixels() -> None:
    images = [picture(56, 84), picture(140, 28, seed=1)]
    parts = [patchify(image, tiny().image_config) for image in images]
    rows = Patches.cat(parts).to_rows(tiny().image_config)
    grids = torch.tensor([[g.t, g.h, g.w] for part in parts for g in part.grids])
    together = tiny().encode_patches(rows, grids)
    ours = torch.cat([embeds_of(features) for features in tiny().encode(images)])
    expected = hf_trace(theirs(), rows, grids.tolist())["merger"]
    assert relative_error(ours, together) <= fp32_budget(expected, together.double())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_pixel_in_one_image_reaches_no_other(poison: float) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    grids = torch.tensor([[1, 4, 6], [1, 10, 6], [1, 4, 6]])
    pixels = torch.randn(24 + 60 + 24, 1176)
    clean = encoder.encode_patches(pixels, grids)
    pixels[30, 5] = poison
    rows = encoder.encode_patches(pixels, grids)
    assert not rows[6:21].isfinite().all()
    assert torch.equal(rows[:6], clean[:6])
    assert torch.equal(rows[21:], clean[21:])


def test_an_image_alone_is_as_near_to_itself_in_a_batch_as_hugging_face_is_to_the_truth() -> None:
    images = [picture(56, 84), picture(28, 28, 1), picture(196, 140, 2), picture(112, 112, 3)]
    batch = tiny().encode(images)
    backwards = tiny().encode(images[::-1])[::-1]
    tensors, config = read_checkpoint(TINY_FOLDER)
    for image, member, other in zip(images, batch, backwards, strict=True):
        [alone] = tiny().encode([image])
        part = patchify(image, tiny().image_config)
        rows = part.to_rows(tiny().image_config)
        oracle = vision_oracle(tensors, config, rows, part.grids)["merger"]
        allowed = relative_error(hf_trace(theirs(), rows, part.grids)["merger"], oracle)
        for ours in (member, other):
            distance = relative_error(embeds_of(ours), embeds_of(alone))
            print(f"{alone.grid_thw}: {distance:.1e} of {allowed:.1e}")
            assert distance <= allowed


def test_the_frames_of_a_video_do_not_attend_to_one_another() -> None:
    rows = random_rows(3 * 48, seed=0)
    grid = torch.tensor([[3, 6, 8]])
    before = tiny().encode_patches(rows, grid).view(3, 12, -1)
    changed = rows.clone()
    changed[48:96] += 1  # the second frame
    after = tiny().encode_patches(changed, grid).view(3, 12, -1)
    assert not torch.allclose(before[1], after[1], rtol=0.1)
    for frame in (0, 2):
        assert relative_error(after[frame], before[frame]) < 1e-6


# Every kind of image


def test_every_kind_of_source_gives_the_same_embeddings_in_the_order_given(
    tmp_path: Path,
) -> None:
    array = picture(56, 84)
    (tmp_path / "a.png").write_bytes(png(array))
    sources: list[Any] = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        png(array),
        bytearray(png(array)),
        Image.fromarray(array),
        array,
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        array.astype(np.float32) / 255,
        array[::-1][::-1],
    ]
    other = picture(56, 112, seed=1)  # between them, so that a mix-up shows
    mixed = [image for source in sources for image in (source, other)]
    results = tiny().encode(mixed)
    assert len(results) == len(mixed)
    for features in results[0::2]:
        assert features.grid_thw == (1, 4, 6)
        assert features.size_px == (56, 84)
        assert relative_error(embeds_of(features), embeds_of(results[0])) < 1e-6
    for features in results[1::2]:
        assert features.grid_thw == (1, 4, 8)
        assert relative_error(embeds_of(features), embeds_of(results[1])) < 1e-6
    ids = [features.id for features in results]
    assert ids[0] == ids[2] == str(tmp_path / "a.png")
    assert ids[4] == "image 4"


def test_no_images_give_an_empty_list() -> None:
    assert tiny().encode([]) == []
    assert list(tiny().encode_iter(iter(()))) == []
    empty = tiny().encode_patches(torch.zeros(0, 1176), torch.zeros(0, 3, dtype=torch.int64))
    assert empty.shape == (0, 192)


def test_kept_features_do_not_keep_their_batch() -> None:
    features = tiny().encode([picture(28, 28), picture(280, 280)])
    small_embeds = embeds_of(features[0])
    assert small_embeds.untyped_storage().nbytes() == small_embeds.numel() * 4


def test_patch_output_is_row_major_and_before_the_merger() -> None:
    images = [picture(56, 84), picture(140, 112, seed=1)]  # 140 x 112: windows are cut
    dense = tiny().encode(images, output="patch")
    merged = tiny().encode(images)
    for patch, features in zip(dense, merged, strict=True):
        assert patch.grid_thw == features.grid_thw
        _, h, w = patch.grid_thw or (0, 0, 0)
        assert embeds_of(patch).shape == (h * w, tiny().config.hidden_size)
        # each 2 x 2 cell of the dense map, merged by Hugging Face, is the token at that cell
        cells = embeds_of(patch).view(h // 2, 2, w // 2, 2, -1).permute(0, 2, 1, 3, 4)
        again = theirs().merger(cells.reshape(h * w, -1))
        assert relative_error(again, embeds_of(features)) < 1e-5


# A single image, and other arguments that are not a list


def one_image(kind: str, folder: Path) -> Any:
    pixels = picture(28, 28)  # an array is one image, not 28 images one pixel high
    path = folder / "a.png"
    path.write_bytes(png(pixels))
    return {
        "str": str(path),
        "path": path,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "tensor": torch.from_numpy(pixels.copy()),
        "patches": patchify(pixels, tiny().image_config),
    }[kind]


KINDS = ("str", "path", "bytes", "bytearray", "PIL", "array", "tensor", "patches")


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_gives_one_result(kind: str, tmp_path: Path) -> None:
    image = one_image(kind, tmp_path)
    features, [in_a_list] = tiny().encode(image), tiny().encode([image])
    assert isinstance(features, ImageFeatures)
    assert torch.equal(features.embeds, in_a_list.embeds)
    assert features.id == in_a_list.id
    assert isinstance(tiny().encode(image, on_error="skip"), ImageFeatures)


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_a_stream_of_one(kind: str, tmp_path: Path) -> None:
    image = one_image(kind, tmp_path)
    [streamed] = tiny().encode_iter(image)
    assert isinstance(streamed, ImageFeatures)
    assert torch.equal(streamed.embeds, tiny().encode(image).embeds)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_stack_of_images_gives_a_list(kind: str) -> None:
    stack: Any = np.stack([picture(28, 28, 1), picture(28, 28, 2)])
    images: Any = stack if kind == "array" else torch.from_numpy(stack)
    results = tiny().encode(images)
    assert isinstance(results, list)
    assert [each.id for each in results] == ["image 0", "image 1"]
    for ours, alone in zip(results, tiny().encode(list(images)), strict=True):
        assert torch.equal(ours.embeds, alone.embeds)
    assert [each.id for each in tiny().encode_iter(images)] == ["image 0", "image 1"]
    assert tiny().encode(images[:0]) == []


def test_a_failed_image_alone_is_told_by_its_type() -> None:
    failed = tiny().encode(b"not an image", on_error="skip")
    assert isinstance(failed, FailedImage)
    assert (failed.id, failed.code, failed.error.name) == ("image 0", "not-an-image", "image 0")
    with pytest.raises(ImageError, match="image 0"):
        tiny().encode(io.BytesIO(b"one"))  # type: ignore[call-overload]


def test_features_are_seen_as_a_map_and_as_numpy() -> None:
    image = picture(56, 84)
    merged, patch = (tiny().encode([image], output=each)[0] for each in ("merged", "patch"))
    assert merged.map.shape == (1, 2, 3, 192)
    assert torch.equal(merged.map[0, 1, 2], merged.embeds[5])
    assert patch.map.shape == (1, 4, 6, 160)
    assert torch.equal(patch.map[0, 3, 1], patch.embeds[19])
    assert merged.map.data_ptr() == merged.embeds.data_ptr()  # a view
    assert merged.numpy().dtype == np.float32
    assert torch.equal(torch.from_numpy(merged.numpy()), merged.embeds)
    with pytest.raises(ArgumentError, match=r"image 0: 5 rows for a grid of \(1, 4, 6\)"):
        _ = replace(merged, embeds=merged.embeds[:5]).map


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"on_error is 'ignore'\. Expected 'raise' or 'skip'"):
        tiny().encode([], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"output is 'pooled'\. Expected 'merged', 'patch' or"):
        tiny().encode_iter([], output="pooled")  # type: ignore[arg-type]  # before the first next()
    with pytest.raises(ArgumentError, match=r"layout is 'xx'\. Expected 'auto', 'HWC' or 'CHW'"):
        tiny().encode([], layout="xx")  # type: ignore[arg-type]
    for limits in (0, 5):
        with pytest.raises(ArgumentError, match=rf"limits is {limits}\. Expected ImageLimits"):
            tiny().encode([], limits=limits)  # type: ignore[arg-type]
    for images in (None, 5):
        with pytest.raises(ArgumentError, match=rf"images is {images}\. Expected an iterable"):
            tiny().encode(images)  # type: ignore[arg-type]


# Images that cannot be encoded


def bad_images(folder: Path) -> dict[str, Any]:
    """The rows of what users get wrong, each by the code that says so."""
    photograph = (IMAGES / "chelsea.png").read_bytes()
    jpeg = (IMAGES / "rocket.jpg").read_bytes()
    os.mkfifo(folder / "fifo")
    (folder / "page.jpg").write_text("<!doctype html><p>not found")
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "empty.png").touch()
    floats = np.zeros((28, 28, 3), np.float32)
    return {
        "truncated": photograph[: len(photograph) // 2],
        "truncated ": jpeg[: len(jpeg) // 2],
        "empty-file": folder / "empty.png",
        "not-an-image": folder / "page.jpg",
        "not-an-image ": folder / "pointer.jpg",
        "format": b"%PDF-1.7 and so on, long enough",
        "ratio": np.zeros((10, 2010, 3), np.uint8),
        "zero-side": np.zeros((0, 28, 3), np.uint8),
        "too-many-pixels": np.zeros((1000, 1001, 3), np.uint8),
        "file-too-large": bytes(2_000_000),
        "array-not-finite": np.full((28, 28, 3), np.nan, np.float32),
        "array-range": floats + 2,
        "array-dtype": np.zeros((28, 28, 3), np.uint16),
        "array-dtype ": np.zeros((28, 28, 3), bool),
        "array-channels": np.zeros((28, 28, 2), np.uint8),
        "array-layout": np.zeros((3, 28, 3), np.uint8),
        "array-shape": np.zeros((2, 28, 28, 3), np.uint8),
        "url": "https://example.org/cat.jpg",
        "missing": folder / "gone.jpg",
        "directory": folder,
        "not-a-file": folder / "fifo",
        "source-type": None,
        "mode": Image.new("F", (28, 28)),
    }


LIMITS = ImageLimits(max_pixels=1_000_000, max_file_bytes=1_999_999)


def test_each_bad_image_is_skipped_with_its_code_and_the_others_go_on(tmp_path: Path) -> None:
    bad = bad_images(tmp_path)
    good = picture(28, 28)
    images = [image for each in bad.values() for image in (each, good)]
    results = small().encode(images, on_error="skip", limits=LIMITS)
    assert len(results) == len(images)
    for code, features in zip(bad, results[0::2], strict=True):
        assert isinstance(features, FailedImage)
        assert features.code == code.strip(), features.message
        assert features.error.name == features.id
        assert features.id in features.message
        assert " at 0x" not in str(features.error)
    for features in results[1::2]:
        assert embeds_of(features).shape == (4, 192)


@pytest.mark.parametrize("code", ["truncated", "missing", "array-range", "ratio"])
def test_a_bad_image_raises_unless_it_is_to_be_skipped(tmp_path: Path, code: str) -> None:
    image = bad_images(tmp_path)[code]
    with pytest.raises(ImageError) as caught:
        small().encode([picture(28, 28), image])
    assert caught.value.code == code


def test_the_error_of_a_skipped_image_does_not_hold_its_file(tmp_path: Path) -> None:
    """An exception's traceback holds every frame's locals: here, the file's bytes."""
    [features] = small().encode([b"not an image"], on_error="skip")
    assert isinstance(features, FailedImage)
    assert features.error.__traceback__ is None
    assert features.error.__context__ is None


# Streaming


def test_encode_iter_takes_images_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 images of 48 patches fit a budget of 200; the fifth is read to see that it does not."""
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 200)
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        for seed in range(14):
            taken += 1
            yield picture(84, 112, seed)

    results = small().encode_iter(source(), decode_threads=1)
    assert taken == 0
    for index, features in enumerate(results):
        assert embeds_of(features).shape == (12, 192)
        assert taken == min(14, index // 4 * 4 + 5)
    assert index == 13


def test_encode_iter_holds_no_image_it_has_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 200)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    watched = patches_module.Patches.cat
    largest = 0

    def counting(parts: Any, **options: Any) -> Patches:
        nonlocal largest
        joined = watched(parts, **options)
        alive.add(joined.pixels)
        largest = max(largest, len(alive))
        return joined

    monkeypatch.setattr(batching.Patches, "cat", counting)
    assert len(list(small().encode_iter(picture(84, 112, seed) for seed in range(20)))) == 20
    assert largest <= 2


def test_a_long_run_of_images_that_fail_is_reported_as_it_goes() -> None:
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        while True:  # without end: only streaming can return anything
            taken += 1
            yield b""

    results = small().encode_iter(source(), on_error="skip")
    assert next(results).error is not None
    assert taken <= batching.IMAGES_IN_A_WINDOW + AHEAD_JOBS + 1


def test_an_image_larger_than_the_budget_is_encoded_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [picture(84, 112, seed) for seed in range(3)]
    expected = small().encode(images)
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 8)
    for ours, other in zip(small().encode(images), expected, strict=True):
        assert relative_error(embeds_of(ours), embeds_of(other)) < 1e-6


# Out of memory


def forget_above(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU whose memory holds `limit` patches; the sizes it was asked for."""
    sizes: list[int] = []
    forward = VisionTower.forward

    def limited(self: VisionTower, patches: Tensor, *arguments: Any) -> Tensor:
        sizes.append(len(patches))
        if len(patches) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, patches, *arguments)

    monkeypatch.setattr(VisionTower, "forward", limited)
    return sizes


def test_a_batch_out_of_memory_is_halved_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [picture(56, 56 + 28 * (i % 2), i) for i in range(7)]
    expected = small().encode(images)
    sizes = forget_above(48, monkeypatch)
    results = small().encode(images)
    assert sizes[0] == 4 * 4 * 4 + 3 * 4 * 6
    assert max(sizes[1:]) > 48  # halved more than once
    assert [features.grid_thw for features in results] == [f.grid_thw for f in expected]
    for ours, other in zip(results, expected, strict=True):
        assert relative_error(embeds_of(ours), embeds_of(other)) < 1e-6


@pytest.mark.parametrize(
    ("device", "change", "told"),
    [
        ("cuda", {"hidden_size": 144, "num_heads": 1}, "head_dim is 144. Expected 16 to 128 on"),
        ("cuda", {"hidden_size": 32, "num_heads": 4}, "head_dim is 8. Expected 16 to 128 on cuda"),
        ("cpu", {"hidden_size": 1032, "num_heads": 1}, "head_dim is 1032. Expected 2 to 1024 on"),
        ("cuda", {"patch_px": 13, "window_px": 104}, "patch_size is 13. Expected an even one"),
        (
            "cuda",
            {"hidden_size": 2048, "num_heads": 1},
            "head_dim is 2048. Expected 16 to 128 on cuda",
        ),
    ],
)
def test_an_architecture_that_a_device_cannot_compute_is_refused(
    device: str, change: dict[str, int], told: str
) -> None:
    device_module.check_fits(SMALL, torch.device(device))
    with pytest.raises(CheckpointError, match=rf"{told}.*\. (Use device='cpu'|Choose another)"):
        device_module.check_fits(replace(SMALL, **change), torch.device(device))


def test_nothing_of_a_batch_is_kept_while_its_halves_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its result fitted the GPU's memory, and a second copy of it did not."""
    results: list[weakref.ref[Tensor]] = []
    kept: list[bool] = []
    forward = VisionEncoder.forward

    def watched(self: VisionEncoder, *arguments: Any) -> Tensor:
        kept.extend(result() is not None for result in results)
        result = forward(self, *arguments)
        results.append(weakref.ref(result))
        return result

    def copies(whole: Tensor, rows: list[int]) -> list[Tensor]:
        if len(results) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return [part.clone() for part in whole.split(rows)]

    monkeypatch.setattr(VisionEncoder, "forward", watched)
    whole = small()
    monkeypatch.setattr(torch, "split_with_sizes_copy", copies)
    assert len(whole.encode([picture(56, 56, seed) for seed in range(2)])) == 2
    assert kept[:1] == [False]


def test_one_image_out_of_memory_is_named_and_skipped_or_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(png(picture(84, 112)))
    images = [picture(56, 56), large, picture(56, 56, 1)]
    forget_above(16, monkeypatch)
    results = small().encode(images, on_error="skip")
    assert [type(each) for each in results] == [ImageFeatures, FailedImage, ImageFeatures]
    failed = results[1]
    assert isinstance(failed, FailedImage)
    error = failed.error
    assert (failed.size_px, error.code) == ((84, 112), "out-of-memory")
    for word in (str(large), "48 patches", "cpu", "Lower max_pixels"):
        assert word in str(error)
    with pytest.raises(ImageError, match="do not fit the memory") as caught:
        small().encode(images)
    assert caught.value.code == "out-of-memory"


# Hugging Face's rows


ROWS = torch.zeros(24, 1176)
GRID = torch.tensor([[1, 4, 6]])
BAD_PATCHES = {
    "too few rows": (ROWS[:20], GRID, "patches", ("(20, 1176)", "(24, 1176)")),
    "too many rows": (ROWS, torch.tensor([[1, 4, 4]]), "patches", ("(24, 1176)", "(16, 1176)")),
    "one image too few": (ROWS, torch.tensor([[1, 4, 6]] * 2), "patches", ("(48, 1176)",)),
    "narrow rows": (ROWS[:, :588], GRID, "patches", ("(24, 588)", "(24, 1176)")),
    "flat": (ROWS.flatten(), GRID, "patches", ("(28224,)", "(24, 1176)")),
    "integers": (ROWS.long(), GRID, "patches", ("torch.int64", "floating-point")),
    "bytes": (ROWS.byte(), GRID, "patches", ("torch.uint8", "floating-point")),
    "an array": (ROWS.numpy(), GRID, "patches", ("ndarray", "torch tensor")),
    "odd height": (ROWS[:18], torch.tensor([[1, 3, 6]]), "grid", ("(1, 3, 6)", "multiples of 2")),
    "odd width": (ROWS[:20], torch.tensor([[1, 4, 5]]), "grid", ("(1, 4, 5)", "multiples of 2")),
    "zero": (ROWS[:0], torch.tensor([[1, 0, 6]]), "grid", ("(1, 0, 6)", "at least 1")),
    "zero frames": (ROWS[:0], torch.tensor([[0, 4, 6]]), "grid", ("(0, 4, 6)", "at least 1")),
    "negative twice": (ROWS, torch.tensor([[1, -4, -6]]), "grid", ("(1, -4, -6)", "at least 1")),
    "negative": (ROWS, torch.tensor([[1, -4, 6]]), "patches", ("(24, 1176)", "(-24, 1176)")),
    "float grid": (ROWS, GRID.float(), "grid", ("torch.float32", "integer")),
    "bool grid": (ROWS, GRID.bool(), "grid", ("torch.bool", "integer")),
    "flat grid": (ROWS, GRID[0], "grid", ("(3,)", "(images, 3)")),
    "grid of 2": (ROWS, GRID[:, 1:], "grid", ("(1, 2)", "(images, 3)")),
    "list grid": (ROWS, [[1, 4, 6]], "grid", ("a list", "(images, 3)")),
    "huge": (ROWS, torch.tensor([[1, 2**40, 2**40]]), "patches", (str(2**80),)),
}


@pytest.mark.parametrize("fault", BAD_PATCHES)
def test_rows_and_grids_that_disagree_are_refused_before_any_kernel(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = forget_above(-1, monkeypatch)
    rows, grid, code, words = BAD_PATCHES[fault]
    with pytest.raises(ImageError) as caught:
        tiny().encode_patches(rows, grid)  # type: ignore[arg-type]
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)
    assert sizes == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_any_floating_type_are_taken(dtype: torch.dtype) -> None:
    rows = random_rows(24, seed=3).to(dtype)
    ours = tiny().encode_patches(rows, GRID.int())
    assert ours.dtype == torch.float32
    assert torch.equal(ours, tiny().encode_patches(rows.float(), GRID))


# Pixels before normalisation


def pixel_rows_of(image: Patches) -> Tensor:
    """(N, 1176) uint8 rows as a processor cuts a still image: both frames the same."""
    pixels = image.pixels.view(len(image.pixels), 3, 1, 196)
    return pixels.expand(-1, -1, 2, -1).flatten(1)


def test_still_rows_have_the_bits_of_encode() -> None:
    images = [patchify(picture(56, 84, seed), tiny().image_config) for seed in range(3)]
    rows = torch.cat([pixel_rows_of(each) for each in images])
    grids = torch.tensor([[1, 4, 6]] * 3)
    ours = tiny().encode_pixels(rows, grids)
    assert torch.equal(ours, torch.cat([each.embeds for each in tiny().encode(images)]))
    before = rows.clone()
    tiny().encode_pixels(rows, grids)
    assert torch.equal(rows, before)


def test_rows_of_a_video_have_the_bits_of_encode_patches() -> None:
    chance = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (48, 1176), dtype=torch.uint8, generator=chance)
    grid = torch.tensor([[2, 4, 6]])
    config = tiny().image_config
    mean, std = (torch.tensor(each)[:, None] for each in (config.image_mean, config.image_std))
    floats = ((rows.view(48, 3, 392).float() / 255 - mean) / std).flatten(1)
    ours = tiny().encode_pixels(rows, grid, still=False)
    assert torch.equal(ours, tiny().encode_patches(floats, grid))
    still = tiny().encode_pixels(rows, grid)  # another answer: only the first frames were read
    assert relative_error(still, ours) > 1e-3


@pytest.mark.parametrize("fault", ["float", "narrow", "few", "array"])
def test_pixel_rows_of_another_kind_are_refused(fault: str) -> None:
    rows = ROWS.byte()
    wrong: Any = {
        "float": ROWS, "narrow": rows[:, :588], "few": rows[:20], "array": rows.numpy(),
    }[fault]  # fmt: skip
    with pytest.raises(ImageError, match="rows is") as caught:
        tiny().encode_pixels(wrong, GRID)
    assert caught.value.code == "patches"


# from_pretrained


def test_tensors_of_somebody_elses_give_the_same_bits() -> None:
    checkpoint = tiny().checkpoint
    tensors = {f"model.visual.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    ours = VisionEncoder.from_tensors(
        tensors, checkpoint.config.to_json(), checkpoint.image_config, name="mine", device="cpu"
    )
    image = picture(56, 84)
    assert torch.equal(ours.encode([image])[0].embeds, tiny().encode([image])[0].embeds)
    same = ours.metadata() | {"model": "tiny"}
    assert (ours.metadata()["model"], same) == ("mine", tiny().metadata())
    del tensors["model.visual.blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"1 of 66 .*missing"):
        VisionEncoder.from_tensors(tensors, checkpoint.config, device="cpu")


@gpu
def test_tensors_on_a_gpu_give_the_same_bits() -> None:
    theirs = VisionEncoder.from_pretrained("tiny", device="cuda")
    tensors = {name: tensor.cuda() for name, tensor in theirs.checkpoint.tensors.items()}
    ours = VisionEncoder.from_tensors(tensors, theirs.config, device="cuda")
    image = picture(56, 84)
    assert torch.equal(ours.encode([image])[0].embeds, theirs.encode([image])[0].embeds)
    assert ours.metadata()["weights_sha256"] == theirs.metadata()["weights_sha256"]


def test_other_ways_to_build_or_move_one_name_the_right_way() -> None:
    with pytest.raises(ArgumentError, match=r'VisionEncoder\.from_pretrained\("tiny"\)'):
        VisionEncoder("tiny")  # type: ignore[call-arg,arg-type]
    with pytest.raises(ArgumentError, match=r"VisionEncoder\.from_pretrained"):
        VisionEncoder(model="tiny")  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match="Pass device= and dtype= to"):
        tiny().to("cuda")
    with pytest.raises(ArgumentError, match="Pass dtype="):
        VisionEncoder.from_pretrained("tiny", torch_dtype=torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Pass device="):
        VisionEncoder.from_pretrained("tiny", device_map="auto")  # type: ignore[arg-type]


REFUSED_ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "float16": ({"dtype": "float16"}, ("float16 is refused", "overflow", "bfloat16 or float32")),
    "torch.float16": ({"dtype": torch.float16}, ("float16 is refused", "overflow")),
    "bfloat16 on cpu": ({"dtype": "bfloat16"}, ("bfloat16", "CPU", "float32", "a GPU")),
    "float64": ({"dtype": torch.float64}, ("torch.float64", "Expected")),
    "unknown dtype": ({"dtype": "bf-16"}, ("'bf-16'", "'auto', 'bfloat16' or 'float32'")),
    "module as dtype": ({"dtype": "nn"}, ("'nn'", "'auto', 'bfloat16' or 'float32'")),
    "mps": ({"device": "mps"}, ("'mps'", "NVIDIA GPU ('cuda') or 'cpu'")),
    "meta": ({"device": "meta"}, ("'meta'", "'cpu'")),
    "unknown device": ({"device": "gpu"}, ("'gpu'", "'auto', 'cpu', 'cuda' or 'cuda:1'")),
    "device None": ({"device": None}, ("None", "'auto', 'cpu', 'cuda' or 'cuda:1'")),
    "max below min": ({"max_pixels": 100}, ("max_pixels 100", "min_pixels 3136", "Pass other")),
    "min above max": ({"min_pixels": 10**8}, ("min_pixels 100000000", "Pass other")),
    "max below a token": ({"min_pixels": 1, "max_pixels": 783}, ("783", "Pass other")),
    "zero": ({"min_pixels": 0}, ("min_pixels is 0", "Pass other")),
    "no number": ({"max_pixels": "many"}, ("'many'", "an integer", "Pass other")),
}


@pytest.mark.parametrize("fault", REFUSED_ARGUMENTS)
def test_arguments_that_fit_no_machine_or_model_are_refused_with_the_reason(fault: str) -> None:
    arguments, words = REFUSED_ARGUMENTS[fault]
    with pytest.raises(ArgumentError) as caught:
        VisionEncoder.from_pretrained("tiny", **{"device": "cpu", **arguments})
    for word in words:
        assert word in str(caught.value)


def pretend_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


def test_cuda_without_a_gpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(ArgumentError, match=r"sees no CUDA GPU\. Install an NVIDIA driver"):
        VisionEncoder.from_pretrained("tiny", device="cuda")


def test_a_gpu_that_is_not_there_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(ArgumentError, match=r"'cuda:2', but there are 2 GPUs\. Count from 0"):
        VisionEncoder.from_pretrained("tiny", device="cuda:2")


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:0"])
def test_a_gpu_older_than_ampere_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pretend_gpus(monkeypatch, 1, capability=(7, 5))
    with pytest.raises(ArgumentError, match=r"Tesla T4 .* 7\.5\. Expected 8\.0 .*'cpu'"):
        VisionEncoder.from_pretrained("tiny", device=device)


def test_the_newest_device_and_type_are_chosen_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpus(monkeypatch, 2, capability=(8, 0))
    device = device_module.choose_device("auto")
    assert device == torch.device("cuda", 0)
    assert device_module.choose_dtype("auto", device) == torch.bfloat16
    assert device_module.choose_dtype("float32", device) == torch.float32


def test_computing_on_the_cpu_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, 0)
    device_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="qwen_vit"):
        for _ in range(3):
            encoder = VisionEncoder.from_pretrained("tiny")
    assert (encoder.device, encoder.dtype) == (torch.device("cpu"), torch.float32)
    [said] = caplog.messages
    assert "no CUDA GPU" in said
    assert "interpreter" in said
    caplog.clear()
    VisionEncoder.from_pretrained("tiny", device="cpu")  # who asks for it needs no telling
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("tinny", HubError, ("'tinny'", "neither a folder", "'tiny'")),
        ("no/such/folder", CheckpointError, ("no/such/folder: does not exist", "Check the path")),
        ("{tmp}", CheckpointError, ("{tmp}", "Expected model.safetensors")),
        ("{tmp}/config", CheckpointError, ("{tmp}/config", "Expected model.safetensors")),
        ("{tmp}/weights", CheckpointError, ("{tmp}/weights", "config.json")),
    ],
)
def test_a_model_that_is_not_there_is_named(
    tmp_path: Path, model: str, kind: type[QwenVitError], words: tuple[str, ...]
) -> None:
    for part in ("config", "weights"):
        write_checkpoint(tmp_path / part, SMALL)
    (tmp_path / "config" / "model.safetensors").unlink()
    (tmp_path / "weights" / "config.json").unlink()
    (tmp_path / "config.txt").touch()
    with pytest.raises(kind) as caught:
        VisionEncoder.from_pretrained(model.format(tmp=tmp_path), device="cpu")
    for word in words:
        assert word.format(tmp=tmp_path) in str(caught.value)


def test_pixel_limits_replace_the_checkpoints_own() -> None:
    image = picture(560, 560)
    [features] = small().encode([image])
    assert features.grid_thw == (1, 6, 6)
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", min_pixels=28 * 28 * 30)
    [grown] = encoder.encode([picture(28, 28)])
    assert grown.grid_thw == (1, 12, 12)
    assert encoder.metadata()["image_policy"] != tiny().metadata()["image_policy"]


def test_metadata_names_model_hashes_versions_and_policy() -> None:
    facts = tiny().metadata()
    assert (facts["model"], facts["commit"], facts["dtype"]) == ("tiny", None, "float32")
    assert len(facts["weights_sha256"]) == len(facts["config_sha256"]) == 64
    assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert facts == VisionEncoder.from_pretrained(TINY_FOLDER).metadata() | {"model": "tiny"}


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["-c", "from qwen_vit import VisionEncoder"], 1), (["-m", "qwen_vit", "info", "tiny"], 2)],
    ids=["python", "command"],
)
def test_without_triton_the_import_says_what_to_install(
    tmp_path: Path, arguments: list[str], exit_code: int
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no wheel for this')")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == exit_code
    assert ("Traceback" in done.stderr) == (exit_code == 1)
    assert "rror: qwen_vit needs Triton" in done.stderr
    assert "pip install 'triton>=3.6'" in done.stderr


def test_a_name_that_is_given_comes_back_as_the_id(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9\n.png")
    odd.write_bytes(png(picture(28, 28)))
    [features] = small().encode([odd])
    assert features.id == str(odd)
    assert os.fsencode(features.id).endswith(b"caf\xe9\n.png")
    assert load_image(odd).name == features.id


def test_autocast_around_a_call_changes_nothing() -> None:
    """Autocast once reached into the products: 6e-3 off, silently."""
    rows, grid_thw = torch.randn(24, 1176), torch.tensor([[1, 4, 6]])
    plain = tiny().encode_patches(rows, grid_thw)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny().encode_patches(rows, grid_thw), plain)


def test_a_default_device_of_the_caller_changes_nothing(tmp_path: Path) -> None:
    qkv, angles = torch.randn(10, 3, 2, 80), torch.rand(10, 40)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    torch.set_default_device("meta")
    try:
        encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
        [features] = encoder.encode([np.zeros((56, 84, 3), np.uint8)])
        path = write_features(tmp_path / "f.safetensors", [features], encoder.metadata())
        stored = load_features(path)
        taken = stored.to_vllm()["image"]
        found = [features.embeds, stored[0].embeds, stored.image_grid_thw, *taken.values()]
        found.append(fused_rope_varlen_attention(qkv, angles.cos(), angles.sin(), cu_seqlens))
    finally:
        torch.set_default_device(None)
    for tensor in found:
        assert tensor is not None
        assert tensor.device.type == "cpu"


def test_the_layout_of_an_ambiguous_array_can_be_given() -> None:
    array = np.zeros((3, 40, 3), np.uint8)
    with pytest.raises(ImageError, match="layout="):
        tiny().encode([array])
    [features] = tiny().encode([array], layout="CHW")
    assert features.size_px == (40, 3)


def test_the_recorded_hash_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    first = encoder.metadata()["weights_sha256"]
    monkeypatch.setattr(published_tensors, "weights_hash", None)
    assert encoder.metadata()["weights_sha256"] == first
