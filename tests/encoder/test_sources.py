"""Test that every kind of image, alone or in a list, gives one result in order."""

import inspect
import io
import os
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import patchify
from tests.support.encoders import embeds_of, picture, png, small, tiny
from tests.support.huggingface import tiny_hf_tower
from tests.support.oracle import relative_error

# Every kind of image


def test_every_kind_of_source_gives_the_same_embeddings_in_order(
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
    # different images between them, so that a wrong order is found
    other = picture(56, 112, seed=1)
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
    # 140 x 112 pixels: some windows are incomplete
    images = [picture(56, 84), picture(140, 112, seed=1)]
    dense = tiny().encode(images, output="patch")
    merged = tiny().encode(images)
    for patch, features in zip(dense, merged, strict=True):
        assert patch.grid_thw == features.grid_thw
        _, h, w = patch.grid_thw or (0, 0, 0)
        assert embeds_of(patch).shape == (h * w, tiny().config.hidden_size)
        # Hugging Face's merger of each 2 x 2 cell of the map gives the token of this cell
        cells = embeds_of(patch).view(h // 2, 2, w // 2, 2, -1).permute(0, 2, 1, 3, 4)
        again = tiny_hf_tower().merger(cells.reshape(h * w, -1))
        assert relative_error(again, embeds_of(features)) < 1e-5


# A single image, and other arguments that are not a list


def one_image(kind: str, folder: Path) -> Any:
    pixels = picture(28, 28)  # one image, and not 28 images of one pixel row
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


def test_a_single_failed_image_has_its_own_type() -> None:
    failed = tiny().encode(b"not an image", on_error="skip")
    assert isinstance(failed, FailedImage)
    assert (failed.id, failed.code, failed.error.name) == ("image 0", "not-an-image", "image 0")
    with pytest.raises(ImageError, match="image 0"):
        tiny().encode(io.BytesIO(b"one"))


def test_features_are_available_as_a_map_and_as_numpy() -> None:
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
        tiny().encode([], on_error="ignore")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"output is 'pooled'\. Expected 'merged', 'patch' or"):
        tiny().encode_iter([], output="pooled")  # type: ignore[call-overload]  # before the first next()
    with pytest.raises(ArgumentError, match=r"layout is 'xx'\. Expected 'auto', 'HWC' or 'CHW'"):
        tiny().encode([], layout="xx")  # type: ignore[call-overload]
    for limits in (0, 5):
        with pytest.raises(ArgumentError, match=rf"limits is {limits}\. Expected ImageLimits"):
            tiny().encode([], limits=limits)  # type: ignore[call-overload]
    for images in (None, 5):
        with pytest.raises(
            ArgumentError, match=rf"images is {images}\. Expected an image, or an iterable"
        ):
            tiny().encode(images)  # type: ignore[call-overload]


# from_pretrained


def test_a_given_name_is_the_id(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9\n.png")
    odd.write_bytes(png(picture(28, 28)))
    [features] = small().encode([odd])
    assert features.id == str(odd)
    assert os.fsencode(features.id).endswith(b"caf\xe9\n.png")
    assert load_image(odd).name == features.id


def test_the_layout_of_an_ambiguous_array_can_be_given() -> None:
    array = np.zeros((3, 40, 3), np.uint8)
    with pytest.raises(ImageError, match="layout="):
        tiny().encode([array])
    [features] = tiny().encode([array], layout="CHW")
    assert features.size_px == (40, 3)


@pytest.mark.parametrize("name", ["encode", "encode_iter", "encode_video"])
def test_help_names_the_type_aliases(name: str) -> None:
    """help() once began with 1,300 characters of unions."""
    method = getattr(VisionEncoder, name)
    signature = str(inspect.signature(method))
    assert "Images" in signature or "Videos" in signature
    assert len(signature) < 500
    assert "memoryview" in str(typing.get_type_hints(method))  # tools can still resolve them
