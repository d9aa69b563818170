"""Test the errors of `encode` for values that are almost images."""

import copy
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vit import ExportOptions, ImageError, export_features
from qwen_vit.errors import ArgumentError
from qwen_vit.features import FailedImage
from tests.support.encoders import tiny


def message_of(image: Any) -> str:
    with pytest.raises(ImageError) as caught:
        tiny().encode(image)
    return str(caught.value)


def test_a_row_whose_image_is_a_path_names_the_path() -> None:
    message = message_of({"image": "one.gif", "label": 3})
    assert "a dict whose 'image' is the text 'one.gif'." in message
    assert 'Pass row["image"] if it is a path, or cast the column to datasets.Image().' in message


def test_a_slice_of_a_dataset_names_its_list_of_images() -> None:
    rows = {"image": [Image.new("RGB", (28, 28))] * 2, "label": [3, 4]}
    message = message_of(rows)
    assert "a dict whose 'image' is a list of images" in message
    assert message.endswith("Pass the list alone, such as rows['image'].")


def test_an_address_a_tar_and_a_pattern_name_the_function_that_reads_them(tmp_path: Path) -> None:
    tar, pattern = tmp_path / "a.tar", str(tmp_path / "*.png")
    with tarfile.open(tar, "w") as file:
        file.add(__file__, "a.png")
    assert message_of("s3://b/x.png").endswith("Download it first, or use export_features.")
    words = "a tar, not an image. Expected "
    assert words in message_of(tar)
    assert message_of(tar).endswith("Pass it to export_features or `qwen-vit export`.")
    assert message_of(pattern).endswith("does not exist. Pass the paths that glob.glob returns.")
    assert message_of(tmp_path / "none.png").endswith("does not exist. Check the path.")


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_is_refused_because_its_order_is_arbitrary(kind: Any, tmp_path: Path) -> None:
    images = kind(["a.png", "b.png"])
    words = r"is a set, whose order is arbitrary\. Expected a list\."
    for call in (tiny().encode, tiny().encode_iter, tiny().encode_video):
        with pytest.raises(ArgumentError, match=words):
            call(images)
    with pytest.raises(ArgumentError, match=words):
        export_features(tiny(), images, tmp_path / "out")


def test_a_data_frame_is_refused_because_its_items_are_names(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"image": ["a.png"]})
    words = r"is a DataFrame\. Expected a list\. Pass one column\."
    for call in (tiny().encode, tiny().encode_iter, tiny().encode_video):
        with pytest.raises(ArgumentError, match=words):
            call(table)
    with pytest.raises(ArgumentError, match=words):
        export_features(tiny(), table, tmp_path / "out")


def test_a_missing_attribute_of_a_failed_image_names_its_error() -> None:
    failed = tiny().encode("none.png", on_error="skip")
    assert isinstance(failed, FailedImage)
    for name in ("embeds", "map", "grid_thw", "layers", "frame_seconds"):
        assert not hasattr(failed, name)
        with pytest.raises(AttributeError, match=rf"{name}.*the image failed: none\.png: does not"):
            getattr(failed, name)
    for other in (copy.copy(failed), copy.deepcopy(failed), pickle.loads(pickle.dumps(failed))):
        assert other.message == failed.message


def test_a_size_that_is_text_is_an_error_that_expects_a_number() -> None:
    with pytest.raises(ArgumentError, match=r"shard_size is '2'\. Expected a whole number"):
        ExportOptions(shard_size="2")  # type: ignore[arg-type]
