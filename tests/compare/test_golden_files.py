"""Test comparisons with a golden file, without transformers, and the rejection of changed files."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_vit import VisionEncoder
from qwen_vit.checkpoint.published_tensors import GivenTensors
from qwen_vit.common import transformers_version
from qwen_vit.compare import huggingface as reference
from qwen_vit.compare.golden import METADATA_KEY, Golden, load_golden
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.text import as_text
from qwen_vit.errors import ArgumentError, ComparisonError, ExportError
from tests.support import IMAGES
from tests.support.comparisons import CHELSEA, SMALL, STAGES, encoder, version_of
from tests.support.goldens import TINY_FOLDER
from tests.support.weight_faults import damaged, every_fault


def test_a_golden_needs_no_transformers(
    run: Any, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in (reference, transformers_version):
        monkeypatch.setattr(module, "version", version_of(transformers=None))
    for images, taken in (((CHELSEA,), "uint8 pixels"), ((), "the pixel values of the processor")):
        code, out, err = run(*images, *SMALL, "--golden", golden.path, "--json")
        document = json.loads(out)
        assert code == 0, err
        assert [image["tower_input"] for image in document["images"]] == [taken] * (
            len(images) or 2
        )
        assert document["golden"]["changed_weights"] == []
        assert document["reference"]["versions"] == golden.facts["versions"]


def test_stored_pixels_ignore_the_sampling_of_videos(run: Any, golden: Golden) -> None:
    code, _, err = run(*SMALL, "--golden", golden.path, "--fps", "3")
    assert (code, err.count("ignored --fps: ")) == (0, 1)


def test_a_golden_gives_the_result_of_the_live_comparison(golden: Golden) -> None:
    [live] = compare(encoder(), [CHELSEA]).images
    [stored] = compare_with_golden(encoder(), golden, [CHELSEA]).images
    assert stored.stages == live.stages
    assert stored.preprocessing == live.preprocessing


def test_a_golden_states_how_it_was_made(golden: Golden) -> None:
    facts = golden.facts
    assert (facts["dtype"], facts["attention"], facts["processor"]) == ("float32", "sdpa", "pillow")
    names = {"torch", "transformers", "pillow", "libjpeg-turbo", "numpy"}
    assert names <= set(facts["versions"])
    assert (facts["model"], facts["commit"], facts["device"]) == ("tiny", None, "cpu")
    assert facts["weights_sha256"] == encoder().checkpoint.weights_sha256()
    assert list(facts["images"][0]["errors"]) == sorted(STAGES)
    assert len(facts["images"][0]["sha256"]) == 64
    assert golden.path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_comparison_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compare(encoder(), [CHELSEA], save_golden=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ExportError, match=r"a: already exists\. .*overwrite=True"):
        compare(encoder(), [CHELSEA], save_golden=tmp_path / "a")
    with pytest.raises(ArgumentError, match="s3://b/g: save_golden is an address"):
        compare(encoder(), [CHELSEA], save_golden="s3://b/g")
    compare(encoder(), [CHELSEA], save_golden=tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_that_the_golden_does_not_hold_is_refused(run: Any, golden: Golden) -> None:
    other = IMAGES / "astronaut.png"
    code, out, err = run(other, *SMALL, "--golden", golden.path)
    assert (code, out) == (2, "")
    assert re.search(rf"{other}: not one of the images of .* \(.*chelsea.png, .*rocket.jpg\)", err)


def test_an_image_that_cannot_be_read_is_skipped_beside_a_golden_too(
    run: Any, golden: Golden, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(CHELSEA.read_bytes()[:5000])
    code, out, _ = run(torn, CHELSEA, *SMALL, "--golden", golden.path, "--json")
    document = json.loads(out)
    assert (code, [image["id"] for image in document["images"]]) == (1, [str(CHELSEA)])
    assert [each["code"] for each in document["skipped"]] == ["truncated"]


def test_a_video_that_cannot_be_read_is_skipped_beside_a_golden_too(
    golden: Golden, tmp_path: Path
) -> None:
    """The hash of a missing file once raised FileNotFoundError."""
    done = compare_with_golden(encoder(), golden, [tmp_path / "gone.mp4", CHELSEA])
    assert [image.id for image in done.images] == [str(CHELSEA)]
    assert [error.code for _, error in done.skipped] == ["missing"]


def test_a_golden_that_the_system_cannot_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"cannot be read \(File name too long\)"):
        load_golden(tmp_path / ("g" * 300))


def test_without_an_image_no_page_is_written(run: Any, tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"")
    code, out, err = run(torn, *SMALL, "--report", tmp_path / "page")
    assert (code, "skipped: " in out) == (2, False)
    assert "torn.png: not an image: it is empty" in err
    assert f"wrote nothing to {tmp_path / 'page'}: no image was compared" in err
    assert list(tmp_path.iterdir()) == [torn]


def test_figures_are_printed_even_where_their_page_cannot_be_written(
    undrawn: None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run(CHELSEA, *SMALL, "--report", tmp_path / "page")
    assert code == 2
    assert out.startswith("agrees: 1 of 1 image")
    assert "could not be written (No space left on device)" in err


OTHERWISE = {
    "max_pixels": (
        ("--max-pixels", "40000"),
        "image_config.max_pixels is 30000 in the golden file and",
    ),
    "processor": (("--processor", "torchvision"), "processor is 'pillow' in the golden file and"),
    "attention": (
        ("--attention", "eager"),
        "attention is 'sdpa' in the golden file and 'eager' here",
    ),
}


@pytest.mark.parametrize("setting", OTHERWISE)
def test_another_setting_than_the_goldens_is_refused_by_name(
    run: Any, golden: Golden, setting: str
) -> None:
    arguments, words = OTHERWISE[setting]
    code, out, err = run(*SMALL, *arguments, "--golden", golden.path)
    assert (code, out) == (2, "")
    assert words in err
    kept = {"max_pixels": 30_000, "processor": "pillow", "attention": "sdpa"}[setting]
    assert f"Expected the same. Pass {arguments[0]} {kept}." in err


def test_another_dtype_or_architecture_is_refused_by_name(golden: Golden) -> None:
    with pytest.raises(
        ComparisonError, match="dtype is 'float32' in the golden file and 'bfloat16' "
    ):
        compare_with_golden(replace(encoder(), dtype=torch.bfloat16), golden)
    config = replace(encoder().config, window_px=56)
    other = replace(encoder(), checkpoint=replace(encoder().checkpoint, config=config))
    with pytest.raises(ComparisonError, match=r"vision_config\.window_size is 112 in the"):
        compare_with_golden(other, golden)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], Any], None]) -> Path:
    """Return the golden file with tensors or metadata edited by hand."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as file:
        facts = json.loads(file.metadata()[METADATA_KEY])
    change(facts, tensors)
    save_file(tensors, target, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})
    return target


