"""Test that an export also writes vLLM's encoder cache, and completes the cache on resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from qwen_vit import VisionEncoder, load_features
from qwen_vit.cli.main import cli
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.integrations.vllm import read_ec_cache, to_vllm_cached
from tests.support.fake_engines import FakeVllm

TWO = ExportOptions(shard_size=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make three images, and an image that fails."""
    folder = tmp_path / "photos"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(3):
        pixels = numbers.integers(0, 256, (56, 28 * (i + 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def export(encoder: VisionEncoder, photos: Path, options: ExportOptions = TWO) -> None:
    folder = photos.parent
    export_features(encoder, [photos], folder / "out", options, ec_cache=folder / "ec")


def entries(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("ec/*/*.safetensors")}


def test_every_exported_image_has_an_entry(encoder: VisionEncoder, photos: Path) -> None:
    export(encoder, photos)
    made, cache = load_features(photos.parent / "out"), read_ec_cache(photos.parent / "ec")
    assert list(cache) == list(made.ids) == ["0.png", "1.png", "2.png"]
    engine = FakeVllm(encoder.config.out_hidden_size, photos.parent / "ec")
    request = to_vllm_cached([cache["2.png"], cache["0.png"]])
    two, zero = engine.generate({"prompt": "", **request})["image"]
    assert torch.equal(two, made["2.png"].embeds)
    assert torch.equal(zero, made["0.png"].embeds)


def test_a_resumed_export_writes_missing_entries(encoder: VisionEncoder, photos: Path) -> None:
    """A kill ends the export between a shard and its entries. A later run does not read listed
    shards again."""
    export(encoder, photos)
    before = entries(photos.parent)
    first, second = sorted((photos.parent / "ec" / "index").iterdir())
    uuids = [json.loads(line)["uuid"] for line in second.read_text().splitlines()]
    second.unlink()
    for uuid in uuids:
        (photos.parent / "ec" / uuid / "encoder_cache.safetensors").unlink()
    listed = first.stat().st_mtime_ns
    export(encoder, photos)
    assert entries(photos.parent).keys() == before.keys()
    assert first.stat().st_mtime_ns == listed
    assert second.exists()


def test_a_cache_of_another_model_is_refused_before_any_image(
    encoder: VisionEncoder, photos: Path
) -> None:
    export(encoder, photos)
    other = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)
    with pytest.raises(ExportError, match=r"a different model or setting"):
        export_features(
            other, [photos], photos.parent / "other", TWO, ec_cache=photos.parent / "ec"
        )
    assert not list((photos.parent / "other").glob("shard-*"))


def test_rows_that_no_language_model_takes_are_refused(
    encoder: VisionEncoder, photos: Path
) -> None:
    with pytest.raises(ArgumentError, match=r'output="mean"\. Expected output="merged"'):
        export(encoder, photos, ExportOptions(output="mean"))
    assert not (photos.parent / "ec").exists()


def test_the_command_writes_it(photos: Path) -> None:
    folder = photos.parent
    command = ["export", str(photos), "--model", "tiny", "--out", str(folder / "out")]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--ec-cache", str(folder / "ec")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 1, done.output  # one image failed
    cache = read_ec_cache(folder / "ec")
    stored = load_file(folder / "ec" / cache["1.png"].uuid / "encoder_cache.safetensors")
    assert torch.equal(stored["ec_cache"], load_features(folder / "out")["1.png"].embeds)
    assert cache.settings["dtype"] == "bfloat16"
