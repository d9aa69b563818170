"""Test `encode` with image structs, rows and columns of Hugging Face's datasets."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ImageError
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.load import load_image, unwrap
from tests.support.export_stress import tiny_png
from tests.support.parquet_files import structs


def check_same(found: Any, expected: list[ImageFeatures]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.embeds.equal(other.embeds)


def test_structs_rows_and_columns_encode_like_their_images(encoder: VisionEncoder) -> None:
    expected = encoder.encode([tiny_png(n) for n in range(3)])
    alone = [encoder.encode(tiny_png(1))] * 2
    lazy = datasets.Dataset.from_dict({"image": structs(range(3)), "label": [4, 5, 6]})
    decoded = lazy.cast_column("image", datasets.Image())
    for dataset in (lazy, decoded):
        check_same(encoder.encode(dataset["image"]), expected)
        check_same(encoder.encode(dataset), expected)
        # each image alone, because the bits depend on the batch on a CPU
        check_same([encoder.encode(dataset[1]), encoder.encode(dataset[1]["image"])], alone)
    assert [each.id for each in encoder.encode(lazy)] == ["image 0", "image 1", "image 2"]


def test_a_path_is_read_if_a_struct_has_no_bytes(encoder: VisionEncoder, tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Path(path).write_bytes(tiny_png(1))
    found = encoder.encode({"bytes": None, "path": path})
    assert found.id == path
    assert found.embeds.equal(encoder.encode(path).embeds)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"bytes": None, "path": None}, "both values are None"),
        ({}, "0 images; its keys are none"),
        ({"label": 3, "text": "x"}, "'label', 'text'"),
        ({"a": {"bytes": b"x"}, "b": {"path": "y"}}, "2 images"),
        ({"bytes": "text", "path": "a.png"}, "0 images"),
    ],
)
def test_a_dict_without_one_image_names_the_remedy(
    encoder: VisionEncoder, row: dict[str, Any], named: str
) -> None:
    with pytest.raises(ImageError) as caught:
        encoder.encode(row)
    assert caught.value.code == "source-type"
    assert named in str(caught.value)
    skipped, good = encoder.encode([row, tiny_png(1)], on_error="skip")
    assert isinstance(skipped, FailedImage)
    assert isinstance(good, ImageFeatures)


def test_load_image_takes_a_struct() -> None:
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    assert unwrap({"image": picture, "label": 1}, "row") is picture
    assert load_image({"image": picture}).pixels.shape == (20, 30, 3)
