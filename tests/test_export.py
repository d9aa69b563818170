"""An export loses nothing, doubles nothing, and says why: shards, resuming, locks, the command."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from qwen_vit import loading
from qwen_vit.cli import export as export_command
from qwen_vit.cli.text import estimate_text
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export import estimate as estimate_module
from qwen_vit.export import lock as lock_module
from qwen_vit.export import manifest as manifest_module
from qwen_vit.export import plan as plan_module
from qwen_vit.export import progress as progress_module
from qwen_vit.export import run as export_module
from qwen_vit.export import shard_writer
from qwen_vit.export import shards as shards_module
from qwen_vit.export.circuit_breaker import CircuitBreaker
from qwen_vit.export.estimate import Estimate, estimate_export, estimate_plan
from qwen_vit.export.lock import hold_folder, short_lock
from qwen_vit.export.manifest import ManifestRow
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import ExportPlan, open_export
from qwen_vit.export.progress import Progress
from qwen_vit.export.result import ExportReport
from qwen_vit.export.run import export_features, make_manifest
from qwen_vit.export.shards import export_shards
from qwen_vit.feature_files import writer as writer_module
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs.find import check_inputs, find_items
from tests.support import export_stress
from tests.support.export_stress import tiny_png, write_hostile
from tests.support.fake_encoder import WIDTH, FakeEncoder

SMALL = ExportOptions(shard_size=4)


def export(
    *inputs: str, out: str = "out", encoder: Any = None, options: ExportOptions = SMALL, **more: Any
) -> ExportReport:
    return export_features(encoder or FakeEncoder(), inputs or ("p",), out, options, **more)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("p", r"inputs is one str\. Expected a list of paths\. Pass \[inputs\]"),
        (b"p", r"inputs is one bytes\. Expected a list"),
        (Path("p"), r"inputs is one .*Path\. Expected a list"),
        ([b"p"], r"inputs holds b'p'\. Expected paths as str or Path\. Decode bytes with os.fsd"),
        ([7], r"inputs holds 7\. Expected paths"),
        ([], r"inputs is empty\. Expected files, folders"),
    ],
)
def test_inputs_that_are_no_list_of_paths_are_refused_before_a_folder_is_made(
    export_dir: Path, inputs: Any, words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        export_features(FakeEncoder(), inputs, "out")
    assert not Path("out").exists()


def test_paths_may_be_path_objects(export_dir: Path) -> None:
    assert export_features(FakeEncoder(), iter([Path("p")]), "out", SMALL).exported == 10


def plan_of(out: str = "out", encoder: Any = None, options: ExportOptions = SMALL) -> Any:
    return open_export(encoder or FakeEncoder(), ["p"], Path(out), options)


def files(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards(folder: str = "out") -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith("safetensors")}


# What is written


def test_an_export_holds_the_images_in_order_and_the_failed_ones_with_their_reason(
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
def test_the_rows_are_those_of_encode(export_dir: Path, output: Any) -> None:
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
        assert header.rstrip() == theirs.rstrip()  # ours is longer, by spaces
        assert rows == their_rows
        assert len(header) % 8 == 0


def parts(data: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


def test_a_head_larger_than_its_room_has_the_rows_behind_it(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="roomy")
    monkeypatch.setattr(shard_writer, "reserved_header_bytes", lambda items, settings: 8)
    export()
    assert files().keys() == files("roomy").keys()  # nothing else is left
    for index, features in enumerate(load_features("roomy")):
        again = load_features("out")[index]
        assert (again.id, again.grid_thw) == (features.id, features.grid_thw)
        assert torch.equal(again.embeds, features.embeds)
    sizes = [{name: len(data) for name, data in shards(out).items()} for out in ("out", "roomy")]
    assert all(sizes[0][name] < sizes[1][name] for name in sizes[1])


@pytest.mark.parametrize("shard_size", [1, 20])
def test_the_room_for_a_head_serves_names_that_json_escapes(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    """The head is JSON within JSON: a quote takes four bytes there."""
    rows, names = Path("p/0.png").read_bytes(), ('"', "\\", "\n", "é", "写")
    for name in names:
        Path("p", 60 * name + ".png").write_bytes(rows)

    def copied(*_: Any) -> None:
        raise AssertionError("rows were written twice")

    monkeypatch.setattr(writer_module, "_copy", copied)
    assert export(options=replace(SMALL, shard_size=shard_size)).exported == 10 + len(names)
    assert {60 * name + ".png" for name in names} < set(load_features("out").ids)


def test_a_shard_of_failures_alone_is_whole(export_dir: Path) -> None:
    for number in range(4, 8):
        Path(f"p/{number}.png").write_bytes(b"")
    assert export().failed == {"empty-file": 4, "truncated": 1}
    file = load_features("out/shard-00000001.safetensors")
    assert (len(file), len(file.errors)) == (0, 4)
    assert export(encoder=NeverAsked()).resumed == 11
    assert len(load_features("out")) == 6


class NeverAsked(FakeEncoder):
    def encode_iter(self, images: Any, **options: Any) -> Any:
        raise AssertionError("an image was encoded again")


def test_batches_never_cross_a_shard(export_dir: Path) -> None:
    sizes = []

    class Counting(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            images = list(images)
            sizes.append(len(images))
            return super().encode_iter(images, **options)

    export(encoder=Counting())
    assert sizes == [4, 4, 2]


# Failures


def test_every_kind_of_harm_has_its_row_and_the_good_ones_are_exported(tmp_path: Path) -> None:
    figures = export_stress.hostile(tmp_path, bad=30, good=60)
    assert sum(figures["by_code"].values()) == 30


def corrupt_image(name: str, kind: str) -> None:
    path = Path("p", name)
    path.unlink(missing_ok=True)
    write_hostile(path, kind)


@pytest.mark.parametrize("kind", export_stress.HOSTILE)
def test_a_hostile_image_is_reported_under_its_id(export_dir: Path, kind: str) -> None:
    corrupt_image("5.png", kind)
    done = export()
    assert done.failed == {export_stress.HOSTILE[kind]: 1} | (
        {"truncated": 1} if kind != "cut" else {"truncated": 2}
    )
    error = load_features("out").errors[0]
    assert error.id == "5.png"
    assert "5.png" in error.message
    assert "image " not in error.message.partition("5.png")[0]
    assert not any(torch.isnan(each.embeds).any() for each in load_features("out"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_nan_is_never_written(export_dir: Path, output: Any, dtype: Any) -> None:
    corrupt_image("5.png", "nan")
    done = export(options=ExportOptions(output, dtype, shard_size=4))
    assert done.failed["not-finite"] == 1
    assert all(each.embeds.isfinite().all() for each in load_features("out"))


@pytest.mark.parametrize("broken", [[], [0], [1, 2], [3], range(4), range(10)])
def test_images_that_come_from_a_gpu_together_are_written_as_one_by_one(
    export_dir: Path, broken: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are written at once, but for those of the images that failed."""
    for number in broken:
        corrupt_image(f"{number}.png", "nan")
    seen: list[tuple[str, float, str]] = []

    def count(_: Any, features: ImageFeatures | FailedImage) -> None:
        is_good = isinstance(features, ImageFeatures)
        total = float(features.embeds.sum()) if is_good else 0.0
        seen.append((features.id, total, str(features.error)))

    monkeypatch.setattr(Progress, "count", count)
    one_by_one = export(out="alone")
    alone = list(seen)
    seen.clear()
    assert one_by_one.failed.get("not-finite", 0) == len(broken)
    real = shards_module._in_groups
    monkeypatch.setattr(
        shards_module, "_in_groups", lambda encoded, device: real(encoded, torch.device("cuda"))
    )
    together = export(out="together")
    assert together.failed == one_by_one.failed
    assert files("together") == files("alone")
    assert seen == alone
    assert len(seen) == 11


