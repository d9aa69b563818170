"""Test that an export rejects wrong inputs and options before it begins."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.export import plan as plan_module
from qwen_vit.export import run as export_module
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.images.load import load_image
from qwen_vit.inputs.find import check_inputs, find_items
from qwen_vit.inputs.tars import DEFAULT_SUFFIXES
from tests.support.exports import SMALL, NeverAsked, export
from tests.support.fake_encoder import FakeEncoder


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("p", r"inputs is 'p'\. Expected a list of paths\. Pass \[inputs\]"),
        (b"p", r"inputs is b'p' \(bytes\)\. Expected a list"),
        (Path("p"), r"inputs is PosixPath\(.*Path\)\. Expected a list"),
        (
            [b"p"],
            r"inputs contains b'p' \(bytes\)\. Expected paths as str or Path\. Decode a path ",
        ),
        ([bytes(10**6)], r"inputs contains b'\\x00.*\.\.\. \(bytes\)\. .* encode_iter\.$"),
        (
            [np.zeros((99, 99, 3))],
            r"inputs contains array.*\.\.\. \(ndarray\)\. .*Write images to files",
        ),
        (7, r"inputs is 7 \(int\)\. Expected a list"),
        ([7], r"inputs contains 7 \(int\)\. Expected paths"),
        ([], r"inputs is empty\. Expected files, folders"),
    ],
)
def test_inputs_that_are_not_a_list_of_paths_create_no_folder(
    export_dir: Path, inputs: Any, words: str
) -> None:
    with pytest.raises(ArgumentError, match=words):
        export_features(FakeEncoder(), inputs, "out")
    assert not Path("out").exists()


def test_paths_may_be_path_objects(export_dir: Path) -> None:
    paths: Any = iter([Path("p")])
    assert export_features(FakeEncoder(), paths, "out", SMALL).exported == 10


# Resuming


def test_a_refused_export_leaves_no_file(export_dir: Path) -> None:
    Path("stray.jsonl").write_text('{"id": "x", "path": "p/0.png", "error": [["q"], "w"]}\n' * 2)
    for inputs, words in (
        (["p", "p"], "two images have this id"),
        (["empty"], "no image found in empty"),
        # this "error" has another type than in our listings
        (
            ["stray.jsonl"],
            "two images have this id",
        ),
    ):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(ExportError, match=words):
            export(*inputs)
        assert not Path("out").exists()


@pytest.mark.parametrize("name", ["list.json", "list.csv", "pictures.zip"])
def test_a_list_of_an_unknown_kind_is_refused(export_dir: Path, name: str) -> None:
    Path(name).write_text("{}")
    with pytest.raises(
        ExportError,
        match=rf"{name}: a (JSON file|CSV table|ZIP archive), not an image\. Expected images, fold",
    ):
        export(name)
    assert not Path("out").exists()
    # among other inputs, as from a shell's *, such a file is a failed image
    check_inputs(["p", name])
    assert export("p", name).failed == {"truncated": 1, "not-an-image": 1}


def test_the_times_of_frames_count_in_a_header(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of many videos was once accepted, and its header exceeded the limit at the end."""
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", 60_000)
    for index in range(6):  # up to 768 frames in each
        Path(f"{index}.mp4").write_bytes(b"unread")
    videos = [f"{index}.mp4" for index in range(6)]
    with pytest.raises(ExportError, match=r"6 images would need a header of up to 7\d{4} bytes"):
        export(*videos, encoder=NeverAsked(), options=replace(SMALL, shard_size=6))