def nudge(facts: dict[str, Any], tensors: Any) -> None:
    tensors["0.block.2"][5, 7] += 1e-6


EDITS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "a value": nudge,
    "an error": lambda facts, _: facts["images"][0]["errors"].update(merger=1e-2),
    "a version": lambda facts, _: facts["versions"].update(transformers="9.9"),
    "an image's sha256": lambda facts, _: facts["images"][0].update(sha256="0" * 64),
    "a tensor left out": lambda _, tensors: tensors.pop("1.merger"),
    "no sha256": lambda facts, _: facts.pop("content_sha256"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_golden_edited_by_hand_is_refused(golden: Golden, tmp_path: Path, edit: str) -> None:
    path = rewritten(golden.path, tmp_path / "edited", EDITS[edit])
    with pytest.raises(
        ComparisonError,
        match=r"edited: was changed after it was written: .* Get the file again, or make the file",
    ):
        load_golden(path)


def test_a_golden_of_another_schema_is_refused(golden: Golden, tmp_path: Path) -> None:
    path = rewritten(golden.path, tmp_path / "g", lambda facts, _: facts.update(schema_version=2))
    with pytest.raises(
        ComparisonError, match=r"golden schema 2\. Expected schema 1\. Make the file again"
    ):
        load_golden(path)


@pytest.mark.parametrize("kept", [0, 7, 5_000, -1])
def test_a_truncated_golden_is_refused(golden: Golden, tmp_path: Path, kept: int) -> None:
    torn = tmp_path / "torn"
    torn.write_bytes(golden.path.read_bytes()[:kept])
    with pytest.raises(
        ComparisonError, match=r"torn: incomplete, or not a safetensors file \(\d+ bytes; "
    ) as caught:
        load_golden(torn)
    assert caught.value.name == str(torn)
    assert (caught.value.expected, caught.value.remedy) == (
        "",
        "Get the file again.",
    )  # not the golden of a checkpoint


def test_another_safetensors_file_is_refused_as_a_golden() -> None:
    with pytest.raises(
        ComparisonError, match=r"model\.safetensors: a safetensors file but not a golden"
    ):
        load_golden(TINY_FOLDER / "model.safetensors")


# Some of more than a hundred tensors; tools.checks.trust injects every fault.
FAULTS = (
    ("patch_embed.proj.weight", "row scaled"),
    ("blocks.4.attn.qkv.weight", "row scaled"),
    ("blocks.1.mlp.gate_proj.bias", "rows swapped"),
    ("blocks.0.norm1.weight", "rows swapped"),
    ("merger.mlp.0.bias", "bias dropped"),
)


@pytest.mark.parametrize(("tensor", "fault"), FAULTS)
def test_a_fault_in_one_tensor_of_a_checkpoint_is_found_and_its_stage_named(
    golden: Golden, tmp_path: Path, run: Any, tensor: str, fault: str
) -> None:
    [injected] = [
        each
        for each in every_fault(encoder().checkpoint.tensors)
        if (each.tensor, each.fault) == (tensor, fault)
    ]
    shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    weights = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors[f"visual.{tensor}"] = damaged(tensors[f"visual.{tensor}"], fault, 0)
    save_file(tensors, weights)
    code, out, _ = run(
        "--model", tmp_path / "tiny", *SMALL[2:], "--golden", golden.path, CHELSEA
    )  # fmt: skip
    first = out.splitlines()[:2]
    assert code == 1
    changed, original = (VisionEncoder.from_pretrained(tmp_path / "tiny", device="cpu"), encoder())
    hashes = [each.checkpoint.weights_sha256()[:16] for each in (changed, original)]
    assert f"({hashes[0]} here, {hashes[1]} in the golden): 1 tensor, {tensor}" in first[0]
    assert first[1].startswith(f"differs: {CHELSEA}: first at {injected.stage}: the golden is ")
    assert (
        "the weights differ" in first[1]
    )  # the golden's recorded error, not an error measured now


def test_other_weights_that_give_the_same_numbers_agree_and_are_named(golden: Golden) -> None:
    """The same values stored as float32 have another hash, but are the same model."""
    tensors = encoder().checkpoint.tensors
    given = GivenTensors({name: (tensor.float(),) for name, tensor in tensors.items()})
    other = replace(encoder(), checkpoint=replace(encoder().checkpoint, tensors=given))
    done = compare_with_golden(other, golden, [CHELSEA])
    assert done.passed
    text = as_text(done, has_stages=True)
    assert text.startswith("weights differ from the golden's")
    assert "closer" not in text  # the two errors belong to two models
    assert "ratio" not in text
    stages = [stage for image in done.to_json()["images"] for stage in image["stages"]]
    assert {stage["ratio"] for stage in stages} == {None}
    same = compare_with_golden(encoder(), golden, [CHELSEA])
    assert "ratio" in as_text(same)
    assert "closer to float64" in as_text(same)
