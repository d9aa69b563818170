"""Test schema 2: every key in every file, layers, and a digest of each image's rows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.schema import FILE_FACTS, METADATA_KEY, ItemFacts
from qwen_vit.feature_files.write import write_features
from qwen_vit.feature_files.writer import FeatureWriter, RowTensor
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support.feature_file_cases import set_fact
from tests.support.features import METADATA, features_of

IMAGES = ["tests/photographs/chelsea.png", "tests/photographs/rocket.jpg"]
ITEM = {
    *("exif", "frame_seconds", "kind", "notes", "rows_sha256", "second_per_grid_t"),
    *("sha256", "size_px", "source"),
}
OF_AN_EXPORT = {"n_images", "listing_sha256", "shard_size", "limits", "errors"}


def with_layers(
    *names: str, blocks: tuple[int, ...] = (7, 15, 3), dtype: torch.dtype = torch.float32
) -> list[ImageFeatures]:
    """Return images of 1, 2, 3 ... tokens with layers of width 5."""
    made = torch.Generator().manual_seed(0)
    return [
        replace(
            each,
            layers={
                block: torch.randn(4 * len(each.embeds), 5, generator=made).to(dtype)
                for block in sorted(blocks)
            },
        )
        for each in features_of(*names, dtype=dtype)
    ]


def sha256(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# Every key


def test_a_file_of_encode_has_every_key(path: Path) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)
    features = encoder.encode(IMAGES, layers=(1, 4))
    facts = load_features(write_features(path, features, encoder.metadata())).metadata
    assert facts.keys() == {*FILE_FACTS, "ids", "images", "schema_version"}
    assert {name for name, value in facts.items() if value is None} == {
        *OF_AN_EXPORT, "commit", "gpu", "quantization",
    }  # fmt: skip
    assert (facts["output"], facts["normalize"], facts["layers"]) == ("merged", False, [1, 4])
    assert (facts["dtype"], facts["computed_in"], facts["device"]) == ("float32", "float32", "cpu")
    names = {"qwen-vit", "torch", "triton", "pillow", "pillow-heif", "libjpeg-turbo", "libwebp"}
    assert facts["versions"].keys() == names
    assert all(isinstance(number, str) for number in facts["versions"].values())
    for image, each in zip(facts["images"], features, strict=True):
        assert image.keys() == ITEM
        assert image["size_px"] == list(each.size_px)
        assert (image["kind"], image["exif"]) == ("image", "apply")
        unknown = ("sha256", "source", "frame_seconds", "second_per_grid_t")
        assert [image[name] for name in unknown] == [None] * 4


def test_a_shard_has_every_key_and_the_digests_that_encode_writes(
    path: Path, tmp_path: Path
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)
    options = ExportOptions(layers=(4, 1))
    export_features(encoder, IMAGES, tmp_path / "out", options)
    [shard] = (tmp_path / "out").glob("shard-*")
    facts = load_features(shard).metadata
    assert facts.keys() == {*FILE_FACTS, "ids", "images", "schema_version"}
    unknown = {name for name, value in facts.items() if value is None}
    assert unknown == {"commit", "gpu", "quantization"}
    features = encoder.encode(IMAGES, layers=(1, 4))
    written = load_features(write_features(path, features, encoder.metadata())).metadata
    for image, alone in zip(facts["images"], written["images"], strict=True):
        assert image.keys() == ITEM
        assert image["rows_sha256"] == alone["rows_sha256"]
        assert image["source"].endswith((".png", ".jpg"))
        assert image["sha256"] == hashlib.sha256(Path(image["source"]).read_bytes()).hexdigest()


def test_patches_of_a_caller_have_no_size_and_no_policy(path: Path) -> None:
    [image] = load_features(write_features(path, features_of("a"), METADATA)).metadata["images"]
    assert (image["size_px"], image["exif"]) == (None, None)
    assert load_features(path)[0].size_px == (0, 0)


# Digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_has_the_digest_of_its_rows_as_they_are_stored(
    path: Path, dtype: torch.dtype
) -> None:
    features = with_layers("a", "b", "c", dtype=dtype)
    write_features(path, [*features, *with_layers("wide")], METADATA)  # stored as float32
    read = load_features(path)
    for image, facts in zip(read, read.metadata["images"], strict=True):
        assert facts["rows_sha256"] == {
            "image_embeds": sha256(image.embeds),
            **{f"layer_{block}": sha256(rows) for block, rows in image.layers.items()},
        }


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_digests_of_images_added_together_are_in_order(count: int, path: Path) -> None:
    """A GPU's export adds a group of images. Several threads hash the images of a group."""
    tensors = [RowTensor("image_embeds", 4, torch.float32), RowTensor("layer_1", 8, torch.float32)]
    items = [ItemFacts(f"{at}", (1, 2, 4 + 2 * at), n_rows=2 + at) for at in range(count)]
    rows, expected = dict[str, torch.Tensor](), [dict[str, str]() for _ in items]
    for tensor in tensors:
        parts = [torch.rand(item.rows_of(tensor.name), tensor.width) for item in items]
        rows[tensor.name] = torch.cat(parts)
        for digests, part in zip(expected, parts, strict=True):
            digests[tensor.name] = sha256(part)
    with FeatureWriter(path, tensors, 0) as writer:
        for _ in range(2):
            writer.add(rows, items)
        assert writer._digests == expected * 2