def test_a_header_over_the_limit_of_safetensors_is_refused_before_any_image(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", 3_000)
    with pytest.raises(ExportError, match=r"would need a header of up to .* Lower shard_size"):
        export(encoder=NeverAsked(), options=replace(SMALL, shard_size=11))
    for folder in (None, "new", "out"):  # a dry run raises the same error
        with pytest.raises(ExportError, match="Lower shard_size"):
            estimate_export(NeverAsked(), ["p"], replace(SMALL, shard_size=11), folder=folder)
    assert export(options=replace(SMALL, shard_size=1)).exported == 10
    # the header size is an estimate, so an export with shards does not check it
    monkeypatch.setattr(plan_module, "MAX_HEADER_BYTES", 300)
    Path("out/shard-00000003.safetensors").unlink()
    assert export(options=replace(SMALL, shard_size=1)).exported == 10


@pytest.mark.parametrize("suffix", DEFAULT_SUFFIXES)
def test_the_suffixes_that_errors_name_need_no_option(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (30, 20), "red").save(path := tmp_path / f"a{suffix}")
    assert load_image(path).width == 30


def test_nothing_to_export_is_an_error(export_dir: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(
        ExportError, match=r"no image found in empty\. .* extensions: \.jpg, .*\.tiff, \.avif\. "
    ):
        export("empty")
    assert not Path("out").exists()


# Options


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": "token"}, {"dtype": "float16"}, {"shard_size": 0}, {"on_error": "stop"},
        {"part": (0, 2)}, {"part": (3, 2)}, {"part": 5}, {"part": "12"}, {"part": [1, 1]},
        {"part": (1, 2, 3)}, {"part": (1.0, 1.0)}, {"max_failures": -1}, {"max_failures": "x"},
        {"shard_size": 1.5}, {"shard_size": "5"}, {"shard_size": True}, {"limits": 5},
        {"limits": None}, {"as_video": 1}, {"extend": "no"}, {"retry_failed": None},
        {"accept_versions": 1},
    ],
)  # fmt: skip
def test_invalid_options_are_refused(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(ArgumentError, match=rf"{name} is .*\. Expected "):
        ExportOptions(**wrong)


def test_wrong_types_of_encoder_and_options_are_refused(export_dir: Path) -> None:
    with pytest.raises(ArgumentError, match=r"encoder is 'tiny'\. Expected a VisionEncoder"):
        export_features("tiny", ["p"], "out")  # type: ignore[arg-type]
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    with pytest.raises(ArgumentError, match=r"options is \{'output': 'mean'\}\. Expected Export"):
        export_features(encoder, ["p"], "out", {"output": "mean"})  # type: ignore[arg-type]
    assert not Path("out").exists()


# The command


def test_a_failure_to_list_inputs_does_not_blame_the_output(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def items(*_: Any, **__: Any) -> Any:
        yield from find_items(["p/0.png"])
        raise OSError(errno.EIO, "Input/output error", "p")

    monkeypatch.setattr("qwen_vit.export.list_inputs.find_items", items)
    with pytest.raises(
        ExportError, match=r"p: cannot be listed \(Input/output error\)\. Check its"
    ):
        export()
    assert not Path("out").exists()


def test_a_read_only_folder_is_an_error_before_any_work(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match=r"out: not writable\. Check its permissions"):
        export(encoder=NeverAsked())


def test_an_unreadable_input_folder_is_an_error_before_any_work(
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


def test_a_broken_link_with_a_patterns_name_is_not_a_pattern(export_dir: Path) -> None:
    Path("a[1].jpg").symlink_to("nothing")
    with pytest.raises(ExportError, match=r"a\[1\].jpg: does not exist"):
        export("a[1].jpg")


@pytest.mark.parametrize(
    ("device", "stored", "computed"),
    [("cpu", "bfloat16", "auto"), ("cuda", "bfloat16", "bfloat16"), ("cuda", None, "auto")],
)
def test_a_gpu_computes_in_the_stored_dtype(
    monkeypatch: pytest.MonkeyPatch, device: str, stored: Any, computed: str
) -> None:
    asked: dict[str, Any] = {}
    loader = SimpleNamespace(from_pretrained=lambda model, **options: asked.update(options))
    monkeypatch.setattr(export_module, "VisionEncoder", loader)
    export_module.load_encoder("m", ExportOptions(dtype=stored), device=device, max_pixels=5)
    assert asked == {"device": device, "dtype": computed, "max_pixels": 5}
