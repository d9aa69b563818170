"""Test that exports of vectors and layers contain the rows of `encode` in complete shards."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export import ray_cluster, shard_writer
from qwen_vit.export import shards as shards_module
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions, RowFormat
from qwen_vit.export.plan import open_export, remove_leftovers
from qwen_vit.export.run import export_features
from qwen_vit.feature_files import writer as writer_module
from qwen_vit.feature_files.read import load_features
from qwen_vit.features import ImageFeatures
from tests.support.export_stress import tiny_png, write_hostile
from tests.support.exports import files
from tests.support.fake_encoder import FakeEncoder

LAYERS = ExportOptions(shard_size=4, layers=(3, 0))


def export(
    *inputs: str,
    out: str = "out",
    encoder: Any = None,
    options: ExportOptions = LAYERS,
    **more: Any,
) -> Any:
    return export_features(encoder or FakeEncoder(), inputs or ("p",), out, options, **more)


def write_pictures(*sizes: tuple[int, int]) -> list[str]:
    names = []
    for index, size in enumerate(sizes):
        values = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
        names.append(f"p/{index}.png")
        Image.fromarray(values).save(names[-1])
    return names


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("output", "normalize"), [("merged", False), ("patch", False), ("mean", False), ("mean", True)]
)
def test_rows_and_layers_equal_those_of_encode(
    export_dir: Path, output: Any, normalize: bool, dtype: Any
) -> None:
    names = write_pictures((56, 84), (140, 112), (56, 56), (84, 56), (56, 112))
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    options = ExportOptions(output, dtype, shard_size=5, normalize=normalize, layers=(4, 1))
    export(*names, encoder=encoder, options=options)
    expected = encoder.encode(names, output=output, normalize=normalize, layers=(1, 4))
    stored = torch.bfloat16 if dtype else torch.float32
    for there, ours in zip(load_features("out"), expected, strict=True):
        assert (there.id, there.output, there.normalized) == (ours.id, output, normalize)
        assert torch.equal(there.embeds, ours.embeds.to(stored))
        for block in (1, 4):
            assert torch.equal(there.layers[block], ours.layers[block].to(stored))
    facts = json.loads(Path("out/export.json").read_text())
    assert (facts["normalize"], facts["layers"]) == (normalize, [1, 4])


def test_a_mean_of_a_bfloat16_encoder_is_stored_in_float32_unrounded(export_dir: Path) -> None:
    """`encode` gives the mean in float32. An earlier rounding to bfloat16 would lose 16 bits."""

    class Half(FakeEncoder):
        dtype = torch.bfloat16

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 84, 3), np.uint8)).save(
        "p/0.png"
    )
    means = ExportOptions("mean", "float32")
    export(options=means, encoder=Half())
    export(out="full", options=means)
    for ours, full in zip(load_features("out"), load_features("full"), strict=True):
        assert torch.equal(ours.embeds, full.embeds)


def test_images_that_fail_have_neither_rows_nor_layers(export_dir: Path) -> None:
    export(out="good")
    for name, kind in (("2.png", "nan"), ("5.png", "memory"), ("7.png", "cut")):
        Path("p", name).unlink()
        write_hostile(Path("p", name), kind)
    done = export()
    assert done.failed == {"truncated": 2, "not-finite": 1, "out-of-memory": 1}
    good = load_features("good")
    stored = load_features("out")
    assert stored.ids == [f"{number}.png" for number in (0, 1, 3, 4, 6, 8, 9)]
    for image in stored:
        for block in (0, 3):
            assert torch.equal(image.layers[block], good[image.id].layers[block])
            assert image.layers[block].isfinite().all()


def test_a_group_of_images_has_the_bytes_of_single_images(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.png", "6.png"):
        Path("p", name).unlink()
        write_hostile(Path("p", name), "nan")
    export(out="alone")
    real = shards_module._in_groups
    monkeypatch.setattr(
        shards_module, "_in_groups", lambda encoded, device: real(encoded, torch.device("cuda"))
    )
    export(out="together")
    assert files("together") == files("alone")


def test_a_header_with_layers_may_exceed_the_reserved_space(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="roomy")
    monkeypatch.setattr(shard_writer, "reserved_header_bytes", lambda items, settings: 8)
    export()
    for ours, other in zip(load_features("out"), load_features("roomy"), strict=True):
        assert ours.id == other.id
        for block in (0, 3):
            assert torch.equal(ours.layers[block], other.layers[block])
    assert files().keys() == files("roomy").keys()


@pytest.mark.parametrize("layers", [(), (0,), (0, 1, 2, 3)])
def test_the_reserved_space_fits_any_layers_and_unusual_names(
    export_dir: Path, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('"', "\\", "é", "写", "\n"):
        Path("p", 60 * name + ".png").write_bytes(tiny_png(0))
    copies = []
    real = writer_module._copy

    def watched(*given: Any) -> Any:
        copies.append(given[1])
        return real(*given)

    monkeypatch.setattr(writer_module, "_copy", watched)
    for size in (1, 20):
        export(out=f"of-{size}", options=ExportOptions(shard_size=size, layers=layers))
        assert set(copies) <= {0}  # the writer joined the layers, and every header fitted
        copies.clear()


def test_a_disk_that_fills_up_at_a_layer_leaves_complete_shards(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="whole")
    written, real = 0, writer_module.FeatureWriter.add

    def full(data: Any) -> None:
        raise OSError(28, "No space left on device")

    def add(self: Any, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 6:
            atomic = self._growing[2].atomic
            atomic.file = Mock(wraps=atomic.file, write=full)
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.FeatureWriter, "add", add)
        with pytest.raises(ExportError, match=r"shard-00000001.* \(No space .* keeps finished"):
            export()
    assert set(files()) == {"export.json", "listing.jsonl", "shard-00000000.safetensors"}
    export()
    assert files() == files("whole")


def test_hidden_files_of_a_killed_export_are_removed(export_dir: Path) -> None:
    """A shard with two layers grows in three hidden files."""
    with open_export(FakeEncoder(), ["p"], Path("out"), LAYERS) as plan:
        tensors = RowFormat.of(FakeEncoder(), LAYERS).tensors
        shard = plan.path(1)
        assert isinstance(shard, Path)
        writer = writer_module.FeatureWriter(shard, tensors, 4_096)
        hidden = [name for name in os.listdir("out") if name.endswith(".tmp")]
        assert len(hidden) == 3
        remove_leftovers(plan)
        assert not [name for name in os.listdir("out") if name.endswith(".tmp")]
        writer.discard()


def test_a_missing_layer_is_refused_before_a_folder_is_made(
    export_dir: Path,
) -> None:
    with pytest.raises(
        ArgumentError, match=r"layers contains 4\. Expected integers from 0 to 3, each"
    ):
        export(options=ExportOptions(layers=(0, 4)))
    assert not Path("out").exists()
    worker = ray_cluster._Worker(FakeEncoder, 1)
    with pytest.raises(ArgumentError, match="layers contains 4"):
        worker.describe(ExportOptions(layers=(0, 4)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": (-1,)}, "layers contains -1"),
        ({"layers": (1, 1)}, "layers contains 1 twice"),
        ({"layers": "01"}, "layers is '01'"),
        ({"normalize": True}, "normalize requires output=.mean."),
        ({"normalize": 1, "output": "mean"}, "normalize is 1"),
    ],
)
def test_invalid_options_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ExportOptions(**options)
    assert ExportOptions(layers=[15, 7]).layers == (7, 15)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (0,)}, r"layers was \[0, 3\], is \[0\] now"),
        ({"output": "mean", "normalize": True}, "normalize was False, is True now"),
    ],
)
def test_resuming_with_other_rows_is_an_error(
    export_dir: Path, change: dict[str, Any], words: str
) -> None:
    export()
    before = files()
    with pytest.raises(ExportError, match=words):
        export(options=replace(LAYERS, **change))
    assert files() == before
    assert export().resumed == 11


@pytest.mark.parametrize(
    ("key", "before"), [("gpu", "NVIDIA A100"), ("versions.libjpeg-turbo", "2")]
)
def test_resuming_on_another_gpu_or_decoder_is_an_error(
    export_dir: Path, key: str, before: str
) -> None:
    """The GPU and the decoder change bits."""

    class OtherMachine(FakeEncoder):
        def metadata(self) -> dict[str, Any]:
            facts = super().metadata()
            name, _, inner = key.partition(".")
            facts[name] = {**facts[name], inner: before} if inner else before
            return facts

    export(encoder=OtherMachine())
    with pytest.raises(ExportError, match=rf"{key} was {before}, is (None|absent) now"):
        export()


def test_a_worker_with_another_gpu_makes_no_shard(export_dir: Path) -> None:
    class OtherMachine(FakeEncoder):
        def metadata(self) -> dict[str, Any]:
            return {**super().metadata(), "gpu": "NVIDIA A100"}

    with open_export(FakeEncoder(), ["p"], Path("out"), LAYERS) as plan:
        worker = ray_cluster._Worker(OtherMachine, 1)
        with pytest.raises(ExportError, match=r"a worker has the GPU NVIDIA A100\. Expected None"):
            worker.export(plan, 0)
        assert not plan.path(0).exists()
        made = ray_cluster._Worker(FakeEncoder, 1).export(plan, 0)
        assert made is not None
        assert len(made[0].rows) == 4


def test_an_estimate_counts_layers(export_dir: Path) -> None:
    for number in range(10):
        Image.fromarray(np.full((280, 280, 3), 10 + number, np.uint8)).save(f"p/{number}.png")
    sizes = {}
    for layers in ((), (0,), (0, 1, 3)):
        options = ExportOptions(shard_size=4, layers=layers)
        estimate = estimate_export(FakeEncoder(), ["p"], options)
        done = export(out=f"of-{len(layers)}", options=options)
        assert abs(estimate.bytes - done.bytes) < 0.02 * done.bytes + 5_000
        sizes[len(layers)] = done.bytes
    a_layer = 10 * 400 * 16 * 4
    assert sizes[3] - sizes[1] == pytest.approx(2 * a_layer, rel=0.05)


def test_progress_counts_the_bytes_of_layers(export_dir: Path) -> None:
    seen: list[ImageFeatures] = []
    with open_export(FakeEncoder(), ["p"], Path("out"), LAYERS) as plan:
        for _ in shards_module.export_shards(
            FakeEncoder(),
            plan,
            [0],
            on_image=seen.append,  # type: ignore[arg-type]
        ):
            pass
    assert [list(image.layers) for image in seen] == [[0, 3]] * 4