def test_an_image_that_does_not_fit_the_memory_is_a_row(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt_image("3.png", "memory")
    real = loading.load_image

    def load(data: bytes, **options: Any) -> Any:
        if options["name"] == "6.png":
            raise MemoryError
        return real(data, **options)

    monkeypatch.setattr(loading, "load_image", load)
    assert export().failed == {"out-of-memory": 1, "memory": 1, "truncated": 1}
    errors = {error.id: error for error in load_features("out").errors}
    assert errors["3.png"].message == "3.png: its 4 patches do not fit the memory of cpu"
    assert errors["3.png"].stage == "encode"
    assert errors["6.png"].message == (
        "6.png: does not fit into memory. Free some memory, or leave the image out."
    )


def test_on_error_raise_stops_at_the_first_failure_and_keeps_what_is_whole(
    export_dir: Path,
) -> None:
    corrupt_image("6.png", "nan")
    with pytest.raises(ImageError, match=r"6.png: its embeddings hold NaN") as caught:
        export(options=replace(SMALL, on_error="raise"))
    assert caught.value.code == "not-finite"
    assert list(shards()) == ["shard-00000000.safetensors"]
    Path("p/x.png").unlink()
    corrupt_image("6.png", "cut")
    Path("p/6.png").write_bytes(tiny_png(6))
    Path("p/x.png").write_bytes(tiny_png(1))
    assert export(options=replace(SMALL, on_error="raise")).exported == 11


@pytest.mark.parametrize("kind", ["gone", "nan", "memory"])
def test_many_failures_in_a_row_stop_an_export(export_dir: Path, kind: str) -> None:
    """A disk that is gone, a broken model: nobody wants a million rows that say so."""
    for number in range(3, 9):
        corrupt_image(f"{number}.png", kind)
    limited = replace(SMALL, max_failures=6)
    with pytest.raises(
        ExportError, match=r"stopped after 6 consecutive failures; last error: .*8.png"
    ):
        export(options=limited)
    assert list(shards()) == []  # each had failures of the run
    Path("p/9.png").write_bytes(tiny_png(9))
    assert export(options=replace(SMALL, max_failures=0)).exported == 4
    assert load_features("out").is_complete


def test_a_disk_that_is_gone_is_not_asked_for_the_rest_of_the_shard(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def gone(item: Any, limits: Any) -> bytes:
        asked.append(item.id)
        raise ImageError(f"{item.id} does not exist", code="missing")

    for number in range(100):
        Path(f"p/{number:03}.png").touch()
    monkeypatch.setattr(shards_module, "read_item", gone)
    with pytest.raises(ExportError, match=r"after 3 consecutive failures; last error: 001.png"):
        export(options=ExportOptions(max_failures=3), decode_threads=2)
    assert len(asked) < 20  # what threads had begun ahead
    asked.clear()
    with pytest.raises(ExportError, match="stopped after 3 consecutive failures"):
        export(options=ExportOptions(max_failures=3), decode_threads=1)
    assert asked == ["0.png", "000.png", "001.png"]


def test_failures_that_are_not_in_a_row_do_not_stop_an_export(export_dir: Path) -> None:
    for number in (0, 2, 4, 6, 8):
        corrupt_image(f"{number}.png", "empty" if number % 4 else "nan")
    assert export(options=replace(SMALL, max_failures=2)).exported == 5


def test_a_breaker_counts_what_is_read_and_what_is_done() -> None:
    breaker = CircuitBreaker(3)
    error = ImageError("does not exist", name="x", remedy="check the path")
    for each in (error, error, None, error, error):
        breaker.count_read(each)
        breaker.count_done(each)
    with pytest.raises(ExportError) as stopped:
        breaker.count_read(error)
    assert str(stopped.value) == (
        "stopped after 3 consecutive failures; last error: x: does not exist. Check the path. Fix "
        "the cause and run the same command again, which tries them again and keeps the shards "
        "before them, or allow more failures with --max-failures."
    )
    CircuitBreaker(0).count_done(error)


# Resuming


def test_resume_skips_finished_shards(export_dir: Path) -> None:
    export()
    before = files()
    done = export(encoder=NeverAsked())
    assert (done.resumed, done.exported, done.failed) == (11, 10, {"truncated": 1})
    assert files() == before


def torn(data: bytes) -> bytes | None:
    return data[:-7]


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "gone": lambda data: None,
    "torn": torn,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "no safetensors": lambda data: b"<html>" * 100,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(
    export_dir: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    before = files()
    path = Path("out/shard-00000001.safetensors")
    data = HARMS[harm](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    encoder = FakeEncoder()
    done = export(encoder=encoder)
    assert (encoder.encoded, done.resumed, done.exported) == (4, 7, 10)
    assert files() == before
    assert ("It is made again." in caplog.text) == (data is not None)


def test_a_shard_of_another_export_is_not_overwritten(export_dir: Path) -> None:
    export()
    path = Path("out/shard-00000001.safetensors")
    write_features(path, [ImageFeatures("a", torch.ones(1, WIDTH), (1, 2, 2))], {})
    foreign = path.read_bytes()
    with pytest.raises(
        ExportError, match=r"shard-00000001.*: it belongs to a different export.*Move it away"
    ):
        export()
    assert path.read_bytes() == foreign
    export(out="others", options=replace(SMALL, output="mean"))
    for other in ("out/shard-00000000.safetensors", "others/shard-00000001.safetensors"):
        path.write_bytes(Path(other).read_bytes())
        with pytest.raises(ExportError, match="it belongs to a different export"):
            export()


DIFFERENT: dict[str, tuple[Any, ExportOptions, str]] = {
    "model": (FakeEncoder(), SMALL, "weights_sha256 was 0000"),
    "policy": (FakeEncoder(max_pixels=50176), SMALL, "image_policy.max_pixels was "),
    "output": (FakeEncoder(), replace(SMALL, output="mean"), "output was merged, is mean now"),
    "dtype": (
        FakeEncoder(),
        replace(SMALL, dtype="bfloat16"),
        "dtype was float32, is bfloat16 now",
    ),
    "shard size": (FakeEncoder(), replace(SMALL, shard_size=5), "shard_size was 4, is 5 now"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_other_settings_are_refused_with_the_difference(export_dir: Path, what: str) -> None:
    export()
    before = files()
    encoder, options, words = DIFFERENT[what]
    if what == "model":
        metadata = {**encoder.metadata(), "weights_sha256": "2" * 64}
        encoder.metadata = lambda: metadata
    with pytest.raises(ExportError, match="out: it holds an export that differs") as caught:
        export(encoder=encoder, options=options)
    assert caught.value.name == "out"
    assert words in caught.value.fact
    assert caught.value.remedy == (
        "to continue, pass the inputs and settings that it was started with; to start a new "
        "export, pass another --out"
    )
    assert files() == before


def test_other_images_are_refused_and_counted(export_dir: Path) -> None:
    export()
    before = files()
    Path("p/0.png").unlink()
    Path("p/y.png").write_bytes(b"")
    Path("p/z.png").write_bytes(b"")
    with pytest.raises(ExportError, match=r"its images: 1 missing, first 0.png; 2 new, first y.p"):
        export()
    os.rename("p", "q")
    Path("q/0.png").write_bytes(b"")
    for name in ("y", "z"):
        Path(f"q/{name}.png").unlink()
    with pytest.raises(ExportError, match=r"its images: 11 in another place, first 0.png") as error:
        export("q")
    assert f"(it was in {export_dir / 'p/0.png'})" in str(error.value)
    assert "as input, pass" not in str(error.value)  # its images are gone from where it says
    names = sorted(os.listdir("q"), reverse=True)
    Path("l.jsonl").write_text("\n".join(json.dumps({"id": n, "path": f"p/{n}"}) for n in names))
    with pytest.raises(ExportError, match="its images: in another order"):
        export("l.jsonl")
    assert files() == before


def test_another_name_for_the_same_weights_is_the_same_export(export_dir: Path) -> None:
    export(out="whole")
    export()
    Path("out/shard-00000001.safetensors").unlink()
    encoder = FakeEncoder()
    metadata = {**encoder.metadata(), "model": "/elsewhere/model", "commit": "f" * 40}
    encoder.metadata = lambda: metadata  # type: ignore[method-assign]
    export(encoder=encoder)
    assert files() == files("whole")


def test_a_folder_of_other_things_is_refused_and_left_alone(export_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    for given, words in (
        ("out", r"out: it holds notes.txt \(1 in all\) and no export.json"),
        ("p/x.png", r"p/x.png: not a folder\. Pass another --out"),
        ("dangling", r"dangling: not a folder\. Pass another --out"),
        ("no/out", r"no: not a folder\. Create it first"),
        ("n" * 300 + "/out", "File name too long|not a folder"),
        ("caf\udce9", r"caf\\udce9': not UTF-8\. Expected a path that safetensors can open"),
    ):
        with pytest.raises(ExportError, match=words):
            export(out=given)
    assert files() == {"notes.txt": b"mine"}


def test_what_cannot_begin_leaves_nothing(export_dir: Path) -> None:
    Path("stray.jsonl").write_text('{"id": "x", "path": "p/0.png", "error": [["q"], "w"]}\n' * 2)
    for inputs, words in (
        (["p", "p"], "two images have this id"),
        (["empty"], "no image found in empty"),
        (["stray.jsonl"], "two images have this id"),  # its "error" is nothing of ours
    ):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(ExportError, match=words):
            export(*inputs)
        assert not Path("out").exists()


@pytest.mark.parametrize("name", ["list.json", "list.csv", "pictures.zip"])
def test_a_list_of_another_kind_is_no_image(export_dir: Path, name: str) -> None:
    Path(name).write_text("{}")
    with pytest.raises(
        ExportError, match=rf"{name}: not an image\. .* a list as .txt .* or as .jsonl"
    ):
        export(name)
    assert not Path("out").exists()
    check_inputs(["p", name])  # as a shell's * gives, where it is an image that fails
    assert export("p", name).failed == {"truncated": 1, "not-an-image": 1}


@pytest.mark.parametrize("line", ["[]", '{"id": ["x"]}', '{"id": "x", "error": 5}', "{", None])
def test_a_listing_that_is_damaged_tells_nothing(export_dir: Path, line: str | None) -> None:
    export()
    listing = Path("out/listing.jsonl")
    lines = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join([f"{line}\n", *lines[1:]]))
    if line is None:
        listing.unlink()
    Path("p/more.png").write_bytes(tiny_png(3))
    with pytest.raises(
        ExportError, match=r"cannot compare images: listing.jsonl is missing or corrupt"
    ):
        export()


def test_a_listing_that_vanishes_meanwhile_is_told(export_dir: Path) -> None:
    with plan_of() as plan:
        (plan.folder / "listing.jsonl").unlink()
        with pytest.raises(ExportError, match=r"listing.jsonl: cannot be read any more \(No such"):
            make_shard(FakeEncoder(), plan, 0)


def test_a_header_that_safetensors_would_not_read_is_refused_before_any_image(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", 3_000)
    with pytest.raises(ExportError, match=r"would need a header of up to .* Lower --shard-size"):
        export(encoder=NeverAsked(), options=replace(SMALL, shard_size=11))
    for folder in (None, "new", "out"):  # a dry run says so as well
        with pytest.raises(ExportError, match="Lower --shard-size"):
            estimate_export(NeverAsked(), ["p"], replace(SMALL, shard_size=11), folder=folder)
    assert export(options=replace(SMALL, shard_size=1)).exported == 10  # which then works
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", 300)  # an estimate, and there are shards
    Path("out/shard-00000003.safetensors").unlink()
    assert export(options=replace(SMALL, shard_size=1)).exported == 10


def test_a_shard_that_the_manifest_cannot_have_is_told(
    export_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        for shard in range(3):
            make_shard(FakeEncoder(), plan, shard)
        other = plan.path(1)
        other.write_bytes(other.read_bytes()[:-8])
        make_manifest(plan)
        assert pq.read_table("out/manifest.parquet").num_rows == 7
        assert "The manifest omits it: run its part again." in caplog.text
        own = plan.path(2)
        own.write_bytes(own.read_bytes()[:-8])
        with pytest.raises(
            ExportError, match=r"00002.safetensors: it was whole, and cannot be read"
        ):
            make_manifest(plan)
        assert pq.read_table("out/manifest.parquet").num_rows == 7


def test_an_exports_own_listing_takes_it_up_again(export_dir: Path) -> None:
    """Its folder has changed: what it was begun with is in its listing, what was broken as well."""
    Path("p/torn.tar").write_bytes(b"x" * 600)
    export()
    before = files()
    Path("out/shard-00000001.safetensors").unlink()
    Path("p/more.png").write_bytes(Path("p/0.png").read_bytes())
    with pytest.raises(
        ExportError, match=r"1 new, first more.png.* or only --resume out; .* pass --extend"
    ):
        export()
    done = export("out/listing.jsonl")
    assert done.resumed == done.images - 4
    assert files() == before


def reword_listing_errors(patch: pytest.MonkeyPatch, code: str | None = None) -> None:
    """List as another version of the package does, with other words for what is wrong."""

    def items(*arguments: Any, **named: Any) -> Any:
        for item in find_items(*arguments, **named):
            words = item.error and (code or item.error[0], f"{item.id} was worded differently")
            yield replace(item, error=words)

    patch.setattr(plan_module, "find_items", items)


def list_as_before(folder: Path) -> None:
    """Word an export's listing as an older version did, as if that had begun the export."""
    lines = [json.loads(line) for line in (folder / "listing.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if "error" in line] == ["torn.tar"]
    for line in lines:
        if "error" in line:
            line["error"][1] = "torn.tar was worded differently"
    listing = "".join(json.dumps(line) + "\n" for line in lines).encode()
    settings = json.loads((folder / "export.json").read_text())
    settings["listing_sha256"] = export_stress.hashlib.sha256(listing).hexdigest()
    (folder / "listing.jsonl").write_bytes(listing)
    (folder / "export.json").write_text(json.dumps(settings, sort_keys=True, indent=1) + "\n")


def test_a_listing_that_differs_in_messages_alone_is_resumed(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version words errors in its own way; the listing's hash is part of every shard."""
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with monkeypatch.context() as older:
        reword_listing_errors(older)
        export()
    before = files()
    for name in ("shard-00000000.safetensors", "shard-00000002.safetensors"):
        Path("out", name).unlink()  # of good images; and of the tar that is damaged
    assert estimate_export(FakeEncoder(), ["p"], SMALL, folder="out").images == 12
    for part in ((1, 2), (1, 1)):
        done = export(options=replace(SMALL, part=part))
        assert files() == before
    assert (done.resumed, done.failed) == (12, {"truncated": 2})
    messages = {error.id: error.message for error in load_features("out").errors}
    assert messages["torn.tar"] == "torn.tar was worded differently"
    [line] = [line for line in before["listing.jsonl"].splitlines() if b"torn.tar" in line]
    assert b"worded differently" in line


def test_an_edited_listing_is_kept_only_if_the_export_began_with_it(export_dir: Path) -> None:
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with plan_of(options=replace(SMALL, part=(1, 2))):  # which stops before any shard
        pass
    new = files()
    list_as_before(export_dir / "out")
    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        assert plan.listing.shard(2)[-2].error == ("truncated", "torn.tar was worded differently")
        assert plan.settings["listing_sha256"] == plan.listing.all[0].sha256
    assert b"worded differently" in files()["listing.jsonl"]
    Path("out/export.json").write_bytes(new["export.json"])  # of another listing than the edited
    with plan_of(options=replace(SMALL, part=(1, 2))):
        assert files()["listing.jsonl"] == new["listing.jsonl"]


@pytest.mark.parametrize("change", ["code", "order", "more"])
def test_a_listing_that_differs_in_more_than_messages_is_refused(
    export_dir: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with monkeypatch.context() as older:
        reword_listing_errors(older, code="damaged" if change == "code" else None)
        export()
    before = files()
    inputs, difference = ["p"], "1 in another place, first torn.tar"
    if change == "more":
        Path("p/y.png").write_bytes(b"")
        difference = "its images: 1 new, first y.png. To"  # and no word of the messages
    elif change == "order":
        lines = Path("out/listing.jsonl").read_text().splitlines()
        Path("l.jsonl").write_text("\n".join(reversed(lines)).replace("worded", "said"))
        inputs, difference = ["l.jsonl"], "its images: in another order"
    with pytest.raises(ExportError, match=difference):
        export(*inputs)
    assert files() == before


def test_a_damaged_description_is_refused(export_dir: Path) -> None:
    export()
    Path("out/export.json").write_text("{")
    with pytest.raises(ExportError, match=r"export.json: not JSON.*Pass another --out"):
        export()


def test_what_was_settled_before_the_first_shard_may_be_changed(export_dir: Path) -> None:
    """Who is told that an export is too large gives fewer images, or another output."""

    def too_large(estimate: Any) -> None:
        raise ExportError("too large")

    for count in (1, 2):
        with pytest.raises(ExportError, match="too large"):
            export(options=replace(SMALL, part=(1, count)), confirm=too_large)
        assert shards() == {}
    # others may be at it
    with pytest.raises(
        ExportError, match=r"output was merged, is mean now.*delete out/export.json"
    ):
        export(options=replace(SMALL, output="mean", part=(1, 2)))
    assert export("p/0.png", options=replace(SMALL, output="mean")).rows == 1
    assert load_features("out").ids == ["p/0.png"]
    with pytest.raises(ExportError, match="output was mean, is merged now"):
        export("p/0.png")


def test_a_file_of_that_name_that_is_not_ours_is_left_alone(export_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/export.json").write_text('{"theme": "dark"}')
    with pytest.raises(ExportError, match=r"export.json: it has no n_images.* Pass another --out"):
        export()
    assert files() == {"export.json": b'{"theme": "dark"}'}


def test_nothing_to_export_is_an_error(export_dir: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(ExportError, match=r"no image found in empty\. .* extension such as"):
        export("empty")
    assert not Path("out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_export_that_is_stopped_leaves_whole_shards_and_no_lock(
    export_dir: Path, error: type[BaseException]
) -> None:
    class Stopping(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                if self.encoded > 4:
                    raise error
                yield features

    export(out="whole")
    with pytest.raises(error):
        export(encoder=Stopping())
    assert set(files()) == {"export.json", "listing.jsonl", "shard-00000000.safetensors"}
    assert export().resumed == 4
    assert files() == files("whole")


def test_what_killed_runs_left_is_cleared_away(export_dir: Path) -> None:
    export()
    before = files()
    for name in (
        ".shard-00000002.safetensors.0123456789abcdef.tmp",
        ".listing-1-of-1.tmp",
        "..listing-1-of-1.tmp.0123456789abcdef.tmp",
        ".export.json.0123456789abcdef.tmp",
        ".manifest.parquet.0123456789abcdef.tmp",
    ):
        Path("out", name).write_bytes(b"half")
    export()
    assert files() == before


def test_a_part_leaves_alone_what_another_part_is_writing(export_dir: Path) -> None:
    Path("out").mkdir()
    own, other = (f".shard-0000000{i}.safetensors.0123456789abcdef.tmp" for i in (1, 0))
    export(options=replace(SMALL, part=(2, 2)))
    for name in (own, other):
        Path("out", name).write_bytes(b"half")
    export(options=replace(SMALL, part=(2, 2)))
    assert other in files()
    assert own not in files()


# Parts and locks


def test_parts_together_are_the_whole(export_dir: Path) -> None:
    export(out="whole")
    first = export(options=replace(SMALL, part=(1, 2)))
    assert (first.images, first.exported, len(shards())) == (7, 6, 2)
    assert not load_features("out").is_complete
    second = export(options=replace(SMALL, part=(2, 2)))
    assert (second.images, second.exported) == (4, 4)
    assert files() == files("whole")
    assert export(options=replace(SMALL, part=(9, 9))).images == 0


def make_shard(encoder: Any, plan: ExportPlan, shard: int) -> list[ManifestRow]:
    [done] = export_shards(encoder, plan, [shard])
    return done.rows


def test_a_worker_makes_a_shard_from_the_plan_alone(export_dir: Path) -> None:
    export(out="whole")
    with plan_of() as plan:
        sent = pickle.loads(pickle.dumps(plan))
        rows = make_shard(FakeEncoder(), sent, 1)
        assert [(row.index, row.id, row.row_begin, row.row_end) for row in rows] == [
            (4, "4.png", 0, 4), (5, "5.png", 4, 8), (6, "6.png", 8, 12), (7, "7.png", 12, 16),
        ]  # fmt: skip
        assert make_shard(NeverAsked(), sent, 1) == rows
        for shard in (2, 0):  # in any order
            make_shard(FakeEncoder(), sent, shard)
        make_manifest(plan)
    assert files() == files("whole")


def test_a_second_writer_is_refused_and_told_who_the_first_is(export_dir: Path) -> None:
    with plan_of(), pytest.raises(ExportError) as caught:
        export()
    owner = f"process {os.getpid()} on {socket.gethostname()} (since 20"
    assert str(caught.value).startswith(f"out: {owner}")
    assert str(caught.value).endswith(
        "is writing to it. Wait for it, or stop it, and run this again."
    )
    assert export().exported == 10


PARTS = [
    ((1, 1), (1, 2), False),
    ((1, 2), (1, 1), False),
    ((1, 2), (1, 2), False),
    ((1, 2), (2, 2), True),
    ((1, 2), (2, 3), False),
]


@pytest.mark.parametrize(("first", "second", "fits"), PARTS)
def test_parts_of_one_count_may_run_together_and_nothing_else(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int], fits: bool
) -> None:
    with hold_folder(tmp_path, first):
        if fits:
            with hold_folder(tmp_path, second), short_lock(tmp_path):
                pass
        else:
            with (
                pytest.raises(
                    ExportError, match=r"process \d+ on .* is writing to it|other parts are"
                ),
                hold_folder(tmp_path, second),
            ):
                pass
    assert list(tmp_path.iterdir()) == []


def die_holding(folder: Path) -> None:
    with hold_folder(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_whose_owner_was_killed_is_taken_over(tmp_path: Path) -> None:
    """The kernel drops it with the process; the name that is left on this host means nothing."""
    fork = multiprocessing.get_context("fork")
    owner = fork.Process(target=die_holding, args=(tmp_path,))
    owner.start()
    owner.join(60)
    assert owner.exitcode == -signal.SIGKILL
    left = json.loads((tmp_path / "lock").read_text())
    assert left["host"] == socket.gethostname()
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_lock_that_another_host_left_is_respected_and_the_way_out_is_told(
    tmp_path: Path,
) -> None:
    owner = {"host": "node-17", "pid": 4, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "lock").write_text(json.dumps(owner))
    for part in ((1, 1), (1, 2)):
        with pytest.raises(ExportError) as caught, hold_folder(tmp_path, part):
            pass
        assert "process 4 on node-17 (since 2026" in caught.value.fact
        assert "was writing to it, and this host" in caught.value.fact
        assert f"delete {tmp_path}/lock" in caught.value.remedy
    (tmp_path / "lock").unlink()
    with hold_folder(tmp_path):
        pass


def refuse_lock(*_: Any) -> None:
    raise OSError(38, "Function not implemented")


def test_a_disk_without_locks_is_warned_of_once_and_names_alone_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that outlived its lock kept every other host out, for ever."""
    monkeypatch.setattr("fcntl.flock", refuse_lock)
    for host in ("node-1", "node-2"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        for part in ((1, 2), (1, 1)):
            with hold_folder(tmp_path, part), short_lock(tmp_path):
                pass
    assert caplog.text.count("cannot be locked (Function not implemented)") == 1
    with hold_folder(tmp_path):
        monkeypatch.setattr("socket.gethostname", lambda: "node-3")
        with pytest.raises(ExportError, match=r"process .* on node-2 .* was writing to it"):
            hold_folder(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_moment_of_another_host_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that begin together on many hosts, where one does not see another's locks."""
    name = tmp_path / "lock-moment"
    name.write_text(json.dumps({"host": "node-17", "pid": 4, "since": "2026-01-01"}))
    pauses = iter([lambda: None, name.unlink])
    monkeypatch.setattr(
        lock_module,
        "time",
        SimpleNamespace(sleep=lambda _: next(pauses)(), monotonic=time.monotonic),
    )
    with short_lock(tmp_path):
        assert next(pauses, None) is None


def test_a_lock_file_that_its_owner_takes_away_in_between_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, then unlinked by its owner, then locked: the next one would lock another file."""
    real, gone = fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        if not gone:
            gone.append((tmp_path / "lock").unlink())
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_folder(tmp_path):
        with pytest.raises(ExportError, match="is writing to it"), hold_folder(tmp_path):
            pass
        assert (tmp_path / "lock").exists()


def hold_often(folder: Path, count: int, wrong: Any) -> None:
    inside = folder / "inside"
    for _ in range(count):
        with short_lock(folder):
            try:
                inside.touch(exist_ok=False)
            except FileExistsError:
                wrong.value += 1
            inside.unlink(missing_ok=True)


def test_moments_never_overlap(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    wrong = spawn.Value("i", 0)
    workers = [spawn.Process(target=hold_often, args=(tmp_path, 40, wrong)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert wrong.value == 0


# The manifest


def test_the_manifest_has_a_row_for_every_image(export_dir: Path) -> None:
    Image.fromarray(np.zeros((56, 140, 3), np.uint8)).save("p/2.png")
    export()
    rows = pq.read_table("out/manifest.parquet").to_pylist()
    assert [row["id"] for row in rows] == [*(f"{n}.png" for n in range(10)), "x.png"]
    assert [row["index"] for row in rows] == list(range(11))
    expected = {
        "status": "ok", "shard": "shard-00000000.safetensors", "row_begin": 8, "row_end": 18,
        "tokens": 10, "grid_t": 1, "grid_h": 4, "grid_w": 10, "height": 56, "width": 140,
        "source": str(export_dir / "p/2.png"), "error_code": None, "id_bytes": None,
    }  # fmt: skip
    assert {name: rows[2][name] for name in expected} == expected
    assert rows[3]["row_begin"] == 18
    assert (
        rows[2]["sha256"] == export_stress.hashlib.sha256(Path("p/2.png").read_bytes()).hexdigest()
    )
    bad = rows[-1]
    assert (bad["status"], bad["error_stage"], bad["error_code"], bad["tokens"]) == (
        "error", "decode", "truncated", None,
    )  # fmt: skip
    assert bad["error_message"].startswith("x.png: a truncated")


def test_parts_that_end_together_write_the_manifest_one_after_the_other(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the slower one could overwrite a complete manifest with what it saw before."""
    is_waiting, may_go_on = threading.Event(), threading.Event()

    def wait(seconds: float) -> None:
        is_waiting.set()
        may_go_on.wait(60)

    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        make_shard(FakeEncoder(), plan, 0)
        make_shard(FakeEncoder(), plan, 2)
        monkeypatch.setattr(
            lock_module, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic)
        )
        ending = threading.Thread(target=make_manifest, args=(plan,))
        with short_lock(plan.folder):
            ending.start()
            assert is_waiting.wait(60)
            assert "manifest.parquet" not in files()
            make_shard(FakeEncoder(), plan, 1)
        may_go_on.set()
        ending.join(60)
    assert pq.read_table("out/manifest.parquet").num_rows == 11


def test_patience_is_with_one_who_keeps_a_lock_and_not_with_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 parts that ended together, ten gave up while the others took their turns."""
    polls = iter(range(1000))

    def owner(descriptor: int) -> str:
        return f"part {min(next(polls) // 4, 15)}"  # another one every 4 polls; the last one stays

    with short_lock(tmp_path):
        monkeypatch.setattr(lock_module, "SHORT_LOCK_TIMEOUT_S", 0.3)
        monkeypatch.setattr(lock_module, "_owner", owner)
        with (
            pytest.raises(ExportError, match=r": part 15 is writing to it\. Wait for it"),
            short_lock(tmp_path),
        ):
            pass
    assert next(polls) > 60


def test_rows_of_the_manifest_are_the_rows_of_the_shard(export_dir: Path) -> None:
    export()
    features = load_features("out")
    for row in pq.read_table("out/manifest.parquet").to_pylist():
        if row["status"] == "ok":
            shard = load_features(f"out/{row['shard']}")
            rows = shard._file.get_tensor("image_embeds")[row["row_begin"] : row["row_end"]]
            assert torch.equal(rows, features[row["id"]].embeds)


def test_names_that_are_no_unicode_are_whole_in_the_manifest(export_dir: Path) -> None:
    name = b"caf\xe9\n.png"
    with open(b"p/" + name, "wb") as file:
        file.write(tiny_png(1))
    export()
    [row] = [r for r in pq.read_table("out/manifest.parquet").to_pylist() if r["id_bytes"]]
    assert row["id_bytes"] == name
    assert row["id"] == "caf\\udce9\n.png"
    assert load_features("out")[os.fsdecode(name)].embeds is not None


def test_without_pyarrow_the_manifest_is_json_lines(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    parquet = pq.read_table("out/manifest.parquet").to_pylist()
    monkeypatch.setattr(manifest_module, "load_arrow", lambda: False)
    assert export().manifest.name == "manifest.jsonl"
    lines = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert [{**line, "id_bytes": None} for line in lines] == parquet
    assert not Path("out/manifest.parquet").exists()  # it would go stale


# How large


@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_the_estimate_is_what_the_export_takes(export_dir: Path, output: Any) -> None:
    Image.fromarray(np.zeros((60, 170, 3), np.uint8)).save("p/2.jpg")
    Path("p/y.png").write_bytes(b"no image")
    options = ExportOptions(output, shard_size=4)
    estimate = estimate_export(FakeEncoder(), ["p"], options)
    assert not Path("out").exists()
    done = export(options=options)
    # the cut image has a header; that it is cut is found when it is decoded
    assert (estimate.images, estimate.unreadable) == (13, 1)
    one = {"merged": 4, "patch": 16, "mean": 1}[output]
    assert estimate.rows == done.rows + one
    assert estimate.seconds is not None
    assert abs(estimate.bytes - done.bytes) < 5_000
    parts = [
        estimate_export(FakeEncoder(), ["p"], replace(options, part=(i, 3))).rows for i in (1, 2, 3)
    ]
    assert sum(parts) == estimate.rows


def test_the_estimate_counts_what_limits_refuse(export_dir: Path) -> None:
    options = replace(SMALL, limits=ImageLimits(max_pixels=100))
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save("p/small.png")
    estimate = estimate_export(FakeEncoder(), ["p"], options, folder="out")
    assert (estimate.images, estimate.unreadable) == (12, 11)
    assert export(options=options).failed == {"too-many-pixels": 11}


def test_a_sample_stands_for_the_whole(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vit.export.estimate.SAMPLE", 5)
    Path("p/x.png").unlink()
    with plan_of() as plan:
        estimate = estimate_plan(FakeEncoder(), plan)
    assert (estimate.images, estimate.rows, estimate.is_sample) == (10, 40, True)
    assert estimate.seconds is None


def test_the_time_has_a_part_for_each_batch_and_one_for_each_patch(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 3 times too long for small images: 8 of them were timed, and filled no batch."""
    Path("p/x.png").unlink()
    with tarfile.open("t.tar", "w") as tar:
        tar.add("p")
    clock, asked = [0.0], []

    class Timed(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            asked.append(len(images))
            batches = -(-16 * len(images) // estimate_module.TOKEN_BUDGET["cpu"])
            clock[0] += 0.5 * batches + 0.001 * 16 * len(images) + 3.0 * (len(asked) == 1)
            return [ImageFeatures("a", torch.zeros(4, WIDTH), (1, 4, 4)) for _ in images]

    monkeypatch.setattr(estimate_module.time, "monotonic", lambda: clock[0])
    for given in ("p", "t.tar"):  # 10 images in 3 shards, each a batch
        asked.clear()
        options = replace(SMALL, shard_size=4)
        assert estimate_export(Timed(), [given], options).seconds == pytest.approx(1.66)
        assert asked == [1, 1, 8]  # the first one warms up
    monkeypatch.setattr(estimate_module, "TOKEN_BUDGET", {"cpu": 32})
    assert estimate_export(Timed(), ["p"], options).seconds == pytest.approx(5 * 0.5 + 0.16)


def test_a_slow_image_is_timed_alone(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slow(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            clock[0] += 7.0 * len(images)
            return [ImageFeatures("a", torch.zeros(4, WIDTH), (1, 4, 4)) for _ in images]

    monkeypatch.setattr(estimate_module.time, "monotonic", lambda: clock[0])
    Path("p/x.png").unlink()
    assert estimate_export(Slow(), ["p"]).seconds == 70.0
    assert clock[0] == 7.0


def test_nothing_is_timed_where_every_image_fails(export_dir: Path) -> None:
    class Failing(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            error = ImageError("cut", code="truncated")
            return [FailedImage(str(index), error) for index, _ in enumerate(images)]

    assert estimate_export(Failing(), ["p"]).seconds is None


# Options


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": "token"}, {"dtype": "float16"}, {"shard_size": 0}, {"on_error": "stop"},
        {"part": (0, 2)}, {"part": (3, 2)}, {"part": 5}, {"part": "12"}, {"part": [1, 1]},
        {"part": (1, 2, 3)}, {"part": (1.0, 1.0)}, {"max_failures": -1}, {"max_failures": "x"},
        {"shard_size": 1.5}, {"shard_size": "5"}, {"shard_size": True}, {"limits": 5},
        {"limits": None},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ArgumentError, match=rf"{name} is .*\. Expected "):
        ExportOptions(**wrong)


def test_what_is_no_encoder_and_no_options_is_refused(export_dir: Path) -> None:
    with pytest.raises(ArgumentError, match=r"encoder is 'tiny'\. Expected a VisionEncoder"):
        export_features("tiny", ["p"], "out")  # type: ignore[arg-type]
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    with pytest.raises(ArgumentError, match=r"options is \{'output': 'mean'\}\. Expected Export"):
        export_features(encoder, ["p"], "out", {"output": "mean"})  # type: ignore[arg-type]
    assert not Path("out").exists()


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, qwen_vit: Any) -> Any:
    """`qwen-vit export ARGUMENTS` in this process, with the stand-in encoder."""
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(export_module, "VisionEncoder", loader)

    def command(*arguments: str) -> tuple[int, str, str]:
        done: tuple[int, str, str] = qwen_vit("export", *arguments, "--model", "m")
        return done

    return command


def test_the_command_exports_and_tells_what_was_skipped(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out")
    assert code == 1
    assert out.startswith("10 done, 0 to do, 1 failed: 40 rows, 0.0 MB, ")
    assert "failed: 1 truncated\n" in out
    assert "wrote out/manifest.parquet" in out
    assert err.startswith("skipped: x.png: a truncated PNG")
    assert len(err.splitlines()) == 1  # no bar where there is no terminal
    Path("p/x.png").write_bytes(tiny_png(3))
    assert run("p", "--out", "fresh")[0] == 0


def test_a_resumed_export_counts_what_came_earlier(export_dir: Path, run: Any) -> None:
    """It read "nothing was left to do: exported 10 of 11 images (11 tried before)"."""
    run("p", "--out", "out", "--shard-size", "4")
    _, out, _ = run("p", "--out", "out", "--shard-size", "4")
    assert out.startswith("10 done, 0 to do, 1 failed earlier: 40 rows, 0.0 MB, ")
    assert "failed: 1 truncated; --retry-failed tries them again" in out
    assert "in this run" not in out
    Path("out/shard-00000002.safetensors").unlink()  # of 8.png, 9.png and x.png
    _, out, _ = run("p", "--out", "out", "--shard-size", "4", "--dry-run")
    assert out.startswith("images       8 done, 3 to do\n")
    code, out, _ = run("p", "--out", "out", "--shard-size", "4")
    assert (code, out.splitlines()[0].partition(":")[0]) == (1, "10 done, 0 to do, 1 failed")
    assert "3 images in this run, 8 in earlier ones" in out


def test_quiet_leaves_results_and_errors(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out", "-q")
    assert (code, err) == (1, "")
    assert out.startswith("10 done, 0 to do, 1 failed")
    assert "waited for" not in out
    assert run("p", "--out", "nowhere/out", "-q")[2].startswith("error: nowhere: not a folder")
    assert "waited for: read and decode" in run("p", "--out", "more", "-v")[1]


def test_a_list_on_standard_input_is_exported_and_resumed(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(*names: str) -> None:
        data = io.BytesIO("".join(f"{name}\n" for name in names).encode())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=data, isatty=lambda: False))

    given("p/0.png", "", "p/1.png")
    assert run("-", "--out", "out")[1].startswith("2 done, 0 to do: ")
    assert load_features("out").ids == ["p/0.png", "p/1.png"]
    given("p/0.png", "p/1.png")
    assert run("-", "--out", "out")[1].startswith("2 done, 0 to do: ")
    given("p/0.png")
    assert "its images: 1 missing, first p/1.png" in run("-", "--out", "out")[2]


def test_a_part_says_what_of_the_folder_is_there(export_dir: Path, run: Any) -> None:
    """It read as if all were done."""
    words = ("p", "--out", "out", "--shard-size", "4")
    out = run(*words, "--part", "2/2")[1]
    assert "a part: 1 of the folder's 3 shards exist" in out
    assert "a part: " not in run(*words, "--part", "1/2")[1]
    _, out, err = run("p", "--out", "one", "--part", "2/8")
    assert "1 shard for 8 parts: lower --shard-size so that all have work" in err
    assert out.startswith("0 done, 0 to do: 0 rows")


@pytest.mark.parametrize("is_any_whole", [False, True])
def test_an_interrupt_says_what_is_kept(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch, is_any_whole: bool
) -> None:
    def count(self: Any, features: ImageFeatures | FailedImage) -> None:
        if features.id == ("5.png" if is_any_whole else "1.png"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "count", count)
    code, _, err = run("p", "--out", "out", "--shard-size", "4")
    assert code == 130
    kept = "4 images kept; run the same command again to resume"
    assert (kept in err, "no image was kept" in err) == (is_any_whole, not is_any_whole)


def test_its_json_is_one_document(export_dir: Path, run: Any) -> None:
    code, out, _ = run("p", "--out", "out", "--json", "--output", "mean", "--dtype", "bfloat16")
    report = json.loads(out)
    assert code == 1
    assert (report["images"], report["exported"], report["failed"]) == (11, 10, {"truncated": 1})
    assert report["manifest"] == "out/manifest.parquet"


def test_a_dry_run_writes_nothing(export_dir: Path, run: Any) -> None:
    code, out, err = run("p", "--out", "out", "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["images"] == 11
    _, out, _ = run("p", "--out", "out", "--dry-run")
    assert out.startswith("images       11 to do\n")
    assert sorted(os.listdir()) == ["p"]


def test_a_dry_run_refuses_what_the_export_would(export_dir: Path, run: Any) -> None:
    """It counted images of one id, of an empty list, and for a folder that was not an export's."""
    Path("file").touch()
    Path("list.txt").touch()
    assert run("p", "--out", "out")[0] == 1
    begun = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for arguments, words in (
        (("p", "--out", "file"), "file: not a folder"),
        (("p", "--out", "no/out"), "no: not a folder"),
        (("p", "--out", "p"), "no export.json"),
        (("p", "--out", "o" * 300), "File name too long"),
        (("p/0.png", "--out", "out"), "holds an export that differs: its images: "),
        (("p", "--out", "out", "--output", "mean"), "output was merged, is mean now"),
        (("p/0.png", "p/0.png", "--out", "fresh"), "p/0.png: two images have this id"),
        (("list.txt", "--out", "fresh"), "no image found in list.txt"),
    ):
        code, out, err = run(*arguments, "--dry-run")
        assert (code, out) == (2, "")
        assert words in err
    assert run("p", "--out", "out", "--dry-run")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == begun
    assert sorted(os.listdir()) == ["file", "list.txt", "out", "p"]


@pytest.mark.parametrize(
    ("suffix", "is_whole"),
    [("png", False), ("jpg", False), ("bmp", False), ("tif", False), ("webp", True)],
)
def test_of_a_large_image_in_a_tar_the_head_is_read(
    export_dir: Path, suffix: str, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run read all of every tar. Where the head does not tell the size, the rest does."""
    values = np.random.default_rng(0).integers(0, 256, (400, 420, 3), np.uint8)
    Image.fromarray(values).save(f"p/large.{suffix}", **({"lossless": True} if is_whole else {}))
    length = Path(f"p/large.{suffix}").stat().st_size
    assert length > estimate_module.HEAD_BYTES
    with tarfile.open("t.tar", "w") as tar:
        tar.add(f"p/large.{suffix}")
    sizes: list[Any] = []
    real = estimate_module.read_item

    def read(item: Any, limits: Any) -> bytes:
        sizes.append(item.size)
        return real(item, limits)

    monkeypatch.setattr(estimate_module, "read_item", read)
    [item] = find_items(["t.tar"])
    assert estimate_module._size_in_header(item, ImageLimits()) == (400, 420)
    assert sizes == [estimate_module.HEAD_BYTES, *([length] if is_whole else [])]


@pytest.mark.parametrize(
    ("n_bytes", "seconds", "words"),
    [
        (88_944, 0.488, ("0.1 MB", "about 0.5 s, by a few images")),
        (1_000_000, 1_500.0, ("1.0 MB", "about 25 min, by a few images")),
        (16_500_000_000_000, 25_200.0, ("16,500.0 GB", "about 7.0 hours, by a few images")),
        (0, None, ("0.0 MB", "unknown")),
    ],
)
def test_an_estimate_is_told_in_units_of_its_size(
    n_bytes: int, seconds: float | None, words: tuple[str, str]
) -> None:
    text = estimate_text(Estimate(1, 0, 1, n_bytes, seconds), Path("no", "folder", "yet"))
    disk, time = (line.split("  ")[-1].strip() for line in text.splitlines()[2:])
    assert re.fullmatch(rf"{words[0]}, where [\d,.]+ GB are free", disk)
    assert time == words[1]


def test_a_large_export_is_not_begun_without_a_yes(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "ASK_ABOVE_BYTES", 1_000)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - no terminal
    code, out, err = run("p", "--out", "out")
    assert (code, out) == (2, "")
    assert "out: the export will take about" in err
    assert "Pass --yes" in err
    assert shards() == {}
    assert run("p", "--out", "out")[0] == 2  # still not begun
    assert run("p", "--out", "out", "--yes")[0] == 1
    assert run("p", "--out", "out")[0] == 0  # what is in progress goes on


def test_who_answers_no_is_told_that_nothing_was_exported(
    export_dir: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called interrupted, with 130."""
    monkeypatch.setattr(export_command, "ASK_ABOVE_BYTES", 1_000)
    for answer, code, words in (
        ("n\n", 2, "error: export cancelled. To make it smaller, pass fewer images"),
        ("", 130, "interrupted"),  # Ctrl-D
    ):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        done = run("p", "--out", "out")
        assert (done[0], done[1]) == (code, "")
        assert "Go on? [y/N]" in done[2]
        assert words in done[2].splitlines()[-1]
        assert shards() == {}


def test_a_terminal_is_shown_the_speed_and_what_is_skipped(
    export_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    export(show_progress=True)
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "100%" in last
    assert "11/11" in last
    assert "image/s" in last
    for word in ("tokens/s", " MB", "1 skipped"):
        assert word in last
    export(show_progress=True)
    assert "11/11" in capsys.readouterr().err


def test_a_log_is_told_now_and_then_in_whole_lines(
    export_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(out="short", show_progress=True)
    assert capsys.readouterr().err.startswith("skipped: ")  # nothing else, in less than a minute
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 1e-9)
    export(show_progress=True)
    lines = capsys.readouterr().err.split("\n")
    assert any("11/11" in line and "tokens/s" in line for line in lines)
    assert not any("\r" in line for line in lines)


def test_what_is_no_image_by_its_name_is_counted(export_dir: Path, run: Any) -> None:
    for name in ("a.txt", "b.txt", "README", *(f"c.{i}" for i in range(9))):
        Path("p", name).write_text("")
    _, _, err = run("p", "--out", "out")
    assert err.splitlines()[0] == (
        "skipped files without an image or video extension: 2 .txt, 1 without any, "
        "1 .0, 1 .1, 1 .2, ..."
    )


def test_twenty_failures_are_told_and_the_rest_counted(export_dir: Path, run: Any) -> None:
    for number in range(30):
        Path(f"p/z{number}.png").write_bytes(b"")
    _, out, err = run("p", "--out", "out")
    assert "failed: 30 empty-file, 1 truncated" in out
    assert len(err.splitlines()) == 21
    assert err.splitlines()[-1] == "skipped: more than 20; the manifest has them"


def test_what_killed_runs_left_is_cleared_by_whom_it_belongs_to(export_dir: Path) -> None:
    left = {
        "own shard": ".shard-00000000.safetensors.1f.tmp",
        "other shard": ".shard-00000001.safetensors.1f.tmp",
        "own listing": ".listing-1-of-2.tmp",
        "other listing": ".listing-2-of-2.tmp",
        "manifest": ".manifest.parquet.1f.tmp",
    }

    def litter() -> None:
        for name in left.values():
            Path("out", name).write_text("")

    def still_there() -> set[str]:
        return {what for what, name in left.items() if Path("out", name).exists()}

    with plan_of(options=replace(SMALL, part=(1, 2))):
        litter()
    with plan_of(options=replace(SMALL, part=(1, 2))):
        assert still_there() == {"other shard", "other listing"}
    litter()
    with plan_of():
        assert still_there() == set()


def test_a_lock_that_is_just_given_back_is_waited_for(tmp_path: Path) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with hold_folder(tmp_path):
            held.set()
            done.wait(0.2)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    with hold_folder(tmp_path):
        assert done.is_set() is False
    holder.join(30)


def test_only_what_the_user_changed_is_told(export_dir: Path) -> None:
    """The hash of the configs changes with them, and says nothing to anybody."""
    export()
    encoder = FakeEncoder()
    metadata = encoder.metadata()
    policy = {**metadata["image_policy"], "max_pixels": 5_000}
    changed = {**metadata, "config_sha256": "f" * 64, "image_policy": policy}
    encoder.metadata = lambda: changed  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=r"max_pixels was .* is 5000 now") as caught:
        export(encoder=encoder)
    assert "config_sha256" not in str(caught.value)


def test_a_folder_in_a_shards_place_is_told(export_dir: Path) -> None:
    with plan_of() as plan:
        plan.path(1).mkdir()
        with pytest.raises(ExportError, match=r"00001.safetensors: a folder\. Expected a feature"):
            make_shard(FakeEncoder(), plan, 1)


def test_a_shard_that_is_gone_right_after_it_was_written_is_told(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer.FeatureWriter, "save", lambda *_: None)
    with (
        plan_of() as plan,
        pytest.raises(ExportError, match=r"disappeared or was damaged right after it"),
    ):
        make_shard(FakeEncoder(), plan, 0)


def test_a_disk_that_fails_while_inputs_are_listed_is_not_the_outputs(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def items(*_: Any, **__: Any) -> Any:
        yield from find_items(["p/0.png"])
        raise OSError(errno.EIO, "Input/output error", "p")

    monkeypatch.setattr(plan_module, "find_items", items)
    with pytest.raises(
        ExportError, match=r"p: cannot be listed \(Input/output error\)\. Check its"
    ):
        export()
    assert not Path("out").exists()


def test_a_folder_that_may_not_be_written_is_told_before_any_work(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match=r"out: not writable\. Check its permissions"):
        export(encoder=NeverAsked())


def test_a_folder_given_by_name_that_cannot_be_listed_begins_nothing(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def refused(path: str) -> Any:
        if os.fspath(path) == "p":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(
        ExportError, match=r"p: cannot be listed \(Permission denied\)\. Check its perm"
    ):
        export()
    assert not Path("out").exists()


def test_a_broken_link_with_a_patterns_name_is_itself(export_dir: Path) -> None:
    Path("a[1].jpg").symlink_to("nothing")
    with pytest.raises(ExportError, match=r"a\[1\].jpg: cannot be exported \(No such file"):
        export("a[1].jpg")


def test_images_that_were_there_say_nothing_about_the_speed(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    Path("out/shard-00000001.safetensors").unlink()
    initial = []
    close = progress_module.tqdm.close
    monkeypatch.setattr(
        progress_module.tqdm, "close", lambda bar: (initial.append(bar.initial), close(bar))
    )
    export(show_progress=True)
    assert initial[0] == 11 - 4


def test_the_command_says_what_it_waited_for_and_how_to_try_again(
    export_dir: Path, run: Any
) -> None:
    _, out, _ = run("p", "--out", "out", "--profile")
    assert re.search(r"waited for: read and decode \d+%, encode \d+%, copy back \d+%, write", out)
    assert "--retry-failed" not in out
    _, again, _ = run("p", "--out", "out")
    assert "failed: 1 truncated; --retry-failed tries them again" in again
    assert "waited for" not in again


BAD_USAGE = {
    "no inputs": ([], "INPUTS, --model and --out are needed"),
    "part": (["p", "--part", "3"], "expected I/N"),
    "part range": (["p", "--part", "3/2"], "expected I/N such as 2/8, I from 1 to N"),
    "shard size": (["p", "--shard-size", "0"], "Invalid value for '--shard-size'"),
    "failures": (["p", "--max-failures", "-1"], "Invalid value for '--max-failures'"),
    "threads": (["p", "--decode-threads", "0"], "Invalid value for '--decode-threads'"),
    "missing": (["gone"], "gone: cannot be exported"),
    "address": (["https://x/y.jpg"], "https://x/y.jpg: an address"),
    "foreign folder": (["p", "--out", "p"], "holds 0.png"),
}


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_bad_usage_ends_with_2_before_the_model_is_loaded(
    export_dir: Path, run: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("refused only after the model was loaded")

    monkeypatch.setattr(export_module, "VisionEncoder", SimpleNamespace(from_pretrained=no_model))
    arguments, words = BAD_USAGE[fault]
    code, out, err = run(*arguments, *([] if "--out" in arguments else ["--out", "out"]))
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("device", "stored", "computed"),
    [("cpu", "bfloat16", "auto"), ("cuda", "bfloat16", "bfloat16"), ("cuda", None, "auto")],
)
def test_a_gpu_computes_in_the_type_that_is_stored(
    monkeypatch: pytest.MonkeyPatch, device: str, stored: Any, computed: str
) -> None:
    asked: dict[str, Any] = {}
    loader = SimpleNamespace(from_pretrained=lambda model, **options: asked.update(options))
    monkeypatch.setattr(export_module, "VisionEncoder", loader)
    export_module.load_encoder("m", ExportOptions(dtype=stored), device=device, max_pixels=5)
    assert asked == {"device": device, "dtype": computed, "max_pixels": 5}


# A few of what tools.checks.soak does by the hundred, with the command in processes of its own


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> export_stress.Exports:
    return export_stress.Exports(tmp_path_factory.mktemp("exports"), 300)


@pytest.mark.slow
def test_kills_lose_and_double_nothing(exports: export_stress.Exports) -> None:
    assert export_stress.kills(exports, kills=4)["kills"] == 4


@pytest.mark.slow
def test_interrupts_end_with_130_and_leave_what_is_whole(exports: export_stress.Exports) -> None:
    assert export_stress.interrupts(exports, times=2)["longest_wait_s"] < 5


@pytest.mark.slow
@pytest.mark.skipif(not export_stress.may_mount(), reason="needs the right to mount")
def test_a_full_disk_stops_with_2_and_the_rest_follows_when_there_is_room(
    exports: export_stress.Exports,
) -> None:
    export_stress.full_disks(exports, disks=1)


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(tmp_path: Path) -> None:
    export_stress.flat_memory(tmp_path, images=1_500, first=500)


def test_a_disk_that_fills_up_is_an_error_and_whole_shards_stay(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a disk of its own: the third write of a shard is refused."""
    export(out="whole")
    written = 0
    real = shard_writer.FeatureWriter.add

    def add(self: Any, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 7:
            atomic = self._growing[0].atomic
            atomic.file = Mock(wraps=atomic.file, write=full)
        real(self, *arguments)

    def full(data: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.FeatureWriter, "add", add)
        with pytest.raises(ExportError, match=r"shard-00000001.* could not be written \(No space"):
            export()
    assert set(files()) == {"export.json", "listing.jsonl", "shard-00000000.safetensors"}
    export()
    assert files() == files("whole")
