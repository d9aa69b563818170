"""Test that an export writes the rows of `encode`, in order, as safetensors writes them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.export import shard_writer
from qwen_vit.export.options import ExportOptions
from qwen_vit.feature_files import writer as writer_module
from qwen_vit.feature_files.read import load_features
from tests.support.exports import SMALL, NeverAsked, export, files, parts, shards
from tests.support.fake_encoder import FakeEncoder


def test_an_export_has_images_and_errors_in_order(
    export_dir: Path,
) -> None:
    done = export()
    assert (done.images, done.exported, done.failed, done.resumed) == (11, 10, {"truncated": 1}, 0)
    assert set(files()) == {
        "export.json", "listing.jsonl", "manifest.parquet",
        *(f"shard-0000000{index}.safetensors" for index in range(3)),
    }  # fmt: skip
    features = load_features("out")
    assert features.is_complete
    assert features.ids == [f"{number}.png" for number in range(10)]
    [error] = features.errors
    assert (error.id, error.stage, error.code) == ("x.png", "decode", "truncated")
    assert error.message.startswith("x.png: a truncated PNG")
    description = json.loads(Path("out/export.json").read_text())
    assert (description["n_images"], description["shard_size"]) == (11, 4)
    assert (description["output"], description["dtype"], description["device"]) == (
        "merged", "float32", "cpu",
    )  # fmt: skip
    assert list(description) == sorted(description)


@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_the_rows_equal_those_of_encode(export_dir: Path, output: Any) -> None:
    sizes = ((56, 84), (84, 56), (28, 28))
    for index, size in enumerate(sizes):
        values = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(values).save(f"p/{index}.png")
    names = [f"p/{index}.png" for index in range(len(sizes))]
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    export(*names, encoder=encoder, options=ExportOptions(output, shard_size=4))
    features = load_features("out")
    for there, expected in zip(features, encoder.encode(names, output=output), strict=True):
        assert torch.equal(there.embeds, expected.embeds)
        assert (there.id, there.grid_thw) == (expected.id, expected.grid_thw)
    per_row = {"merged": 4, "patch": 1, "mean": None}[output]
    [shard] = shards()
    assert load_features(f"out/{shard}").metadata["patches_per_row"] == per_row
    assert load_features("out").metadata["output"] == output


def test_bfloat16_is_stored_rounded_once(export_dir: Path) -> None:
    export(out="full")
    export(options=replace(SMALL, dtype="bfloat16"))
    for there, full in zip(load_features("out"), load_features("full"), strict=True):
        assert there.embeds.dtype == torch.bfloat16
        assert torch.equal(there.embeds, full.embeds.bfloat16())
    metadata = load_features("out").metadata
    assert (metadata["dtype"], metadata["computed_in"]) == ("bfloat16", "float32")


def test_a_shard_has_the_bytes_that_safetensors_writes(export_dir: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    export()
    for name, data in shards().items():
        with safe_open(f"out/{name}", framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(f"out/{name}"), "again", metadata=metadata)
        (header, rows), (theirs, their_rows) = map(parts, (data, Path("again").read_bytes()))
        assert header.rstrip() == theirs.rstrip()  # spaces fill the reserved space of our header
        assert rows == their_rows
        assert len(header) % 8 == 0


def test_a_header_may_exceed_the_reserved_space(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="roomy")
    monkeypatch.setattr(shard_writer, "reserved_header_bytes", lambda items, settings: 8)
    export()
    assert files().keys() == files("roomy").keys()  # no temporary file remains
    for index, features in enumerate(load_features("roomy")):
        again = load_features("out")[index]
        assert (again.id, again.grid_thw) == (features.id, features.grid_thw)
        assert torch.equal(again.embeds, features.embeds)
    sizes = [{name: len(data) for name, data in shards(out).items()} for out in ("out", "roomy")]
    assert all(sizes[0][name] < sizes[1][name] for name in sizes[1])


@pytest.mark.parametrize("shard_size", [1, 20])
def test_the_reserved_space_fits_names_that_json_escapes(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    """The header is JSON in JSON, so a quote takes four bytes."""
    rows, names = Path("p/0.png").read_bytes(), ('"', "\\", "\n", "é", "写")
    for name in names:
        Path("p", 60 * name + ".png").write_bytes(rows)

    def copied(*_: Any) -> None:
        raise AssertionError("rows were written twice")

    monkeypatch.setattr(writer_module, "_copy", copied)
    assert export(options=replace(SMALL, shard_size=shard_size)).exported == 10 + len(names)
    assert {60 * name + ".png" for name in names} < set(load_features("out").ids)


def test_a_shard_with_only_failures_is_complete(export_dir: Path) -> None:
    for number in range(4, 8):
        Path(f"p/{number}.png").write_bytes(b"")
    assert export().failed == {"empty-file": 4, "truncated": 1}
    file = load_features("out/shard-00000001.safetensors")
    assert (len(file), len(file.errors)) == (0, 4)
    assert export(encoder=NeverAsked()).resumed == 11
    assert len(load_features("out")) == 6


def test_batches_never_cross_a_shard(export_dir: Path) -> None:
    sizes = []

    class Counting(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            images = list(images)
            sizes.append(len(images))
            return super().encode_iter(images, **options)

    export(encoder=Counting())
    assert sizes == [4, 4, 2]