def test_digests_of_other_rows_differ_and_of_the_same_rows_repeat(path: Path) -> None:
    one = write_features(path, features_of("a", "b"), METADATA).read_bytes()
    digests = [i["rows_sha256"] for i in load_features(path).metadata["images"]]
    assert digests[0] != digests[1]
    assert write_features(path, features_of("a", "b"), METADATA, overwrite=True).read_bytes() == one


# Layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_read_unchanged(path: Path, dtype: torch.dtype) -> None:
    written = with_layers("a", "b", "c", dtype=dtype)
    read = load_features(write_features(path, written, METADATA))
    assert read.metadata["layers"] == [3, 7, 15]
    for found, expected in zip(read, written, strict=True):
        assert list(found.layers) == [3, 7, 15]
        for block, rows in expected.layers.items():
            assert found.layers[block].dtype == dtype
            assert torch.equal(found.layers[block], rows)
    assert torch.equal(read[::-1][0].layers[7], written[2].layers[7])


def test_means_keep_their_layers_and_their_own_type(path: Path) -> None:
    means = [
        replace(f, embeds=f.embeds.mean(0, keepdim=True), output="mean", normalized=True)
        for f in with_layers("a", "b", "c")
    ]
    means = [replace(f, layers={k: v.bfloat16() for k, v in f.layers.items()}) for f in means]
    read = load_features(write_features(path, means, METADATA))
    for found, expected in zip(read, means, strict=True):
        assert (found.output, found.normalized) == ("mean", True)
        assert torch.equal(found.embeds, expected.embeds)
        assert torch.equal(found.layers[15], expected.layers[15])
    assert read.metadata["patches_per_row"] is None


def test_a_file_with_layers_has_the_bytes_that_safetensors_writes(path: Path) -> None:
    write_features(path, with_layers("a", "b", blocks=(3, 15, 7, 100)), METADATA)
    again = path.with_name("again")
    text = json.dumps(load_features(path).metadata, sort_keys=True)
    save_file(load_file(path), again, metadata={METADATA_KEY: text})
    assert again.read_bytes() == path.read_bytes()


def broken(features: list[ImageFeatures], place: int, **changes: Any) -> list[ImageFeatures]:
    features[place] = replace(features[place], **changes)
    return features


