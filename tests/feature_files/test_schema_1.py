"""Test that qwen_vit reads files and folders of schema 1 from commit 219ded8, without changing
them.

`schema_1/` contains features.safetensors and means.safetensors from `features_of`. Its folder
export/ has five images and a broken image from the fake encoder, in shards of four.
"""

import shutil
from pathlib import Path

import pytest
import torch

from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.features import features_of

FOLDER = Path(__file__).with_name("schema_1")
NAMES = ["a.jpg", "b/ü.png", "c"]


def test_a_file_of_schema_1_is_read() -> None:
    read = load_features(FOLDER / "features.safetensors")
    assert read.metadata["schema_version"] == 1
    assert read.ids == NAMES
    for found, expected in zip(read, features_of(*NAMES), strict=True):
        assert torch.equal(found.embeds, expected.embeds)
        assert (found.grid_thw, found.size_px, found.notes) == (expected.grid_thw, (0, 0), ())
        assert (dict(found.layers), found.output, found.normalized) == ({}, "merged", False)


def test_means_of_schema_1_are_means() -> None:
    read = load_features(FOLDER / "means.safetensors")
    for found, expected in zip(read, features_of(*NAMES), strict=True):
        assert torch.equal(found.embeds, expected.embeds.mean(0, keepdim=True).bfloat16())
        assert found.output == "mean"
        with pytest.raises(ArgumentError, match="one mean vector"):
            _ = found.map


def test_a_folder_of_schema_1_is_read() -> None:
    read = load_features(FOLDER / "export")
    assert read.is_complete
    assert read.ids == [f"{number}.png" for number in range(5)]
    [failed] = read.errors
    assert (failed.id, failed.stage, failed.code) == ("x.png", "decode", "truncated")
    for number, image in enumerate(read):
        # the fake encoder's rows have the one value of the image
        assert torch.equal(image.embeds, torch.full((4, 16), 10.0 + number))
        assert (image.size_px, image.output) == ((28, 28), "merged")


def test_features_of_schema_1_are_written_as_schema_2(tmp_path: Path) -> None:
    for name, output in (("features", "merged"), ("means", "mean"), ("export", "merged")):
        place = "export" if name == "export" else f"{name}.safetensors"
        read = load_features(FOLDER / place)
        again = load_features(write_features(tmp_path / name, read, read.metadata))
        assert (again.metadata["schema_version"], again.metadata["output"]) == (2, output)
        assert again.ids == read.ids
        for one, other in zip(again, read, strict=True):
            assert torch.equal(one.embeds, other.embeds)
            assert (one.grid_thw, one.size_px, one.output) == (
                other.grid_thw, other.size_px, other.output,
            )  # fmt: skip


def test_an_export_of_schema_1_is_refused_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The missing shards would have another schema than the existing shards."""
    monkeypatch.chdir(tmp_path)
    Path("p").mkdir()
    for number in range(5):
        Path(f"p/{number}.png").write_bytes(tiny_png(number))
    shutil.copytree(FOLDER / "export", "out")
    Path("out/shard-00000001.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    words = (
        r"out: the folder contains an export of schema 1\. Expected schema 2, which this version "
        r".* writes\. "
        r"Finish it with the version that began it, or pass another folder; "
        r"load_features reads both"
    )
    options = ExportOptions(shard_size=4)
    for part in ((1, 1), (1, 2)):
        with pytest.raises(ExportError, match=words):
            export_features(FakeEncoder(), ["p"], "out", ExportOptions(shard_size=4, part=part))
    with pytest.raises(ExportError, match=words):
        estimate_export(FakeEncoder(), ["p"], options, folder="out")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
