"""Test exif="ignore" for upright images, in every function and every record."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.images.load import load_image
from tests.support.fake_encoder import FakeEncoder

STORED = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
KINDS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 95},
}


def turned(kind: str, orientation: int) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(STORED).save(file, kind, exif=exif, **KINDS[kind])
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_ignore_gives_the_pixels_as_they_are_stored(kind: str, orientation: int) -> None:
    data = turned(kind, orientation)
    plain = load_image(turned(kind, 1)).pixels
    for source in (data, Image.open(io.BytesIO(data))):
        image = load_image(source, exif="ignore")
        assert np.array_equal(image.pixels, plain)
        assert "EXIF orientation ignored" in image.notes
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(load_image(data).pixels, np.asarray(upright))


def test_a_picture_that_was_transposed_by_hand_is_not_turned_again() -> None:
    """Pillow keeps the old orientation tag on the new image."""
    by_hand = Image.open(io.BytesIO(turned("PNG", 6))).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(load_image(by_hand, exif="ignore").pixels, np.rot90(STORED, -1))
    assert not np.array_equal(load_image(by_hand).pixels, np.rot90(STORED, -1))


def test_encode_ignores_the_orientation_and_the_file_records_it(
    encoder: VisionEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(turned("PNG", 6))
    stored = encoder.encode(STORED).embeds
    features = [encoder.encode(path), encoder.encode(path, exif="ignore")]
    assert np.array_equal(features[1].numpy(), stored.numpy())
    assert not np.array_equal(features[0].numpy(), stored.numpy())
    out = tmp_path / "f.safetensors"
    features[1] = replace(features[1], id="b")
    write_features(out, features, encoder.metadata())
    images = load_features(out).metadata["images"]
    assert [image["exif"] for image in images] == ["apply", "ignore"]
    with pytest.raises(ArgumentError, match="exif is 'never'"):
        encoder.encode(path, exif="never")  # type: ignore[call-overload]


def test_an_export_ignores_it_records_it_and_does_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(turned("PNG", 6))

    def export(**options: Any) -> Any:
        encoder: Any = FakeEncoder()
        return export_features(encoder, [tmp_path / "a.png"], tmp_path / "out", **options)

    export(options=ExportOptions(exif="ignore"))
    stored = load_features(tmp_path / "out")
    assert stored[0].size_px == (56, 84)
    [shard] = (tmp_path / "out").glob("shard-*")
    facts = load_features(shard).metadata
    assert facts["images"][0]["exif"] == "ignore"
    assert facts["image_policy"]["orientation"] == "EXIF orientation ignored"
    with pytest.raises(ExportError, match=r"image_policy\.orientation was"):
        export(options=ExportOptions())
    with pytest.raises(ArgumentError, match="exif is"):
        ExportOptions(exif="no")  # type: ignore[arg-type]


def test_the_command_line_has_the_exif_option(qwen_vit: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(turned("PNG", 6))
    out = tmp_path / "f.safetensors"
    qwen_vit("encode", tmp_path / "a.png", "--model", "tiny", "--out", out, "--exif", "ignore")
    assert load_features(out)[0].size_px == (56, 84)
    assert load_features(out).metadata["images"][0]["exif"] == "ignore"