NAN = {3: torch.full((8, 5), float("nan"))}
MEAN = replace(features_of("m")[0], output="mean")
REFUSED: dict[str, tuple[list[ImageFeatures], str]] = {
    "other layers": (
        [*with_layers("a"), *with_layers("b", blocks=(7,))],
        r"'a' has the layers \[3, 7, 15\] and 'b' has \[7\]\. Expected the same layers\.",
    ),
    "layers of some": ([*with_layers("a"), *features_of("b")], r"'a' has the layers .* has \[\]"),
    "too few rows": (
        broken(with_layers("a", "b", blocks=(3,)), 1, layers={3: torch.ones(2, 5)}),
        r"'b' has 2 rows of layer_3 for a grid of \(1, 2, 4\)\. Expected 8, one for each patch",
    ),
    "two widths": (
        broken(with_layers("a", "b", blocks=(3,)), 1, layers={3: torch.ones(8, 6)}),
        r"rows of layer_3 of the shapes \(n, 5\), \(n, 6\) do not fit",
    ),
    "NaN": (broken(with_layers("a", "b", blocks=(3,)), 1, layers=NAN), "'b' .* contain NaN or inf"),
    "no tensor": (
        broken(with_layers("a", blocks=(3,)), 0, layers={3: [[1.0]]}),
        r"'a: layer_3' have the type list\. Expected a dense torch tensor",
    ),
    "mixed outputs": (
        [*features_of("a"), MEAN],
        r"'a' has output='merged' and 'm' has output='mean'\. Expected the same kind",
    ),
    "mixed lengths": (
        [MEAN, replace(MEAN, id="n", normalized=True)],
        r"'m' has output='mean' and 'n' has output='mean' of unit length",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_that_do_not_fit_into_one_file_are_refused(path: Path, reason: str) -> None:
    features, words = REFUSED[reason]
    with pytest.raises(ExportError, match=words):
        write_features(path, features, METADATA)
    assert not list(path.parent.iterdir())


def test_one_image_alone_is_written(path: Path) -> None:
    [image] = with_layers("a")
    assert torch.equal(load_features(write_features(path, image, METADATA))[0].embeds, image.embeds)
    with pytest.raises(ExportError, match="1 image failed"):
        write_features(path, FailedImage("x", ImageError("ends early")), METADATA)
    with pytest.raises(ArgumentError, match=r"features is 3 \(int\)"):
        write_features(path, 3, METADATA)  # type: ignore[arg-type]


# Corrupt files


EDITED: dict[str, tuple[Callable[..., Any], str]] = {
    "output": (set_fact("output", "max"), "its output is 'max', its normalize is False"),
    "no output": (set_fact("output", None), "its output is None"),
    "normalize": (set_fact("normalize", "yes"), "its normalize is 'yes'"),
    "layers no list": (set_fact("layers", "3"), "its layers are '3'"),
    "layers no numbers": (set_fact("layers", ["3"]), "its layers are ['3']"),
    "a layer below 0": (set_fact("layers", [-3]), "its layers are [-3]"),
    "a layer too few": (
        set_fact("layers", [3]),
        "its tensors of rows are image_embeds, layer_15, lay",
    ),
    "a layer too many": (set_fact("layers", [1, 3, 7, 15]), "its layers are [1, 3, 7, 15]"),
    "no layers": (set_fact("layers", None), "its layers are None"),
    "no images": (set_fact("images", None), "0 images and 2 ids"),
    "an image too few": (lambda facts, _: facts["images"].pop(), "1 images and 2 ids"),
    "no size": (lambda facts, _: facts["images"][0].pop("size_px"), "its images are"),
    "odd size": (lambda facts, _: facts["images"][0].update(size_px=[1]), "its images are"),
    "errors": (set_fact("errors", "x"), "its errors are 'x'"),
    "a short layer": (
        lambda _, tensors: tensors.update(layer_7=torch.ones(11, 5)),
        "corrupt (layer_7 has 11 rows for 12 patches)",
    ),
    "a flat layer": (lambda _, tensors: tensors.update(layer_7=torch.ones(12)), "layer_7 of shape"),
    "a stray tensor": (lambda _, tensors: tensors.update(layer_8=torch.ones(12, 5)), "layer_8"),
}


@pytest.mark.parametrize("edit", EDITED)
def test_an_edited_file_is_refused_with_its_name(path: Path, edit: str) -> None:
    write_features(path, with_layers("a", "b"), METADATA)
    facts, tensors = load_features(path).metadata, load_file(path)
    change, words = EDITED[edit]
    change(facts, tensors)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(facts)})
    with pytest.raises(ExportError) as caught:
        load_features(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert caught.value.remedy
