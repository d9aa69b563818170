"""Test that readers with verify=True find a wrong bit in a file's rows."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.errors import ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder

SCHEMA_1 = Path(__file__).parent / "schema_1" / "features.safetensors"


@pytest.fixture
def export_dir(tmp_path: Path) -> Path:
    encoder: Any = FakeEncoder()
    (tmp_path / "p").mkdir()
    for number in range(6):
        (tmp_path / "p" / f"{number}.png").write_bytes(tiny_png(number))
    options = ExportOptions(shard_size=4, layers=(0,))
    export_features(encoder, [tmp_path / "p"], tmp_path / "out", options)
    return tmp_path / "out"


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_undamaged_rows_are_read(export_dir: Path) -> None:
    plain, verified = load_features(export_dir), load_features(export_dir, verify=True)
    for one, other in zip(plain, verified, strict=True):
        assert torch.equal(one.embeds, other.embeds)
        assert torch.equal(one.layers[0], other.layers[0])


@pytest.mark.parametrize("copied", [False, True])
def test_a_wrong_bit_is_an_error_of_one_image(export_dir: Path, copied: bool) -> None:
    """A data loader's workers get the features as a pickle."""
    shard = export_dir / "shard-00000001.safetensors"
    flip_last_bit(shard)
    for path in (export_dir, shard):
        features = load_features(path, verify=True)
        if copied:
            features = pickle.loads(pickle.dumps(features))
        *undamaged, damaged = range(len(features))
        for place in undamaged:
            assert len(features[place].embeds)
        with pytest.raises(ExportError, match="changed after it was written") as caught:
            features[damaged]
        assert "qwen-vit" in caught.value.remedy
        if path == export_dir:
            assert "delete the shard" in caught.value.remedy.lower()
    assert len(load_features(export_dir)[damaged].embeds)


def test_a_file_without_digests_cannot_be_verified() -> None:
    features = load_features(SCHEMA_1, verify=True)
    with pytest.raises(ExportError, match="has no digest"):
        features[0]
